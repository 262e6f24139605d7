"""Typed parameters: what params.yaml may say, and how a stage gets its part of it.

A stage declares a subclass of StageParams; the section of params.yaml that carries the stage's name fills it, and the
top-level `seed` joins it where the subclass asks for one and the section has none of its own (null). Unknown keys and
wrong types are refused by name.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.harness.errors import InputError

STAGES = (
    "fetch", "base-model", "prepare-mix", "preference-pairs", "sft", "qlora", "grpo", "orpo",
    "merge", "gguf-export", "eval", "eval-gguf", "compare",
)  # fmt: skip
IMAGES = ("cpu", "train", "rollout", "export")


def section_of(stage: str) -> str:
    """`gguf-export` in dvc.yaml and commands is `gguf_export` in YAML and Python."""
    return stage.replace("-", "_")


SECTIONS = ("profile", "seed", "run", "images", *map(section_of, STAGES), "tracking")


class StageParams(BaseModel):
    """The parameters of one stage: immutable, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(StageParams):
    """`run:`, how stages are run and never what they make: no stage lists it, so changing it re-runs nothing."""

    engine: Literal["native", "docker", "podman", "apptainer"]
    gpus: int = Field(ge=0)
    processes: int | None = Field(gt=0)  # of a machine, that train one model together; null: one a GPU, or one
    nodes: int = Field(gt=0)  # machines that train together
    rollout_gpus: int | None = Field(ge=0)  # of the GPUs, that grpo's engines have alone; 0: each beside a trainer; null: as memory allows
    rendezvous: str | None = Field(pattern=r"^[^\s:/]+:\d+$")  # host:port of the first machine, where there are several
    sharded: bool | None  # do they share the frozen base out, which is else whole in each; null: where it does not fit a GPU
    workers: int | None = Field(gt=0)  # processes of a stage that can use several; null: one a core
    memory: str | None  # a container's limit, such as 12g
    scratch: str | None  # where stages write before their outs are moved; default: .dvc/tmp/mathmind
    local_files: str  # where sources of kind `local` are found, from the main repository
    unpinned: bool  # take variables of docker/determinism.env from the caller's environment where it has them; the record says so


class Images(StageParams):
    """`images:`, which image plays each role."""

    train: Literal[IMAGES]
    rollout: Literal[IMAGES]
    export: Literal[IMAGES]


Section = TypeVar("Section", bound=BaseModel)


def read_params(path: Path) -> dict[str, Any]:
    """The whole of a params file, with its top-level keys checked.

    YAML 1.2, so that `1e-5` and the `1e-05` that `dvc exp run -S` writes are numbers.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: copy a profile there, for example `cp params/embedded.yaml {path}`")
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{path}{where}: {problem}: mend the line") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    for key in values:
        if key not in SECTIONS:
            raise InputError(f"{path}: unknown section {key!r}: expected one of {', '.join(SECTIONS)}")
    return values


def _parsed(text: str) -> Any:
    """By libyaml, which takes a tenth of a second less; what it refuses is left to ruamel's own parser, which says better where."""
    try:
        return YAML(typ="safe").load(text)
    except YAMLError:
        return YAML(typ="safe", pure=True).load(text)


def section(path: Path, values: dict[str, Any], name: str, model: type[Section]) -> Section:
    """One section as its model, or InputError that names the file, the key, what was found and what is expected."""
    if name not in values:
        raise InputError(f"{path}: section {name} is missing: every profile under params/ shows it")
    found = values[name] if values[name] is not None else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: {name} must be a mapping, found {found!r}")
    if "seed" in model.model_fields and found.get("seed") is None and "seed" in values:
        found = {**found, "seed": values["seed"]}
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(name, error)}") from None


def _first_problem(name: str, error: ValidationError) -> str:
    """The first of pydantic's complaints as one sentence, and how many more there are."""
    first, *others = error.errors()
    key = ".".join([name, *map(str, first["loc"])]) if first["loc"] else name
    match first["type"]:
        case "extra_forbidden":
            problem = f"unknown parameter {key}: remove it or mend its spelling"
        case "missing":
            problem = f"parameter {key} is missing: every profile under params/ shows it"
        case _:
            problem = f"{key} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return problem + (f" (and {len(others)} more)" if others else "")
