"""The report's trainings at the shape of its model, a few updates each: do they fit, how fast are they, are losses finite.

    python benchmarks/report_shape.py VOCABULARY --profile report-t4 --gib 15 --turing --json FILE

Weights are random, the shape is the profile's (Qwen1.5-4B); VOCABULARY is Qwen2's real one (see prepare_mix.py), and rows are text
of our own in the report's schemas and lengths, brought through the stages fetch, prepare-mix and preference-pairs. Each method
then runs as its stage runs, in a process of its own.

--gib leaves a method so much of the card: a process of its own holds the rest, and sees how much of it was in use at most, the CUDA
context and all that torch does not count included. One run on a GPU at a time, then.
--turing leaves out what compute capability 7.5 has no kernels for: flash attention, and vLLM's attention but in Triton.
--backend transformers unsloth, --only METHOD, --set grpo.nf4=true ... change what is run. --shrink makes a model of a few weights, to try this script.
"""

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any

from prepare_mix import ROOT, environment, make_tables, make_tokenizer
from ruamel.yaml import YAML

METHODS = ("sft", "qlora", "orpo", "grpo")
INPUTS = {
    "prepare-mix": {"raw": "raw", "tokenizer": "base", "out": "mix"},
    "preference-pairs": {"raw": "raw", "base": "base", "mix": "mix", "teacher": "teacher", "out": "pairs"},
    "sft": {"base": "base", "mix": "mix"},
    "qlora": {"base": "base", "mix": "mix"},
    "orpo": {"base": "base", "pairs": "pairs"},
    "grpo": {"base": "base", "mix": "mix", "adapter": "sft"},
    "eval": {"model": "base", "mix": "mix", "out_metrics": "metrics.json", "out_predictions": "predictions.jsonl"},
}
ROWS = 0.02  # of the published sizes: enough for the updates here
TOKENS = 1500  # of the shortest long rows: sft takes rows that fit its 2,048 whole, so some must
PAD = "<|pad|>"
SHRUNK = {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 512}
OF_THE_PLAN = ("rows", "recompute", "dequantised", "attention_kept")  # what a record says
TIME_LIMIT = 1500  # seconds for a method
MIB, GIB = 2**20, 2**30


