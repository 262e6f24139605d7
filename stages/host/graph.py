"""dvc.yaml as the host sees it: the resolved stages, and the key that says what a run was made of.

DVC resolves the same templates; reading them here costs milliseconds where importing DVC would cost a second a stage.
A test holds the two to the same answer.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.harness.errors import InputError

DVC = (sys.executable, "-m", "dvc")


@dataclass(frozen=True)
class GraphStage:
    """One stage of dvc.yaml with its templates resolved; paths are relative to the working folder."""

    name: str  # as DVC addresses it: merge@sft
    command: str
    desc: str
    params: tuple[str, ...]  # sections of params.yaml
    deps: tuple[str, ...]
    outs: tuple[str, ...]


def read_yaml(path: Path) -> Any:
    """A YAML 1.2 file's value; an absent file is an empty mapping."""
    return parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parse_yaml(text: str) -> Any:
    """The value of YAML 1.2 text; nothing is an empty mapping."""
    return YAML(typ="safe").load(text) or {}


def read_graph(folder: Path, params: dict[str, Any]) -> dict[str, GraphStage]:
    """The stages of folder/dvc.yaml by name, `foreach` expanded."""
    stages = {}
    for name, entry in read_yaml(folder / "dvc.yaml")["stages"].items():
        items = entry["foreach"] if "foreach" in entry else {None: None}
        for key, item in items.items():
            body = _resolve(entry["do"] if key else entry, {**params, "key": key, "item": item})
            address = f"{name}@{key}" if key else name
            stages[address] = GraphStage(
                name=address,
                command=" ".join(body["cmd"].split()),
                desc=body.get("desc", ""),
                params=tuple(body.get("params", ())),
                deps=tuple(body.get("deps", ())),
                outs=tuple(path for kind in ("outs", "metrics", "plots") for path in map(_path, body.get(kind, ()))),
            )
    return stages


def run_key(command: str, params: dict[str, Any], deps: dict[str, str]) -> str:
    """What a run is made of, as 16 hex digits: the same from a working folder and from dvc.lock."""
    made_of = json.dumps([" ".join(command.split()), params, deps], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def lock_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of folder/dvc.lock by stage; none where there is no lock."""
    return read_yaml(folder / "dvc.lock").get("stages", {})


def entry_key(entry: dict[str, Any]) -> str:
    """The key of the run that an entry of dvc.lock holds."""
    return run_key(entry["cmd"], entry.get("params", {}).get("params.yaml", {}), entry_deps(entry))


def entry_deps(entry: dict[str, Any]) -> dict[str, str]:
    """The MD5 of each dep of an entry of dvc.lock."""
    return {dep["path"]: dep["md5"] for dep in entry.get("deps", ())}


def entry_outs(entry: dict[str, Any]) -> dict[str, str]:
    """The MD5 of each out of an entry of dvc.lock."""
    return {out["path"]: out["md5"] for out in entry.get("outs", ())}


def lock_outs(stages: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The MD5 of each out of all these entries of dvc.lock."""
    return {path: md5 for entry in stages.values() for path, md5 in entry_outs(entry).items()}


def lock_keys(folder: Path) -> dict[str, str]:
    """The key of each stage's run that dvc.lock holds."""
    return {name: entry_key(entry) for name, entry in lock_stages(folder).items()}


def working_key(folder: Path, stage: GraphStage, params: dict[str, Any], lock: Mapping[str, dict[str, Any]]) -> str:
    """The key of the run that this working folder would start now, where dvc.lock has these entries.

    A dep that another stage writes has the hash that dvc.lock gives it, to which the launcher has held it; any other dep is
    small and lies in the repository, and is hashed here.
    """
    written = lock_outs(lock)
    deps = {dep: written.get(dep) or hash_of(folder / dep) for dep in stage.deps}
    return run_key(stage.command, {name: params.get(name) for name in stage.params}, deps)


def hash_of(path: Path) -> str:
    """The MD5 of a file or folder as DVC writes it."""
    if path.is_dir():
        return _hash_of_folder(path)
    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that writes it, for example with `dvc repro`")
    with path.open("rb") as file:  # of a model, gigabytes
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _hash_of_folder(folder: Path) -> str:
    """Of the list of its files' hashes and names."""
    files = files_of(folder)
    listed = [{"md5": hash_of(files[name]), "relpath": name} for name in sorted(files)]
    return f"{hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest()}.dir"


def files_of(path: Path) -> dict[str, Path]:
    """The files of an out by their path below it; of a file that is an out itself, by its name."""
    if path.is_file():
        return {path.name: path}
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}


def _path(out: str | dict[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def _resolve(value: Any, names: dict[str, Any]) -> Any:
    """`${a.b}` in every string of a nested value, keys of mappings too."""
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.-]+)\}", lambda match: str(_look_up(match[1], names)), value)
    if isinstance(value, list):
        return [_resolve(item, names) for item in value]
    if isinstance(value, dict):
        return {_resolve(key, names): _resolve(item, names) for key, item in value.items()}
    return value


def _look_up(dotted: str, names: dict[str, Any]) -> Any:
    for part in dotted.split("."):
        if not isinstance(names, dict) or part not in names:
            raise InputError(f"dvc.yaml: ${{{dotted}}} is not in params.yaml: add it or mend the name")
        names = names[part]
    return names
