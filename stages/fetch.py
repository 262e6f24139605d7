"""fetch: brings every source to data/raw/, one folder each, and writes down what it got.

A source is made by the generator, copied from a file the user keeps, or downloaded from the hub at a pinned commit.
Whatever it is, its rows are checked against its schema here, so that no later stage meets a row without its fields.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.corpus import procedural, schemas
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json, write_rows
from stages.harness.params import StageParams


class Source(StageParams):
    """Where one source comes from; `none` leaves it out."""

    kind: Literal["generator", "local", "hub", "none"]
    schema_: schemas.Schema = Field(alias="schema")
    rows: int | None = Field(gt=0)  # generator: how many to make; local and hub: keep the first so many (null: all)
    split: str | None  # generator: pretraining, train, validation or test; hub: the dataset's split
    file: str | None  # local: the file's name below run.local_files
    sha256: str | None  # local: what its bytes must be
    repo: str | None  # hub: the dataset's name; its commit stands in params/sources.lock.yaml
    config: str | None  # hub: the dataset's configuration


class Params(StageParams):
    """`steps` and `documents` shape what the generator makes: shares, each summing to 1."""

    seed: int
    steps: dict[int, float]  # share of problems by number of steps
    pretraining_steps: dict[int, float]  # the same, in what the base model reads
    documents: dict[str, float]  # share of each kind of document in what the base model reads
    careless: float = Field(ge=0, le=1)  # share of the solutions in there that add in the last step where they must not
    sources: dict[str, Source]


def run(p: Params, *, sources_lock: Path, local_files: Path, out: Path) -> None:
    """Writes out/<source>/rows.jsonl and out/sources.json (kind, schema, rows, revision, sha256 of each).

    Of a generated source of problems, sources.json also counts the one-step facts (a family with its numbers) that the
    generated test shares with it; problems of more steps share none, by construction.
    """
    account, told = {}, {}
    for name, source in p.sources.items():
        if source.kind == "none":
            continue
        rows = out / name / "rows.jsonl"
        match source.kind:
            case "generator":
                told[name] = [] if source.schema_ in ("documents", "sharegpt") else _problems(p, name, source)
                write_rows(rows, _rows(p, name, source, told[name]))
            case "local":
                _copy(name, source, local_files, rows)
            case "hub":
                raise InputError(f"params.yaml: fetch.sources.{name}: hub sources are not there yet: use kind local")
        account[name] = {
            "kind": source.kind,
            "schema": source.schema_,
            "rows": schemas.check_rows(rows, source.schema_),
            "revision": None,
            "sha256": _sha256(rows),
        }
    for name in [name for name in told if told[name] and "test" in told and name != "test"]:
        account[name]["one_step_facts_shared_with_test"] = procedural.shared_facts(told[name], told["test"])
    if not account:
        raise InputError("params.yaml: fetch.sources names no source: give at least one a kind other than none")
    measures.note(rows=sum(entry["rows"] for entry in account.values()))
    write_json(out / "sources.json", account)


def _problems(p: Params, name: str, source: Source) -> list[procedural.Problem]:
    """A generated source's problems, drawn from its split with a seed of its own."""
    _check_generator(name, source)
    return procedural.problems(source.split, source.rows, _seed(p, name), p.steps)


def _rows(p: Params, name: str, source: Source, problems: list[procedural.Problem]) -> Iterator[dict[str, Any]]:
    """A generated source's rows in its schema, each with an id."""
    _check_generator(name, source)
    match source.schema_:
        case "documents":
            rows = procedural.pretraining_documents(
                source.rows, _seed(p, name), p.documents, p.pretraining_steps, p.careless
            )
        case "sharegpt":
            rows = procedural.chat_rows(source.split, source.rows, _seed(p, name))
        case "gsm8k":
            rows = (procedural.as_gsm8k(problem, "") for problem in problems)
        case "openmathreasoning":
            rows = (procedural.as_openmathreasoning(problem, "") for problem in problems)
        case "dapo":
            rows = (procedural.as_dapo(problem, "") for problem in problems)
        case schema:
            raise InputError(f"params.yaml: fetch.sources.{name}: the generator makes no {schema}: choose another schema")
    for number, row in enumerate(rows):
        yield {**row, "id": procedural.row_id(name, number)}


def _check_generator(name: str, source: Source) -> None:
    if source.rows is None or source.split is None:
        raise InputError(f"params.yaml: fetch.sources.{name}: a generator source needs rows and split")


def _seed(p: Params, name: str) -> int:
    return p.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _copy(name: str, source: Source, local_files: Path, rows: Path) -> None:
    """Copies a user's file after checking that its bytes are the ones the parameters mean."""
    if source.file is None or source.sha256 is None:
        raise InputError(f"params.yaml: fetch.sources.{name}: a local source needs file and sha256")
    path = local_files / source.file
    if not path.is_file():
        raise InputError(f"{path} is missing: put the file of source {name} there (run.local_files says where)")
    if (found := _sha256(path)) != source.sha256:
        raise InputError(
            f"{path} has sha256 {found}, params.yaml's fetch.sources.{name} wants {source.sha256}: "
            "get the right file, or write its sha256 there"
        )
    rows.parent.mkdir(parents=True, exist_ok=True)
    if source.rows is None:
        shutil.copyfile(path, rows)
    else:
        with path.open("rb") as lines, rows.open("wb") as file:
            file.writelines(line for line, _ in zip(lines, range(source.rows)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