def main() -> None:
    chosen = _arguments()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sources, _ = make_inputs(chosen, chosen.backend[0], chosen.vocabulary, chosen.shrink)
        Path("teacher").mkdir()
        run_alone("preference-pairs", chosen, check=True)
        for backend in chosen.backend:
            values = write_params(chosen, backend, sources)
            for method in METHODS:
                if method in chosen.only:
                    results.append(row_of(method, chosen, values[method]))
                    print(json.dumps(results[-1]), flush=True)
                    if chosen.json:  # what there is so far, should a later method be cut off
                        chosen.json.write_text(json.dumps({"command": sys.argv[1:], "methods": results}, indent=2) + "\n")
    columns = [*dict.fromkeys(key for row in results for key in row if key != "losses")]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in results:
        print(f"| {' | '.join(str(row.get(column, '')) for column in columns)} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--profile", default="report-t4")
    parser.add_argument("--backend", nargs="+", default=["transformers"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gib", type=float, default=0, help="limit; 0: the whole card")
    parser.add_argument("--turing", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(METHODS), help="grpo needs sft before it")
    parser.add_argument("--set", nargs="+", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    parser.set_defaults(plain=False)
    return parser.parse_args()


def usual_options(**others: Any) -> SimpleNamespace:
    """What a script that has no use for these options chooses: report-h200's settings, by the stages as they are, on a whole card."""
    usual = {"profile": "report-h200", "steps": 1, "turing": False, "plain": False, "gib": 0, "changes": [], "backend": "transformers"}
    return SimpleNamespace(**usual | others)


def make_inputs(chosen, backend: str, vocabulary: Path, shrink: bool, tokens: int = TOKENS) -> tuple[dict, dict]:
    """base/ and mix/, and what they are made of, in the current folder; returns the sources of its tables and its parameters."""
    make_tables(ROWS, tokens)
    sources = YAML(typ="safe").load(Path("params.yaml"))["fetch"]["sources"]
    values = write_params(chosen, backend, sources)
    make_tokenizer(vocabulary)
    make_base(values["base_model"]["architecture"], shrink)
    run_alone("prepare-mix", chosen, check=True)
    return sources, values


def write_params(chosen, backend: str, sources: dict) -> dict:
    """Writes params.yaml: the profile, fetched from local tables, with so many steps by this backend."""
    yaml = YAML(typ="safe")
    values = yaml.load((ROOT / f"params/{chosen.profile}.yaml").read_text(encoding="utf-8"))
    values["fetch"]["sources"] = sources
    values["prepare_mix"]["sft_rows"] = None
    for method in METHODS:
        values[method] |= {"max_steps": chosen.steps, "log_every": 1, "save_every": 10_000, "backend": backend}
    values["qlora"]["eval_every"] = 10_000
    for change in chosen.changes:
        *path, name = (key := change.partition("=")[0]).split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = yaml.load(change.removeprefix(f"{key}="))
    with open("params.yaml", "w") as file:
        YAML().dump(values, file)
    return values


def make_base(size: dict, shrink: bool) -> None:
    """base/: a Qwen2 of this size with random weights in 16 bits, embeddings untied as in Qwen1.5-4B, and its tokenizer."""
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

    size = size | (SHRUNK if shrink else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file="tokenizer/tokenizer.json", eos_token="<|endoftext|>", pad_token=PAD)
    tokenizer.save_pretrained("base")
    config = shape_config(size, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained("base")
    del model
    torch.cuda.empty_cache()  # the stages need the card


def shape_config(size: dict, **tokens):
    """Of a Qwen2 of this size, embeddings untied as in Qwen1.5-4B; with these of its special tokens."""
    from transformers import Qwen2Config

    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"], vocab_size=151_936, hidden_size=size["hidden"], num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"], intermediate_size=size["ffn"],
        max_position_embeddings=size["positions"], rope_parameters={"rope_type": "default", "rope_theta": size["rope_theta"]},
        initializer_range=size["init_std"], tie_word_embeddings=False, bos_token_id=None, **tokens,
    )  # fmt: skip


def run_alone(
    stage: str, chosen, check: bool = False, processes: int = 1, rollout_gpus: int = 0, gpus: int | None = None
) -> subprocess.CompletedProcess:
    """A stage in a process of its own, below the limit; or in several, on a GPU each; grpo's engines on so many more, eval's on `gpus`."""
    shutil.rmtree("scratch", ignore_errors=True)
    for folder in ("checkpoints", "tmp"):
        Path("scratch", folder).mkdir(parents=True)
    outs = {"out": stage, "out_curve": f"{stage}.csv"} if stage in METHODS else {} if stage == "eval" else {"out": stage}
    paths = {**outs, **INPUTS[stage]}
    options = [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", path)]
    alone = [__file__, "stage", str(int(chosen.turing)), str(int(chosen.plain))]
    entry = ["-m", "stages.harness.run_ranks", "--processes", str(processes)] if processes > 1 else alone
    command = [sys.executable, *entry, stage, "--scratch", "scratch", "--local-files", "local", *options]
    home = str(Path("scratch/tmp").absolute())
    gpus = gpus or processes + rollout_gpus
    seen = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    given = {
        "HOME": home, "TMPDIR": home, "TRITON_CACHE_DIR": str(Path("kernels").absolute()),  # outlives the stage, as the launcher's does
        "CUDA_VISIBLE_DEVICES": ",".join(seen[:gpus]), "MATHMIND_ROLLOUT_GPUS": str(rollout_gpus),
    }  # fmt: skip
    done = subprocess.run(
        command, env={**environment(), **given}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    if check and done.returncode:
        sys.exit(done.stdout)
    return done


@contextmanager
def room_of(gib: float) -> Iterator[dict[str, int]]:
    """Leaves so much of the card free; what was used of it at most is in the mapping afterwards."""
    import torch

    used: dict[str, int] = {}
    if not gib or not torch.cuda.is_available():
        yield used
        return
    holder = subprocess.Popen([sys.executable, __file__, "hold", str(gib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()  # it has what it holds
    try:
        yield used
    finally:
        used["of_the_card_mib"] = int(holder.communicate()[0])


def hold(gib: float) -> None:
    """Holds all of the card but so much until its input ends, and then says how many MiB of that were in use at most."""
    import torch

    held = torch.empty(torch.cuda.mem_get_info()[0] - int(gib * GIB), dtype=torch.uint8, device="cuda")
    room = least = torch.cuda.mem_get_info()[0]
    print(f"{held.numel()} bytes held", flush=True)
    while not select([sys.stdin], [], [], 0.01)[0]:
        least = min(least, torch.cuda.mem_get_info()[0])
    print((room - least) // MIB)


def run_stage(turing: bool, plain: bool, arguments: list[str]) -> int:
    """The stage's own entry, in a process without the kernels that a T4 lacks; or without what our trainer does beside trl's."""
    import torch

    if plain:
        from stages.training import trainer

        trainer.walk_once = trainer.keep_up = lambda _: None
    if turing:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        os.environ["VLLM_BATCH_INVARIANT"] = "0"
        from stages.inference import vllm_engine
        from stages.training import packing

        packing.FLASH_FROM = (99, 0)
        vllm_engine.start_vllm = partial(vllm_engine.start_vllm, attention_backend="TRITON_ATTN")  # what it would choose there
    from stages.harness.run_stage import main as enter

    return enter(arguments)


def row_of(method: str, chosen, values: dict, processes: int = 1, rollout_gpus: int = 0) -> dict:
    """What a method took; or why it did not end."""
    about = {"method": method, "backend": values["backend"], "precision": values["precision"]}
    try:
        with room_of(chosen.gib) as used:
            done = run_alone(method, chosen, processes=processes, rollout_gpus=rollout_gpus)
    except subprocess.TimeoutExpired:
        return about | {"end": f"longer than {TIME_LIMIT} s"}
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        print(*lines[-60:], sep="\n", file=sys.stderr)
        why = next((line for line in reversed(lines) if "OutOfMemory" in line or "Error" in line), lines[-1] if lines else "")
        return about | {"end": why[:300]}
    record = json.loads(Path("scratch/stage.json").read_text())
    with open(f"{method}.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    seconds = record.get("training_seconds", record["seconds"])
    return about | {
        "end": "finite" if losses and all(map(math.isfinite, losses)) else "not finite",
        "updates": record["steps"],
        "seconds": round(seconds, 1),
        "peak_gpu_memory_mib": record.get("peak_gpu_memory_mib", ""),
        **used,
        "tokens_per_second": round(record["tokens"] / seconds) if "tokens" in record else "",
        "update_seconds": record.get("update_seconds", ""),
        "steady_tokens_per_second": round(record["tokens"] / record["steps"] / record["update_seconds"]) if "tokens" in record else "",
        "plan": ", ".join(f"{name} {record[name]}" for name in OF_THE_PLAN if name in record),
        "level": record.get("level", "bitwise"),
        "losses": losses,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["stage"]:
        status = run_stage(bool(int(sys.argv[2])), bool(int(sys.argv[3])), sys.argv[4:])
        sys.stdout.flush()
        os._exit(status)
    elif sys.argv[1:2] == ["hold"]:
        hold(float(sys.argv[2]))
    else:
        main()
