"""What a finished run left in a working folder, read once for `mathmind report`."""

import csv
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows
from stages.harness.params import read_params
from stages.host.graph import entry_key, lock_stages
from stages.host.provenance import read_timing
from stages.host.seeds import collect

Row = dict[str, Any]
METRICS, COMPARISON = Path("metrics.json"), Path("results/comparison.json")
PLOTS, PREDICTIONS = Path("results/plots"), Path("results/predictions")
TEST = Path("data/mix/test.jsonl")
SOURCES, BASE_SOURCE = Path("data/raw/sources.json"), Path("models/base/source.json")
ACCOUNTS = {"prepare-mix": Path("data/mix/account.json"), "preference-pairs": Path("data/pairs/account.json")}


@dataclass(frozen=True)
class Results:
    """The run's files as they are; fractions in 0..1, seconds, MiB."""

    params: Row
    params_text: dict[str, str]  # by section, the lines of params.yaml as written, comments too
    models: dict[str, Row]  # metrics.json: scores by model, each followed by its GGUF form
    pairs: dict[str, Row]  # metrics.json: differences, as a_vs_b
    about: dict[str, Row]  # comparison.json: what more is known of each model
    gains: dict[str, Row]
    curves: dict[str, list[Row]]  # by stage, one row a logged step; a figure that a step lacks is not in it
    keys: dict[str, str]  # by stage, the key of the run that dvc.lock holds
    timing: dict[str, Row]  # by stage, the records of those very runs
    sources: dict[str, Row]  # data/raw/sources.json, or nothing where data/ is not there
    base_source: Row | None  # where a published base model is from
    accounts: dict[str, Row]  # by stage, rows read, dropped and used; data/ may not be there
    test: list[Row] | None  # GSM8K rows with id and steps, or None where data/mix is not there
    predictions: dict[str, list[Row]]  # by model; DVC may not have brought them all
    seeds: dict[str, Row]  # by name, runs of the same recipe under another seed of one stage; scores where they ended
    changed: list[str]  # files and sections of params.yaml that are not what dvc.lock holds

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self.params["profile"]

    @property
    def trained(self) -> list[str]:
        """The models without their GGUF forms."""
        return [name for name in self.models if not is_gguf(name)]

    def hue(self, model: str) -> str:
        """The CSS class that colours a model and its GGUF form, the same wherever they are shown."""
        return f"hue-{self.trained.index(model.removesuffix('-gguf'))}"

    @property
    def dropped(self) -> list[str]:
        """The stages whose timing record is missing or tells of another run: an older run's time is no time."""
        return [name for name in self.keys if name not in self.timing]

    def training(self, model: str) -> Row | None:
        """The timing record of the stage that trained a model; a GGUF form was not trained."""
        return self.timing.get(stage_of(model))


def is_gguf(model: str) -> bool:
    """Whether a name of metrics.json means a model's GGUF form."""
    return model.endswith("-gguf")


def stage_of(model: str) -> str:
    """The stage that trained a model."""
    return "base-model" if model == "base" else model


def model_of(stage: str) -> str:
    """The model that a stage trained, or that the stage's name carries: grpo for grpo and for eval@grpo."""
    return "base" if stage == "base-model" else stage.partition("@")[2] or stage


def read_results(folder: Path) -> Results:
    """Reads a working folder. Raises InputError where metrics.json, comparison.json or dvc.lock is missing."""
    metrics, comparison = read_json(folder / METRICS), read_json(folder / COMPARISON)
    lock = lock_stages(folder)
    if not lock:
        raise InputError("dvc.lock is missing or empty: run `dvc repro` first")
    params, keys = read_params(folder / "params.yaml"), {name: entry_key(entry) for name, entry in lock.items()}
    timing = {name: read_timing(folder, name) for name in keys}
    predictions = {name: folder / PREDICTIONS / f"{name}.jsonl" for name in metrics["models"]}
    return Results(
        params=params,
        params_text=_by_section((folder / "params.yaml").read_text(encoding="utf-8"), params),
        models=metrics["models"],
        pairs=metrics["pairs"],
        about=comparison["models"],
        gains=comparison["gains"],
        curves={path.stem: rows for path in sorted((folder / PLOTS).glob("*.csv")) if (rows := read_curve(path))},
        keys=keys,
        timing={name: record for name, record in timing.items() if record.get("key") == keys[name]},
        sources=read_json(folder / SOURCES) if (folder / SOURCES).is_file() else {},
        base_source=read_json(folder / BASE_SOURCE) if (folder / BASE_SOURCE).is_file() else None,
        accounts={name: read_json(folder / path) for name, path in ACCOUNTS.items() if (folder / path).is_file()},
        test=list(read_rows(folder / TEST)) if (folder / TEST).is_file() else None,
        predictions={name: list(read_rows(path)) for name, path in predictions.items() if path.is_file()},
        seeds=collect(folder),
        changed=_changed_files(folder, lock) + _changed_params(params, lock),
    )


def read_curve(path: Path) -> list[Row]:
    """A curve's rows, without what is no number; of a table of another kind, such as pass_at_1.csv, no row at all."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "step" in row]
    figures = ({name: float(value) for name, value in row.items() if value} for row in rows)
    return [{name: value for name, value in row.items() if math.isfinite(value)} for row in figures]


def _by_section(text: str, params: Row) -> dict[str, str]:
    """The lines of each top-level key, comments and all."""
    parts = re.split(r"""^(?=[\w'"])""", text, flags=re.MULTILINE)
    found = {part.partition(":")[0].strip("'\""): part.rstrip() for part in parts}
    return {name: found[name] for name in params}


def _changed_files(folder: Path, lock: Row) -> list[str]:
    """The results that were written or edited after the run that dvc.lock holds."""
    outs = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", ())}
    paths = [path for path in outs if path.startswith("results/") or path == str(METRICS)]
    return [path for path in paths if (folder / path).is_file() and _md5(folder / path) != outs[path]]


def _changed_params(params: Row, lock: Row) -> list[str]:
    """The sections of params.yaml that were edited after the run that dvc.lock holds."""
    ran: Row = {}
    for entry in lock.values():
        ran |= entry.get("params", {}).get("params.yaml", {})
    return [f"params.yaml: {name}" for name, value in ran.items() if params.get(name) != value]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
