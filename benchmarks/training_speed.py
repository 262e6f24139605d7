"""An update of the report's trainings at the shape of their model: here, by trl as it is usually set, and by unsloth, in one run.

    python benchmarks/training_speed.py VOCABULARY --method qlora --json FILE --gpus 8
    python benchmarks/training_speed.py VOCABULARY --method grpo --only here trl --steps 10 --json FILE

The same rows in the same order, random weights, each variant in a process of its own: by the stage itself, and GRPO's peer by trl's
trainer with its own vLLM. Rates are of the median update, so that compiling is not in them. qlora and sft: 8 rows an update, real tokens
a second, and useful operations: 4 a weight and token (forward, and the gradient of what is computed; the weights themselves are frozen),
of all matrices and the head; the ceiling beside it is a product of 8192 x 8192 in bf16. grpo: seconds an update of prompts x 4
completions of 512 tokens, all drawn to the end, and completion tokens a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from prepare_mix import environment
from report_shape import make_inputs, row_of, run_alone, usual_options, write_params

PADDED = {"packed": "null"}
TRL = {"by": "trl"}  # not by the stage
PLAIN = {"by": "plain"}  # by the stage, without what our trainer does beside trl's
ENGINE = {  # what trl's colocated engine asks for
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
PLANNED = "{rows: null, recompute: null, dequantise: null, compile: true, memory_gib: null}"


def _batch(rows: int, recompute: bool) -> dict[str, str]:
    return {"per_device_batch": str(rows), "accumulation": str(8 // rows), "gradient_checkpointing": str(recompute).lower()}


HERE = {"packed": PLANNED}
WITHIN_15 = {"packed": PLANNED.replace("memory_gib: null", "memory_gib: 15")}
LOOSE = {"strict": "false"}
PEER = {**PADDED, **LOOSE, **PLAIN}
SUPERVISED = {  # name -> GiB that the process may take (0: all), changes of the section
    "here": (0, HERE),
    "here, kernels not strict": (0, {**HERE, **LOOSE}),
    "here, not compiled": (0, {"packed": PLANNED.replace("compile: true", "compile: false")}),
    "here, in 4 bits": (0, {"packed": PLANNED.replace("dequantise: null", "dequantise: false")}),
    "trl": (0, {**PEER, **_batch(2, True)}),
    "trl, 8 rows kept": (0, {**PEER, **_batch(8, False)}),
    "unsloth, 2 rows": (0, {**PEER, **_batch(2, True), "backend": "unsloth"}),
    "unsloth, 8 rows": (0, {**PEER, **_batch(8, True), "backend": "unsloth"}),
    "unsloth, 8 rows kept": (0, {**PEER, **_batch(8, False), "backend": "unsloth"}),
    "unsloth, 4 rows kept": (0, {**PEER, **_batch(4, False), "backend": "unsloth"}),
    "15 GiB: here": (15, WITHIN_15),
    "15 GiB: here, kernels not strict": (15, {**WITHIN_15, **LOOSE}),
    "15 GiB: trl": (15, {**PEER, **_batch(2, True)}),
    "15 GiB: unsloth, 2 rows": (15, {**PEER, **_batch(2, True), "backend": "unsloth"}),
    "15 GiB: unsloth, 8 rows": (15, {**PEER, **_batch(8, True), "backend": "unsloth"}),
}


def _prompts(count: int) -> dict[str, str]:
    return {"prompts_per_step": str(count), "per_device_batch": str(4 * count), "accumulation": "1"}


GRPO = {
    "here": (0, _prompts(4)),
    "here, kernels not strict": (0, {**_prompts(4), **LOOSE}),
    "here, padded": (0, {**_prompts(4), **PADDED}),
    "here, adapter beside the base, batch-invariant": (0, {**_prompts(4), "rollouts.merged": "false"}),
    "here, 16 prompts": (0, _prompts(16)),
    "two GPUs: colocated": (0, _prompts(4)),
    "two GPUs: apart": (0, _prompts(4)),
    "two GPUs, 16 prompts: colocated": (0, _prompts(16)),
    "two GPUs, 16 prompts: apart": (0, _prompts(16)),
    "trl": (0, TRL | _prompts(4)),
    "trl, 16 prompts": (0, TRL | _prompts(16)),
}
GRPO_GPUS = {  # processes that train, GPUs that engines have alone
    "two GPUs: colocated": (2, 0), "two GPUs: apart": (1, 1), "two GPUs, 16 prompts: colocated": (2, 0), "two GPUs, 16 prompts: apart": (1, 1),
}  # fmt: skip
VARIANTS = {"qlora": SUPERVISED, "sft": SUPERVISED, "grpo": GRPO}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--method", default="qlora", choices=VARIANTS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants; see the source. Those of two GPUs run only where they are named")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shrink", action="store_true", help="a model of a few weights, to try this script")
    parser.add_argument("--gpus", type=int, default=1, help="that share the variants, each on one of them alone")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    asked = parser.parse_args()
    asked.only = asked.only or [name for name in VARIANTS[asked.method] if name not in GRPO_GPUS]
    if asked.gpus > 1:
        return share(asked)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        chosen = usual_options(steps=asked.steps)
        sources, values = make_inputs(chosen, "transformers", asked.vocabulary, asked.shrink)
        architecture = values["base_model"]["architecture"]
        if asked.method == "grpo":
            chosen.changes = ["sft.max_steps=1"]
            write_params(chosen, "transformers", sources)
            run_alone("sft", chosen, check=True)
        ceiling = product_rate()
        for name in asked.only:
            chosen.gib, changes = VARIANTS[asked.method][name]
            chosen.plain = changes.get("by") == "plain"
            chosen.changes = [f"{asked.method}.{key}={value}" for key, value in changes.items() if key != "by"]
            section = write_params(chosen, changes.get("backend", "transformers"), sources)[asked.method]
            gpus = GRPO_GPUS.get(name, (1, 0))
            row = by_trl(section, asked.steps) if changes.get("by") == "trl" else row_of(asked.method, chosen, section, *gpus)
            results.append({"name": name, **row, **rates(asked.method, section, row, architecture), "ceiling_tflops": round(ceiling)})
            print(json.dumps(results[-1]), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps({"command": sys.argv[1:], "gpu": gpu(), "rows": results}, indent=2) + "\n")


def rates(method: str, section: dict, row: dict, architecture: dict) -> dict:
    """What an update's median time means."""
    if not (seconds := row.get("update_seconds")):
        return {}
    if method == "grpo":
        completions = section["prompts_per_step"] * section["generations"]
        return {"completion_tokens_per_second": round(completions * section["max_completion"] / seconds)}
    return {"useful_tflops": round(row["steady_tokens_per_second"] * operations(architecture) / 1e12)}


