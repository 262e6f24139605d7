"""`mathmind report`: joins scores, comparison and timing into results/report.md."""

from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.params import read_params
from stages.host.graph import lock_keys
from stages.host.provenance import TIMING

REPORT = Path("results/report.md")


def write_report(folder: Path) -> Path:
    """Writes the report of the results in a working folder and returns its path.

    A timing record enters only if its key is the one of the run that dvc.lock holds: an older run's time is no time.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    metrics, comparison = read_json(folder / "metrics.json"), read_json(folder / "results/comparison.json")
    keys = lock_keys(folder)
    if not keys:
        raise InputError("dvc.lock is missing or empty: run `dvc repro` first")
    records = {name: _record(folder / TIMING / f"{name}.json") for name in keys}
    timing = {name: record for name, record in records.items() if record and record["key"] == keys[name]}
    about = comparison["models"]

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=False, autoescape=False
    )
    environment.globals.update(percent=_percent, hundred=_hundred, points=_points, p_value=_p_value)
    text = environment.get_template("report.md.jinja").render(
        profile=read_params(folder / "params.yaml")["profile"],
        n=metrics["models"]["base"]["n"],
        models=metrics["models"],
        pairs=metrics["pairs"],
        about=about,
        base_prompts=about["base"]["prompts"],
        step_counts=sorted(about["base"]["by_steps"]),
        seconds=lambda name: timing[_trained_in(name)]["seconds"] if _trained_in(name) in timing else "",
        timing=[timing[name] | {"tokens_per_second": timing[name].get("tokens_per_second")} for name in timing],
        dropped=[name for name in keys if name not in timing],
    )
    path = folder / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _record(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


def _trained_in(model: str) -> str:
    """The stage that trained a model; a GGUF form was not trained."""
    return "base-model" if model == "base" else model


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _hundred(share: float) -> str:
    """BLEU as its papers write it."""
    return f"{100 * share:.1f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-300 else "0"
