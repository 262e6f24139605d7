"""compare: puts every model's scores side by side, and tests the differences in pairs on the same problems.

metrics.json is what `dvc metrics diff` shows: numbers alone, in mappings. comparison.json says more: by number of steps,
the base under every prompt, how much of a gain is form and how much arithmetic, and what GGUF costs.
"""

import csv
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows, write_json
from stages.harness.params import StageParams
from stages.scoring.statistics import holm, paired_difference

DIGITS = 6


class Params(StageParams):
    """`a_vs_b` tests whether a's answers are right more often than b's."""

    pairs: tuple[str, ...] = Field(strict=False)


def run(
    p: Params, *, metrics: Path, predictions: Path, out_metrics: Path, out_comparison: Path, out_plot: Path
) -> None:
    """Writes metrics.json, comparison.json and the plot's points."""
    found = {file.stem: read_json(file) for file in sorted(metrics.glob("*.json"))}
    models = {name: found[name]["scores"] for name in _in_order(found)}
    whole = {name: scores for name, scores in models.items() if "-gguf" not in name}  # on all problems, GGUF on some
    pairs = _tested(p.pairs, {name: _correct(predictions / f"{name}.jsonl") for name in whole})
    write_json(out_metrics, {"models": models, "pairs": pairs})
    write_json(out_comparison, {
        "models": {name: {key: value for key, value in found[name].items() if key != "scores"} for name in models},
        "gains": {name: _gains(found["base"], found[name]) for name in whole if name != "base"},
    })  # fmt: skip
    out_plot.parent.mkdir(parents=True, exist_ok=True)
    with out_plot.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "pass_at_1", "low", "high"])
        for name, scores in models.items():
            writer.writerow([name, *(scores[key] for key in ("pass_at_1", "pass_at_1_low", "pass_at_1_high"))])


def _in_order(found: dict[str, Any]) -> list[str]:
    """The methods in the graph's order, each followed by its GGUF form."""
    order = ("base", "sft", "qlora", "grpo", "orpo")
    if missing := [name for name in order if name not in found]:
        raise InputError(f"results/metrics/{missing[0]}.json is missing: run `dvc repro eval@{missing[0]}`")
    return [name for model in order for name in (model, f"{model}-gguf") if name in found]


def _correct(path: Path) -> dict[str, bool]:
    return {row["id"]: row["correct"] for row in read_rows(path)}


def _tested(names: tuple[str, ...], correct: dict[str, dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Each pair's difference with its interval, exact McNemar p and Holm's correction over all pairs."""
    pairs = {}
    for name in names:
        first, _, second = name.partition("_vs_")
        if first not in correct or second not in correct:
            raise InputError(f"params.yaml: compare.pairs: {name} must name two models as a_vs_b: {', '.join(correct)}")
        ids = correct[first].keys() & correct[second].keys()
        pairs[name] = paired_difference(*([correct[model][id] for id in sorted(ids)] for model in (first, second)))
    adjusted = holm({name: pair["p"] for name, pair in pairs.items()})
    return {
        name: {key: float(f"{value:.6g}") for key, value in {**pair, "p_holm": adjusted[name]}.items()}
        for name, pair in pairs.items()
    }


def _gains(base: dict[str, Any], model: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A model's gain on all problems, then on those of each number of steps."""
    by_steps = {count: _gain(base["by_steps"][count], scores) for count, scores in model["by_steps"].items()}
    return {"all": _gain(base["scores"], model["scores"]), **by_steps}


def _gain(base: dict[str, float], scores: dict[str, float]) -> dict[str, float]:
    """A gain in strict pass@1 over the base: the part that shows in the flexible reading too, and the rest, the form."""
    whole = scores["pass_at_1"] - base["pass_at_1"]
    arithmetic = scores["pass_at_1_flexible"] - base["pass_at_1_flexible"]
    return {name: round(value, DIGITS) for name, value in
            {"pass_at_1": whole, "arithmetic": arithmetic, "form": whole - arithmetic}.items()}  # fmt: skip
