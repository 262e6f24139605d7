"""fetch: brings every source to data/raw/, one folder each, and writes down what it got.

A source is made by the generator, copied from a file the user keeps, or downloaded from the hub at a pinned commit. Files
stay as they were published. A source none of whose first rows has what its schema needs is refused here; single rows that
lack something are left to the stages that read them, which count what they leave out.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.corpus import hub, procedural, schemas, tables
from stages.corpus.schemas import FIELDS, Unusable, read_row
from stages.corpus.sources_lock import Snapshot, pinned_dataset
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import write_json, write_rows
from stages.harness.params import StageParams

Name = Annotated[str, Field(pattern=r"^[\w-]+$")]  # it becomes a folder's
FIRST_ROWS = 100  # a source is refused where none of them is of its schema


class Source(StageParams):
    """Where one source comes from; `none` leaves it out."""

    kind: Literal["generator", "local", "hub", "none"]
    schema_: schemas.Schema = Field(alias="schema")
    rows: int | None = Field(gt=0)  # generator: how many to make; local and hub: use the first so many (null: all)
    split: str | None  # generator: pretraining, train, validation or test; hub: the dataset's split
    columns: dict[str, str] | None  # local and hub: a field of the schema -> the column that holds it, where it differs
    file: str | None  # local: the name of a .jsonl, .parquet or .csv file below run.local_files
    sha256: str | None  # local: what its bytes must be
    repo: str | None  # hub: the dataset's name; its commit stands in params/sources.lock.yaml
    config: str | None  # hub: the dataset's configuration


class Params(StageParams):
    """`numbers`, `steps` and `documents` shape what the generator makes; the last two are shares, each summing to 1."""

    seed: int
    numbers: procedural.Limits
    steps: dict[int, float]  # share of problems by number of steps
    pretraining_steps: dict[int, float]  # the same, in what the base model reads
    documents: dict[str, float]  # share of each kind of document in what the base model reads
    careless: float = Field(ge=0, le=1)  # share of the solutions in there that add in the last step where they must not
    sources: dict[Name, Source]


def run(p: Params, *, sources_lock: Path, local_files: Path, checkpoints: Path, out: Path) -> None:
    """Writes out/<source>/ with its files, and out/sources.json: of each its kind, schema, files, rows, where it is from.

    Of a generated source of problems, sources.json also counts the one-step facts (a family with its numbers) that the
    generated test shares with it; problems of more steps, or of one with large numbers, share none, by construction.
    """
    account, told = {}, {}
    pinned = {name: _pinned(name, source, sources_lock) for name, source in p.sources.items() if source.kind == "hub"}
    for name, source in p.sources.items():
        if source.kind == "none":
            continue
        folder, origin = out / name, {"revision": None}
        _check_columns(name, source)
        match source.kind:
            case "generator":
                told[name] = [] if source.schema_ in ("documents", "sharegpt") else _problems(p, name, source)
                files = ["rows.jsonl"]
                write_rows(folder / files[0], _rows(p, name, source, told[name]))
            case "local":
                files = [_copy(name, source, local_files, folder)]
            case "hub":
                files, origin = _download(pinned[name], checkpoints / name, folder)
        account[name] = _described(name, source, folder, files) | origin
    for name in [name for name in told if told[name] and "test" in told and name != "test"]:
        account[name]["one_step_facts_shared_with_test"] = procedural.shared_facts(told[name], told["test"])
    if not account:
        raise InputError("params.yaml: fetch.sources names no source: give at least one a kind other than none")
    measures.note(rows=sum(entry["rows"] for entry in account.values()))
    write_json(out / "sources.json", account)


def _described(name: str, source: Source, folder: Path, files: list[str]) -> dict[str, Any]:
    """What sources.json says of a source; InputError where it holds no row of its schema."""
    paths = [folder / file for file in files]
    rows = len(tables.Rows(paths))
    _check_first_rows(name, source, paths)
    return {
        "kind": source.kind,
        "schema": source.schema_,
        "columns": source.columns or {},
        "rows": rows if source.kind == "generator" or source.rows is None else min(rows, source.rows),
        "files": [{"name": file, "sha256": _sha256(path)} for file, path in zip(files, paths)],
    }


def _check_first_rows(name: str, source: Source, files: list[Path]) -> None:
    """A source of another schema than params.yaml says has no usable row from its first on."""
    first = list(tables.Rows(files, source.columns, FIRST_ROWS))
    read = [row if isinstance(row, Unusable) else read_row(row, source.schema_, "") for row in first]
    if not read:
        raise InputError(
            f"params.yaml: fetch.sources.{name}: {files[0].name} holds no rows: give a file with at least one"
        )
    if all(isinstance(row, Unusable) for row in read):
        held = f"its columns are {', '.join(map(repr, first[0]))}" if isinstance(first[0], dict) else "it is damaged"
        raise InputError(f"params.yaml: fetch.sources.{name}: {files[0].name}, row 1: {read[0].reason}, which schema "
                         f"{source.schema_} needs, and {held}: mend the file, the schema or columns")  # fmt: skip


def _check_columns(name: str, source: Source) -> None:
    known = {**FIELDS[source.schema_], "prompt": str, "id": str}
    if unknown := [field for field in source.columns or {} if field not in known]:
        raise InputError(f"params.yaml: fetch.sources.{name}.columns: schema {source.schema_} has no field {unknown[0]!r}: "
                         f"name one of {', '.join(FIELDS[source.schema_])}")  # fmt: skip


def _problems(p: Params, name: str, source: Source) -> list[procedural.Problem]:
    """A generated source's problems, drawn from its split with a seed of its own."""
    _check_generator(name, source)
    return procedural.problems(source.split, source.rows, _seed(p, name), p.steps, p.numbers)


