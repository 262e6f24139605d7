"""The report's mix at full size, by our stage and by the plain recipe beside it: `python benchmarks/prepare_mix.py VOCABULARY`.

VOCABULARY is `ggml-vocab-qwen2.gguf`, Qwen2's real tokens and merges, from `vendor/llama.cpp/models` in llama-cpp-python's
source archive. The tables have the report's schemas and sizes and text of our own (tests/report_tables.py): 19,252 reasoning
rows, nearly all of 2,000 tokens and more, and 100,000 chats, from parquet to the JSON Lines that training reads.

The plain recipe is what a notebook does: pandas reads the tables, `apply_chat_template` renders row by row, `datasets.map`
counts tokens. It makes qlora's set alone and checks nothing; ours makes all three sets and checks every row. Prints, for each,
seconds, CPU seconds and the largest memory of all its processes together (PSS: what they share counts once), and where our
time goes. `--rows 0.1` takes a tenth of the rows, `--json FILE` keeps the figures.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.harness.run_stage import determinism  # noqa: E402

OURS = "-m stages.harness.run_stage prepare-mix --scratch scratch --local-files local --raw raw --tokenizer tokenizer --out mix".split()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("vocabulary", type=Path)
    arguments.add_argument("--rows", type=float, default=1.0)
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tables(chosen.rows)
        make_tokenizer(chosen.vocabulary)
        figures = {"plain recipe": measured([__file__, "plain"]), "prepare-mix": measured(OURS)}
        figures["prepare-mix"]["phases"] = phases()
        figures["lengths"] = lengths()
    ours, plain = figures["prepare-mix"], figures["plain recipe"]
    print("| | seconds | CPU seconds | memory, MiB | rows |\n| --- | --- | --- | --- | --- |")
    for name in ("plain recipe", "prepare-mix"):
        print("| {} | {seconds:.1f} | {cpu_seconds:.1f} | {peak_mib:.0f} | {rows:,} |".format(name, **figures[name]))
    print(
        f"ratio: {plain['seconds'] / ours['seconds']:.1f}; of the rows {figures['lengths']:.0%} have 2,000 tokens or more"
    )
    print(", ".join(f"{phase}: {seconds:.1f} s" for phase, seconds in ours["phases"].items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")


def make_tables(rows: float, tokens: int = 2000) -> None:
    """params.yaml, raw/ and local/ in the working folder, as after fetch; see tests/report_tables.py."""
    from ruamel.yaml import YAML

    from tests.report_tables import local_sources, write_tables

    files = write_tables(Path("local"), tokens=tokens, rows=rows)
    values = YAML(typ="safe").load((ROOT / "params/report-t4.yaml").read_text(encoding="utf-8"))
    sources = values["fetch"]["sources"]
    values["fetch"]["sources"] = local_sources(
        files, sources, lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    )
    with open("params.yaml", "w") as file:
        YAML().dump(values, file)
    lock = str(ROOT / "params/sources.lock.yaml")
    fetch = [
        "-m",
        "stages.harness.run_stage",
        "fetch",
        "--scratch",
        "scratch",
        "--local-files",
        "local",
        "--sources-lock",
        lock,
        "--out",
        "raw",
    ]
    subprocess.run([sys.executable, *fetch], check=True, env=environment())


def make_tokenizer(vocabulary: Path) -> None:
    """tokenizer/tokenizer.json with Qwen2's vocabulary and merges, and its normaliser and pre-tokenizer."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from stages.corpus.tokenizer_files import QWEN2_PATTERN

    fields = GGUFReader(vocabulary).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    plain = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 1}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    Path("tokenizer").mkdir()
    tokenizer.save("tokenizer/tokenizer.json")


def environment() -> dict[str, str]:
    return {**os.environ, **determinism(ROOT), "PYTHONPATH": str(ROOT), "HF_HOME": str(Path("cache").absolute())}


def measured(command: list[str]) -> dict[str, float]:
    """Runs Python with a command: wall and CPU seconds, the most memory that it and its children had, and rows made."""
    shutil.rmtree("mix", ignore_errors=True)
    before, start = os.times(), time.monotonic()
    running = psutil.Popen([sys.executable, *command], env=environment())
    watch = Watch(running)
    watch.start()
    status = running.wait()
    seconds, after = time.monotonic() - start, os.times()
    watch.join()
    if status:
        sys.exit(f"{command} failed")
    rows = sum(sum(1 for _ in path.open("rb")) for path in Path("mix").glob("qlora/*.jsonl"))
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": watch.peak / 2**20, "rows": rows}


class Watch(threading.Thread):
    """The largest memory of a process and its children, looked at five times a second."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__()
        self.process, self.peak = process, 0

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            try:
                for one in (self.process, *self.process.children(recursive=True)):
                    total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
            self.peak = max(self.peak, total)
            time.sleep(0.2)


def plain() -> None:
    """The notebook's way: qlora's rows from the tables, rendered, counted, shuffled, split and written."""
    import pandas
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from stages.corpus.chat_format import chatml

    tokenizer = PreTrainedTokenizerFast(tokenizer_file="tokenizer/tokenizer.json", chat_template=chatml())
    reasoning = pandas.read_parquet("local/reasoning.parquet")
    chat = pandas.read_parquet("local/chat.parquet")
    chat = chat.sample(int(len(reasoning) * 0.25 / 0.75), random_state=3407)
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [
        [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["generated_solution"]}]
        for _, row in reasoning.iterrows()
    ] + [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns] for turns in chat["conversations"]]
    texts = [tokenizer.apply_chat_template(rows, tokenize=False) for rows in messages]
    rows = Dataset.from_pandas(pandas.DataFrame({"messages": messages, "text": texts}))
    rows = rows.map(lambda row: {"tokens": len(tokenizer(row["text"]).input_ids)})
    parts = rows.shuffle(seed=3407).train_test_split(0.2, shuffle=False)
    Path("mix/qlora").mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        parts[part].remove_columns(["text"]).to_json(f"mix/qlora/{part}.jsonl")
    Path("long.json").write_text(json.dumps(sum(count >= 2000 for count in rows["tokens"]) / len(rows)))


def lengths() -> float:
    """The share of the plain recipe's rows that have 2,000 tokens or more."""
    return json.loads(Path("long.json").read_text())


def phases() -> dict[str, float]:
    """Seconds of each part of our stage, in a run of its own."""
    shutil.rmtree("mix")
    done = subprocess.run(
        [sys.executable, __file__, "phases"], env=environment(), check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def time_phases() -> None:
    from stages import prepare_mix
    from stages.corpus import cleaning
    from stages.harness import run_stage

    taken: dict[str, float] = {}

    def timed(owner, name: str, phase) -> None:
        function = getattr(owner, name)

        def run(*arguments, **named):
            start = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                label = phase(*arguments)
                taken[label] = taken.get(label, 0.0) + time.monotonic() - start

        setattr(owner, name, run)

    timed(cleaning.Cleaning, "keep", lambda cleaning, source, *_: f"read and check {source}")
    for form in ("qlora", "sft", "grpo"):
        timed(prepare_mix.Forms, form, lambda forms, what, *_: f"count tokens of {what}")
    timed(prepare_mix, "_write_set", lambda *_: "write")
    start = time.monotonic()
    run_stage.main(OURS[2:])
    taken["the rest"] = time.monotonic() - start - sum(taken.values())
    print(json.dumps(taken))


if __name__ == "__main__":
    {"plain": plain, "phases": time_phases}.get(sys.argv[1] if len(sys.argv) > 1 else "", main)()
