"""A model as it was made and measured, and what it was made of: all that its card tells."""

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.harness.jsonl import read_json, read_rows
from stages.host.graph import GraphStage, entry_deps, entry_key, entry_outs
from stages.host.layout import Asking
from stages.host.licences import ingredients
from stages.host.models import base_marks, whole_weights
from stages.host.provenance import pinned_libraries
from stages.host.results import BASE_SOURCE, COMPARISON, METRICS, PREDICTIONS, SOURCES, TEST, Row, stage_of
from stages.host.verify import Commit

ADDRESS = re.compile(r"https://(?:[^/@]*@)?(.+)")  # without who asks, and a password perhaps


@dataclass(frozen=True)
class Measured:
    """A model as it was made and measured: the commit's parameters, lock and records, and the results here."""

    model: str
    params: dict[str, Any]
    graph: dict[str, GraphStage]
    lock: dict[str, Row]  # dvc.lock's entries by stage
    records: dict[str, Row]  # the committed timing records of those very runs
    commit: str
    lock_sha256: str
    origin: str | None  # where the repository can be had
    metrics: Row
    comparison: Row
    sources: dict[str, Row]  # data/raw/sources.json, or nothing where it is not here
    base_source: Row | None  # of a published base: its repository, commit and terms
    asking: Asking
    example: tuple[str, Row] | None  # the test's first question and the answer to it, where they are here
    packages: dict[str, str]  # versions that the lock of the training image pins

    @property
    def base_is_here(self) -> bool:
        """Is the base one that was made by this run, or the user's own? Then it is on no hub."""
        return self.base_source is None

    @property
    def made_from_nothing(self) -> bool:
        """Was the base pretrained by this run?"""
        return self.params["base_model"]["kind"] == "pretrain"

    @property
    def ingredients(self) -> dict[str, Row]:
        return ingredients(self.model, self.params, self.sources, self.base_source)

    def lineage(self) -> list[str]:
        """The stages whose runs led to the weights, first to last."""
        made = {out: name for name, entry in self.lock.items() for out in entry_outs(entry)}
        found: dict[str, None] = {}

        def walk(out: str) -> None:
            if (name := made.get(out)) and name not in found:
                for dep in entry_deps(self.lock[name]):
                    walk(dep)
                found[name] = None

        walk(str(whole_weights(self.model)))
        return list(found)


def measured(tree: Path, model: str, params: dict[str, Any], graph: dict[str, GraphStage], commit: Commit) -> Measured:
    """Reads all of it. Raises InputError where there are no results."""
    comparison, metrics = read_json(tree / COMPARISON), read_json(tree / METRICS)
    prompt = comparison["models"][model]["prompt"]
    template = tree / "models" / model / "chat_template.jinja" if model != "base" else tree / f"data/mix/prompts/{prompt}.jinja"
    records = {name: commit.record(name) for name in commit.lock}
    role = graph[stage_of(model)].command.split()[1]  # docker/run ROLE STAGE
    return Measured(
        model=model, params=params, graph=graph, lock=commit.lock,
        records={name: record for name, record in records.items() if record.get("key") == entry_key(commit.lock[name])},
        commit=commit.id,
        lock_sha256=hashlib.sha256(commit.content("dvc.lock") or b"").hexdigest(),
        origin=_origin(tree),
        metrics=metrics, comparison=comparison,
        sources=read_json(tree / SOURCES) if (tree / SOURCES).is_file() else {},
        base_source=_base_source(tree, params["base_model"]),
        asking=Asking(prompt, template.read_text(encoding="utf-8") if template.is_file() else "", params["eval_gguf"]["scored"], base_marks(tree)),
        example=_example(tree, model),
        packages=pinned_libraries(commit.text(f"docker/{params['images'][role]}.lock") or ""),
    )  # fmt: skip


def _base_source(tree: Path, base: Row) -> Row | None:
    """What a published base's folder says of it; where that is not here, its repository alone. Nothing for a base made here."""
    if base["kind"] != "hub":
        return None
    return read_json(tree / BASE_SOURCE) if (tree / BASE_SOURCE).is_file() else {"repo": base["repo"], "revision": "unknown"}


def _example(tree: Path, model: str) -> tuple[str, Row] | None:
    """The test's first question and the model's answer to it, whatever that is."""
    answers, test = tree / PREDICTIONS / f"{model}.jsonl", tree / TEST
    if not (answers.is_file() and test.is_file()):
        return None
    return next(read_rows(test))["question"], next(read_rows(answers))


def _origin(tree: Path) -> str | None:
    """Where the repository can be had, if git's origin is an address that others can open."""
    url = subprocess.run(["git", "remote", "get-url", "origin"], cwd=tree, capture_output=True, text=True).stdout.strip()
    address = ADDRESS.fullmatch(url)
    return f"https://{address[1]}" if address else None
