"""All that a GPU host has to show, part by part, and one table of it.

    python benchmarks/gpu_host.py OUT VOCABULARY [--only graph again any-kernel ...]

graph: `scratch-gpu` rebuilt by `dvc repro` in a clone, with an empty cache; or by `mathmind repro` (--side-by-side), as many stages at a
time as there are GPUs. again: some of its stages a second time, and whether the lock says that their bytes are the same. any-kernel: its
trainings with `strict` off, which says what strict kernels cost. tests: `pytest -m gpu`. report-...: those profiles' trainings at their
model's real shape (report_shape.py, which says what VOCABULARY is).

OUT gets the clone, the graph's results (scratch-gpu/) and a file a part; the table is of all parts that have one. Parts that need no
clone can run beside others on a second GPU (CUDA_VISIBLE_DEVICES), with the same OUT; report-t4's want theirs for themselves.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.host.graph import DVC, lock_stages  # noqa: E402
from stages.host.provenance import read_timing  # noqa: E402

AGAIN = ("preference-pairs", "sft", "qlora", "orpo", "grpo", "eval@base", "eval@grpo")
STRICT = ("sft", "qlora", "orpo", "grpo")
KEPT = ("params.yaml", "dvc.lock", "metrics.json", "results/comparison.json", "results/report.md",
        "results/metrics", "results/plots", "results/timing")  # fmt: skip
MEASURES = {
    "seconds": "seconds",
    "peak_gpu_memory_mib": "GPU MiB",
    "of_the_card_mib": "of the card, MiB",
    "tokens_per_second": "tokens a second",
    "level": "level",
}
T4 = ("--profile", "report-t4", "--gib", "15", "--turing")
LOOSE = ("sft.strict=false", "qlora.strict=false", "orpo.strict=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=lambda text: Path(text).absolute())
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--side-by-side", action="store_true", help="the graph by mathmind repro")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts = PARTS | {"graph": partial(graph, side_by_side=chosen.side_by_side)}
    for name in PARTS:
        if name in chosen.only:
            try:
                rows = parts[name](chosen.out, chosen.vocabulary)
            except subprocess.CalledProcessError as error:  # the other parts can still show theirs
                rows = {name: {"end": f"failed: {' '.join(map(str, error.cmd[1:4]))} ended with {error.returncode}"}}
            (chosen.out / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
            show(chosen.out)


def graph(out: Path, vocabulary: Path, *, side_by_side: bool = False) -> dict[str, dict]:
    clone = out / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copy(clone / "params" / "scratch-gpu.yaml", clone / "params.yaml")
    for path in (clone / "dvc.lock", clone / "metrics.json", *(clone / "results").iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "stages", "repro"] if side_by_side else [*DVC, "repro"], cwd=clone, check=True)
    whole = {"seconds": round(time.monotonic() - started, 1)}
    subprocess.run([sys.executable, "-m", "stages", "report"], cwd=clone, check=True)
    keep(clone, out / "scratch-gpu")
    return {"graph": whole, **{stage: record_of(clone, stage) for stage in lock_stages(clone)}}


def again(out: Path, vocabulary: Path) -> dict[str, dict]:
    clone = out / "clone"
    first = lock_stages(clone)
    dvc(clone, "repro", "--force", "--single-item", *AGAIN)
    second = lock_stages(clone)
    return {stage: {"again": "same bytes" if second[stage]["outs"] == first[stage]["outs"] else "other bytes"} for stage in AGAIN}


def any_kernel(out: Path, vocabulary: Path) -> dict[str, dict]:
    clone = out / "clone"
    yaml = YAML()
    values = yaml.load(clone / "params.yaml")
    for stage in STRICT:
        values[stage]["strict"] = False
    yaml.dump(values, clone / "params.yaml")
    dvc(clone, "repro", "--single-item", *reversed(STRICT))  # sft, which grpo starts from, comes last
    return {stage: {"seconds, any kernel": record_of(clone, stage)["seconds"]} for stage in STRICT}


def tests(out: Path, vocabulary: Path) -> dict[str, dict]:
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (out / "tests.log").write_text(done.stdout)
    return {"tests/gpu": {"end": done.stdout.strip().splitlines()[-1]}}


def shape(out: Path, vocabulary: Path, *, part: str, options: tuple[str, ...]) -> dict[str, dict]:
    figures = out / f"{part}.shape.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "report_shape.py"), str(vocabulary)]
    subprocess.run([*script, *options, "--json", str(figures)], check=True)
    rows = json.loads(figures.read_text())["methods"]
    return {
        f"{part} {row['method']}": {name: row[key] for key, name in (MEASURES | {"end": "end"}).items() if key in row}
        for row in rows
    }


SHAPES = {
    "report-t4": (*T4, "--backend", "transformers"),
    # grpo by unsloth holds a base of its own beside the engine's.
    "report-t4-unsloth": (*T4, "--backend", "unsloth", "--set", "grpo.nf4=true", "grpo.rollouts.kv_cache_gib=1.2"),
    "report-h200": ("--profile", "report-h200"),
    "report-h200-any-kernel": ("--profile", "report-h200", "--only", "sft", "qlora", "orpo", "--set", *LOOSE),
}
PARTS = {
    "graph": graph,
    "again": again,
    "any-kernel": any_kernel,
    "tests": tests,
    **{part: partial(shape, part=part, options=options) for part, options in SHAPES.items()},
}


def dvc(clone: Path, *arguments: str) -> None:
    subprocess.run([*DVC, *arguments], cwd=clone, check=True)


def record_of(clone: Path, stage: str) -> dict:
    """Of a stage's timing record: the seconds of training where it trains, else of its whole run."""
    record = read_timing(clone, stage)
    record["seconds"] = record.get("training_seconds", record["seconds"])
    return {name: record[key] for key, name in MEASURES.items() if key in record}


def keep(clone: Path, folder: Path) -> None:
    """What of the graph's results goes into a repository: all but the page and predictions."""
    folder.mkdir(exist_ok=True)
    for source in (clone / name for name in KEPT):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name)


def show(out: Path) -> None:
    rows: dict[str, dict] = {}
    for part in PARTS:
        if (file := out / f"{part}.json").exists():
            for name, row in json.loads(file.read_text()).items():
                rows[name] = rows.get(name, {}) | row
    columns = [*dict.fromkeys(key for row in rows.values() for key in row)]
    table = Table("what", *columns)
    for name, row in rows.items():
        table.add_row(name, *(str(row.get(column, "")) for column in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
