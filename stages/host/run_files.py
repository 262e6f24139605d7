"""What a run is made of, and what its stage has written, read for tracking: while it runs, and when it has ended."""

import json
from pathlib import Path
from typing import Any

from stages.harness.jsonl import read_json, read_rows
from stages.host.provenance import lock_text, pinned_libraries, read_timing, recipe
from stages.host.results import METRICS, SOURCES, TEST, read_curve
from stages.host.tracking import Followed
from stages.training import curves
from stages.training.curves import Curve

LIVE = Path("checkpoints") / curves.LIVE  # in the scratch folder: the curve's rows as a stage logs them
SAMPLE = 100  # completions of a table
COLUMNS = ("id", "prompt", "question", "completion", "gold answer", "answer", "correct")

Figures = dict[str, float]


def config(run: Followed) -> dict[str, Any]:
    """What the run is made of: parameters, data, image and libraries."""
    tree = Path(run.tree)
    return {
        "profile": run.profile,
        **run.params,
        "key": run.key,
        "image": {"role": run.role, "name": run.image, "recipe": recipe(tree, run.image)},
        "versions": pinned_libraries(lock_text(tree / "docker" / f"{run.image}.lock")),
        **data_pins(run, at_the_end=False),
    }


def data_pins(run: Followed, *, at_the_end: bool) -> dict[str, Any]:
    """Revision and hashes of every source; those that the stage itself writes are known at its end."""
    path = Path(run.tree) / SOURCES
    if at_the_end != (str(SOURCES.parent) in run.outs) or not path.is_file():
        return {}
    kept = ("revision", "rows", "files")
    return {"data": {name: {key: about.get(key) for key in kept} for name, about in read_json(path).items()}}


class Ended:
    """What a stage that ended well has written, as far as tracking shows it."""

    def __init__(self, run: Followed) -> None:
        tree = Path(run.tree)
        self.curve: dict[int, Figures] = {}
        self.summary: dict[str, Any] = {"timing": read_timing(tree, run.stage)}
        self.config = data_pins(run, at_the_end=True)
        self.completions: list[list[Any]] = []
        for out in map(Path, run.outs):
            if out.suffix == ".csv":
                self.curve = {int(row.pop("step")): row for row in read_curve(tree / out)}
            elif out == METRICS or out.parent.name == "metrics":
                self.summary |= read_json(tree / out)
            elif out.suffix == ".jsonl":
                self.completions = sample(list(read_rows(tree / out)), tree / TEST)


def live_rows(scratch: Path) -> dict[int, Figures]:
    """A running stage's rows so far."""
    curve, file = Curve(), scratch / LIVE
    for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else []:  # what follows the last end of line is still being written
        row = json.loads(line)
        curve.add(row.pop("step"), **row)
    return curve.rows


def sample(predictions: list[dict[str, Any]], test: Path) -> list[list[Any]]:
    """Predictions at even distances as rows of COLUMNS, with their questions and gold answers where the test set is here."""
    gold = {row["id"]: row for row in read_rows(test)} if test.is_file() else {}
    every = max(1, -(-len(predictions) // SAMPLE))
    return [
        [
            row["id"], row.get("form") or row.get("prompt"), gold.get(row["id"], {}).get("question"), row["completion"],
            gold.get(row["id"], {}).get("answer"), row.get("answer"), row.get("correct"),
        ]
        for row in predictions[::every]
    ]  # fmt: skip
