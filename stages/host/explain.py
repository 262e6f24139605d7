"""`mathmind explain`: what made an out, back to the sources: code, parameters, data, packages, machine and seed.

All of it stands in dvc.lock and in the timing record of the very run. The same can be written down as an in-toto statement
with SLSA's provenance predicate (in-toto.io/Statement/v1, slsa.dev/provenance/v1), which others can check the files against.
"""

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.host.graph import entry_deps, entry_key, entry_outs, files_of, hash_of, lock_stages
from stages.host.provenance import read_timing

STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD = "urn:mathmind:stage:1"  # a stage of dvc.yaml, run by docker/run
ABOUT_DATA = {"fetch": "sources.json", "base-model": "source.json"}  # in an out of the stage: where its data is from
LONG = 60  # characters of a parameter that are shown


@dataclass(frozen=True)
class Made:
    """An out and the run that made it, as dvc.lock and the record of that run have them."""

    path: str
    md5: str  # as DVC writes it
    stage: str
    key: str
    command: str
    parameters: dict[str, Any]  # of params.yaml, by section
    files: dict[str, str]  # code, environment and recipe that the stage read, with their MD5
    changed: tuple[str, ...]  # those that are not here as they were then
    record: dict[str, Any]  # of that run; nothing where the one that is here is another run's
    data: Any  # where the stage's data is from, with revisions; nothing but for fetch and a published base model
    inputs: tuple["Made", ...]


def explain(tree: Path, path: str) -> Made:
    """What made an out, or a file in one. Raises InputError for what no stage has written."""
    stages = lock_stages(tree)
    made = {out: (name, md5) for name, entry in stages.items() for out, md5 in entry_outs(entry).items()}
    wanted = Path(path).as_posix()
    out = next((known for known in made if wanted == known or wanted.startswith(f"{known}/")), None)
    if out is None:
        raise InputError(f"{path} is no out that dvc.lock holds: name one that dvc.yaml writes and `dvc repro` has made, such as models/grpo")
    return _made(tree, stages, made, out, {})


def _made(tree: Path, stages: dict[str, Any], made: dict[str, tuple[str, str]], out: str, known: dict[str, Made]) -> Made:
    """What made an out; `known` holds what was found before, for stages share their inputs."""
    if out in known:
        return known[out]
    name, md5 = made[out]
    entry = stages[name]
    read = entry_deps(entry)
    files = {path: then for path, then in read.items() if path not in made}
    record, key = read_timing(tree, name), entry_key(entry)
    about = ABOUT_DATA.get(name)
    known[out] = Made(
        out, md5, name, key,
        command=" ".join(entry["cmd"].split()),
        parameters=entry.get("params", {}).get("params.yaml", {}),
        files=files,
        changed=tuple(path for path, then in files.items() if not (tree / path).exists() or hash_of(tree / path) != then),
        record=record if record.get("key") == key else {},
        data=read_json(tree / out / about) if about and (tree / out / about).is_file() else {},
        inputs=tuple(_made(tree, stages, made, path, known) for path in read if path in made),
    )  # fmt: skip
    return known[out]


def as_json(made: Made) -> dict[str, Any]:
    """All of it, nested."""
    return asdict(made)


def as_tree(made: Made):
    """A rich Tree; what several stages read is told once."""
    from rich.tree import Tree

    return _grow(Tree(""), made, set()).children[0]


def _grow(tree, made: Made, told: set[str]):
    if made.path in told:
        tree.add(f"[bold]{made.path}[/] (above)")
        return tree
    told.add(made.path)
    branch = tree.add(f"[bold]{made.path}[/]  {made.md5}")
    for line in _lines(made):
        branch.add(line, highlight=False)
    for part in made.inputs:
        _grow(branch, part, told)
    return tree


def _lines(made: Made) -> Iterator[str]:
    from rich.markup import escape

    yield f"stage {escape(made.stage)}: {escape(made.command)}"
    yield f"parameters: {escape(', '.join(_flat(made.parameters)))}"
    for name, source in ({"source": made.data} if made.data and made.stage == "base-model" else made.data).items():
        said = {key: source[key] for key in ("repo", "revision", "kind", "folder", "sha256", "rows") if source.get(key) is not None}
        yield f"{escape(name)}: {escape(', '.join(_flat(said)))}"
    code = hashlib.sha256("".join(f"{path} {md5}\n" for path, md5 in sorted(made.files.items())).encode()).hexdigest()
    state = f", of which {', '.join(made.changed)} are other here now" if made.changed else ", all as they are here"
    yield f"code: {len(made.files)} files, together sha256 {code[:16]}{escape(state)}"
    if not made.record:
        yield "run: no record of it is here"
        return
    record, machine = made.record, made.record.get("machine", {})
    pinned = "packages as pinned" if record.get("pinned") else "packages NOT as pinned"
    yield escape(f"run: {record['engine']}, image {record['image']}, recipe {record['recipe']}, Python {record.get('python')}, {pinned}")
    on = [machine.get("cpu", "unknown processor"), *machine.get("gpus", ())]
    yield escape(f"on: {'; '.join(on)}; {record['seconds']:,} s; bits: {record.get('level', 'not said')}")