def by_trl(section: dict, steps: int) -> dict:
    """trl's trainer with its own vLLM beside it, in a process of its own; see trl_grpo.py."""
    command = [sys.executable, str(Path(__file__).with_name("trl_grpo.py")), json.dumps({**section, "max_steps": steps})]
    done = subprocess.run(command, env={**environment(), **ENGINE}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = done.stdout.splitlines()
    found = next((line for line in reversed(lines) if line.startswith("{")), None)  # NCCL may have the last word
    return {"backend": "trl", **(json.loads(found) if found and done.returncode == 0 else {"end": "".join(lines[-1:])[:300]})}


def share(asked: argparse.Namespace) -> None:
    """Runs this script once a GPU, side by side, and joins what they wrote in the order of VARIANTS."""
    with tempfile.TemporaryDirectory() as folder:
        running, files = [], []
        for gpu in range(min(asked.gpus, len(asked.only))):
            files.append(Path(folder, f"{gpu}.json"))
            options = ["--method", asked.method, "--steps", str(asked.steps), "--json", files[-1], "--only", *asked.only[gpu :: asked.gpus]]
            running.append(subprocess.Popen(
                [sys.executable, __file__, asked.vocabulary, *options, *(["--shrink"] if asked.shrink else [])],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            ))  # fmt: skip
        for each in running:
            each.wait()
        parts = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: list(VARIANTS[asked.method]).index(row["name"]))
    if asked.json:
        asked.json.write_text(json.dumps({"command": sys.argv[1:], "gpu": parts[0]["gpu"], "rows": rows}, indent=2) + "\n")


def operations(size: dict) -> int:
    """Floating-point operations that a token of training needs."""
    layer = size["hidden"] * (2 * size["hidden"] + 2 * size["hidden"] * size["kv_heads"] // size["heads"] + 3 * size["ffn"])
    return 4 * (size["layers"] * layer + size["hidden"] * 151_936)


def product_rate() -> float:
    """TFLOP/s of a matrix product of random numbers; 0 where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    milliseconds = do_bench(lambda: a @ b, return_mode="median")
    return 2 * 8192**3 / milliseconds / 1e9


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    main()