def _rows(p: Params, name: str, source: Source, problems: list[procedural.Problem]) -> Iterator[dict[str, Any]]:
    """A generated source's rows in its schema, each with an id."""
    _check_generator(name, source)
    match source.schema_:
        case "documents":
            rows = procedural.pretraining_documents(
                source.rows, _seed(p, name), p.documents, p.pretraining_steps, p.numbers, p.careless
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
            raise InputError(
                f"params.yaml: fetch.sources.{name}: the generator makes no {schema}: choose another schema"
            )
    for number, row in enumerate(rows):
        yield {**row, "id": procedural.row_id(name, number)}


def _check_generator(name: str, source: Source) -> None:
    if source.rows is None or source.split is None:
        raise InputError(f"params.yaml: fetch.sources.{name}: a generator source needs rows and split")


def _seed(p: Params, name: str) -> int:
    return p.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _pinned(name: str, source: Source, lock: Path) -> Snapshot:
    """The files that the lock pins for a hub source; InputError where it pins none."""
    if source.repo is None or source.split is None:
        raise InputError(f"params.yaml: fetch.sources.{name}: a hub source needs repo and split")
    return pinned_dataset(lock, name, source.repo, source.config, source.split)


def _download(source: Snapshot, half: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Brings a hub source's files by way of `half`, where a killed run's lie; returns their names and where they are from.

    They keep the names that the repository gives them, and the order in which the datasets library reads them.
    """
    for file, path in zip(source.files, hub.download(source, half)):
        hub.keep(path, folder / file)
    return list(source.files), {"repo": source.repository.id, "revision": source.commit, **source.pinned.terms}


def _copy(name: str, source: Source, local_files: Path, folder: Path) -> str:
    """Copies a user's file after checking that its bytes are the ones the parameters mean; returns its new name."""
    if source.file is None or source.sha256 is None:
        raise InputError(f"params.yaml: fetch.sources.{name}: a local source needs file and sha256")
    path = local_files / source.file
    if not path.is_file():
        raise InputError(f"{path} is missing: put the file of source {name} there (run.local_files says where)")
    if path.suffix not in tables.SUFFIXES:
        raise InputError(
            f"params.yaml: fetch.sources.{name}.file: {source.file} must end in {', '.join(tables.SUFFIXES)}"
        )
    if (found := _sha256(path)) != source.sha256:
        raise InputError(
            f"{path} has sha256 {found}, params.yaml's fetch.sources.{name} wants {source.sha256}: "
            "get the right file, or write its sha256 there"
        )
    folder.mkdir(parents=True)
    shutil.copyfile(path, folder / f"rows{path.suffix}")
    return f"rows{path.suffix}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
