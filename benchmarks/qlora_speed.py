"""An update of the report's QLoRA at the shape of its model: here, by trl as it is usually set, and by unsloth, in one run.

    python benchmarks/qlora_speed.py VOCABULARY --json FILE --gpus 8
    python benchmarks/qlora_speed.py VOCABULARY --only here trl --steps 24 --json FILE

The same rows in the same order, 8 an update, random weights, each in a process of its own by the stage itself. A rate is of real tokens,
by the median update, so that compiling is not in it. Useful operations: 4 a weight and token (forward, and the gradient of what is
computed; the weights themselves are frozen), of all matrices and the head; the ceiling beside it is a product of 8192 x 8192 in bf16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from prepare_mix import make_tables, make_tokenizer
from report_shape import ROWS, TOKENS, _params, _row, _run, make_base
from ruamel.yaml import YAML

PADDED = {"packed": "null"}
PLANNED = "{rows: null, recompute: null, dequantise: null, compile: true, memory_gib: null}"


def _batch(rows: int, recompute: bool) -> dict[str, str]:
    return {"per_device_batch": str(rows), "accumulation": str(8 // rows), "gradient_checkpointing": str(recompute).lower()}


HERE = {"packed": PLANNED}
VARIANTS = {  # name -> GiB that the process may take (0: all), changes of the section
    "here": (0, HERE),
    "here, kernels not strict": (0, {**HERE, "strict": "false"}),
    "here, not compiled": (0, {"packed": PLANNED.replace("compile: true", "compile: false")}),
    "here, in 4 bits": (0, {"packed": PLANNED.replace("dequantise: null", "dequantise: false")}),
    "trl": (0, {**PADDED, **_batch(2, True), "strict": "false"}),
    "trl, 8 rows kept": (0, {**PADDED, **_batch(8, False), "strict": "false"}),
    "unsloth, 2 rows": (0, {**PADDED, **_batch(2, True), "strict": "false", "backend": "unsloth"}),
    "unsloth, 8 rows": (0, {**PADDED, **_batch(8, True), "strict": "false", "backend": "unsloth"}),
    "unsloth, 8 rows kept": (0, {**PADDED, **_batch(8, False), "strict": "false", "backend": "unsloth"}),
    "unsloth, 4 rows kept": (0, {**PADDED, **_batch(4, False), "strict": "false", "backend": "unsloth"}),
    "15 GiB: here": (15, {"packed": PLANNED.replace("memory_gib: null", "memory_gib: 15")}),
    "15 GiB: here, 2 rows in 16 bits": (15, {"packed": "{rows: 2, recompute: true, dequantise: true, compile: true, memory_gib: 15}"}),
    "15 GiB: trl": (15, {**PADDED, **_batch(2, True), "strict": "false"}),
    "15 GiB: unsloth, 2 rows": (15, {**PADDED, **_batch(2, True), "strict": "false", "backend": "unsloth"}),
    "15 GiB: unsloth, 8 rows": (15, {**PADDED, **_batch(8, True), "strict": "false", "backend": "unsloth"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--method", default="qlora", choices=["sft", "qlora"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shrink", action="store_true", help="a model of a few weights, to try this script")
    parser.add_argument("--gpus", type=int, default=1, help="that share the variants, each on one of them alone")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    asked = parser.parse_args()
    if asked.gpus > 1:
        return share(asked)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tables(ROWS, TOKENS)
        sources = YAML(typ="safe").load(Path("params.yaml"))["fetch"]["sources"]
        chosen = SimpleNamespace(profile="report-h200", steps=asked.steps, turing=False, gib=0, changes=[], backend="transformers")
        architecture = _params(chosen, "transformers", sources)["base_model"]["architecture"]
        make_tokenizer(asked.vocabulary)
        make_base(architecture, asked.shrink)
        _run("prepare-mix", chosen, check=True)
        ceiling = product_rate()
        for name in asked.only:
            chosen.gib, changes = VARIANTS[name]
            chosen.changes = [f"{asked.method}.{key}={value}" for key, value in changes.items()]
            section = _params(chosen, changes.get("backend", "transformers"), sources)[asked.method]
            row = _row(asked.method, chosen, section)
            rate = row.get("steady_tokens_per_second") or 0
            row = {"name": name, **row, "useful_tflops": round(rate * operations(architecture) / 1e12), "ceiling_tflops": round(ceiling)}
            results.append(row)
            print(json.dumps(row), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps({"command": sys.argv[1:], "gpu": gpu(), "rows": results}, indent=2) + "\n")


def share(asked: argparse.Namespace) -> None:
    """Runs this script once a GPU, side by side, and joins what they wrote in the order of VARIANTS."""
    with tempfile.TemporaryDirectory() as folder:
        running, files = [], []
        for gpu in range(min(asked.gpus, len(asked.only))):
            files.append(Path(folder, f"{gpu}.json"))
            options = ["--method", asked.method, "--steps", str(asked.steps), "--only", *asked.only[gpu :: asked.gpus], "--json", files[-1]]
            running.append(subprocess.Popen(
                [sys.executable, __file__, asked.vocabulary, *options, *(["--shrink"] if asked.shrink else [])],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            ))  # fmt: skip
        for each in running:
            each.wait()
        parts = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: list(VARIANTS).index(row["name"]))
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
    del a, b
    torch.cuda.empty_cache()
    return 2 * 8192**3 / milliseconds / 1e9


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    main()