def _flat(values: Any, above: str = "") -> Iterator[str]:
    """`grpo.lr=0.001` for every value of nested mappings, those that are null apart."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{above}.{name}" if above else str(name))
    elif values is not None:
        text = str(values)
        yield f"{above}={text if len(text) <= LONG else text[: LONG - 3] + '...'}"


class _Part(BaseModel):
    """in-toto's ResourceDescriptor, as far as it is used here."""

    model_config = ConfigDict(extra="forbid")
    name: str
    digest: dict[str, str] = Field(min_length=1)


class _Definition(BaseModel):
    buildType: Literal[BUILD]
    externalParameters: dict[str, Any]
    internalParameters: dict[str, Any] = {}
    resolvedDependencies: list[_Part]


class _Provenance(BaseModel):
    buildDefinition: _Definition
    runDetails: dict[str, Any]


class Statement(BaseModel):
    """An in-toto statement about the files of one out."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    type: Literal[STATEMENT] = Field(alias="_type", default=STATEMENT)
    subject: list[_Part] = Field(min_length=1)
    predicateType: Literal[PREDICATE]
    predicate: _Provenance


def attest(tree: Path, path: str, file: Path) -> int:
    """Writes the statement of an out to a file and returns how many files it speaks of.

    Raises InputError where the out's files are not here, or are not what dvc.lock says.
    """
    made = explain(tree, path)
    place = tree / made.path
    if not place.exists():
        raise InputError(f"{made.path} is not here: bring it with `dvc pull` or `dvc repro`, then attest")
    if (found := hash_of(place)) != made.md5:
        raise InputError(f"{made.path} is not what dvc.lock says ({found}, not {made.md5}): `dvc checkout --force` brings that back")
    subject = [_Part(name=name, digest={"sha256": _sha256(tree / name)}) for name in _names(tree, made.path)]
    read = [_Part(name=name, digest={"md5": md5}) for name, md5 in made.files.items()]
    read += [_Part(name=part.path, digest={"dvcMd5": part.md5}) for part in made.inputs]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()
    as_committed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "dvc.lock"], cwd=tree).returncode == 0
    if commit and as_committed:
        read.append(_Part(name="repository", digest={"gitCommit": commit}))
    statement = Statement(
        subject=subject,
        predicateType=PREDICATE,
        predicate=_Provenance(
            buildDefinition=_Definition(
                buildType=BUILD,
                externalParameters={"stage": made.stage, "command": made.command, "parameters": made.parameters},
                internalParameters={name: made.record[name] for name in ("image", "recipe", "python", "pinned", "level") if name in made.record},
                resolvedDependencies=read,
            ),
            runDetails={
                "builder": {"id": f"urn:mathmind:docker/run:{made.record.get('engine', 'unknown')}"},
                "metadata": {"invocationId": made.key},
            },
        ),
    )  # fmt: skip
    write_json(file, statement.model_dump(by_alias=True))
    return len(subject)


def check(tree: Path, file: Path) -> list[str]:
    """What of a statement does not hold here, as sentences; none where all does. Raises InputError for what is no statement."""
    try:
        statement = Statement.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file} is no statement that `mathmind explain --attest` writes: {'.'.join(map(str, first['loc']))}: "
                         f"{first['msg']}") from None  # fmt: skip
    wrong = []
    for part in statement.subject:
        if Path(part.name).is_absolute() or ".." in Path(part.name).parts:
            wrong.append(f"{part.name} lies outside this folder: it is not read")
        elif not (tree / part.name).is_file():
            wrong.append(f"{part.name} is missing")
        elif (found := _sha256(tree / part.name)) != part.digest.get("sha256"):
            wrong.append(f"{part.name} has sha256 {found}, the statement says {part.digest.get('sha256')}")
    stage = statement.predicate.buildDefinition.externalParameters.get("stage")
    key = statement.predicate.runDetails.get("metadata", {}).get("invocationId")
    entry = lock_stages(tree).get(stage)
    if entry is None or entry_key(entry) != key:
        wrong.append(f"dvc.lock holds another run of {stage} than the statement is about")
    return wrong


def _names(tree: Path, out: str) -> list[str]:
    """The files of an out, relative to the tree."""
    return [out] if (tree / out).is_file() else [f"{out}/{name}" for name in files_of(tree / out)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
