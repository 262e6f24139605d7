"""params/sources.lock.yaml: of every hub source its commit, its terms, and the size and hash of each file.

`mathmind pin` writes it (stages/host/pin.py); stages read it, and take nothing from a hub that it does not hold.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.corpus import tables
from stages.harness.errors import InputError
from stages.harness.params import StageParams

MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # no pickle, no code
DEFAULT = "default"  # the configuration of a dataset that is asked for by no name
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # in which models were kept; reading one runs what it says
CONFIGS = ("config.json", "tokenizer_config.json")  # where a model may ask for code of its own
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # one file, or several and their index


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError("a file's name must lead into its repository")
    return name


def _ending_in(endings: tuple[str, ...]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if not name.endswith(endings):
            raise ValueError(f"only {', '.join(endings)} are taken")
        return name

    return check


TableName = Annotated[str, AfterValidator(_inside), AfterValidator(_ending_in(tables.SUFFIXES))]
ModelFileName = Annotated[str, AfterValidator(_inside), AfterValidator(_ending_in(MODEL_FILES))]


class PinnedFile(StageParams):
    """What a file's bytes must be: the hub keeps small files in git, under git's hash, and large ones under SHA-256."""

    bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    git_sha1: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")

    @model_validator(mode="after")
    def _one_hash(self) -> "PinnedFile":
        if (self.sha256 is None) == (self.git_sha1 is None):
            raise ValueError("a file has either sha256 or git_sha1")
        return self


class Pinned(StageParams):
    """A repository at one commit, and on what terms it is given."""

    commit: str = Field(pattern="^[0-9a-f]{40}$")
    license: str | None  # as its card says; null: it does not
    license_name: str | None = None  # where `license` is `other`
    license_link: str | None = None
    gated: Literal[False, "auto", "manual"]  # whether terms must be accepted first

    @property
    def terms(self) -> dict[str, Any]:
        """license, gated and, where the licence has a name of its own, license_name and license_link."""
        return self.model_dump(include={"license", "license_name", "license_link", "gated"}, exclude_unset=True)


class PinnedDataset(Pinned):
    """The files of each configuration and split that a profile names, such as main/test."""

    files: dict[str, dict[TableName, PinnedFile]]


class PinnedModel(Pinned):
    """Weights as safetensors, configuration and tokenizer."""

    files: dict[ModelFileName, PinnedFile]


class SourcesLock(StageParams):
    """params/sources.lock.yaml: repositories by name."""

    datasets: dict[str, PinnedDataset] = {}
    models: dict[str, PinnedModel] = {}


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, and the name under which `mathmind pin` knows it."""

    kind: Literal["dataset", "model"]
    id: str
    name: str

    @property
    def page(self) -> str:
        """Its address for a reader."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository that one source needs, as the lock pins them."""

    repository: Repository
    pinned: Pinned
    files: dict[str, PinnedFile]
    lock: Path

    @property
    def commit(self) -> str:
        return self.pinned.commit


def read_lock(path: Path) -> SourcesLock:
    """The lock, or InputError that names the file and the key or line."""
    try:
        return SourcesLock.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        problem = "is missing"
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1 if mark else 1}: {getattr(error, 'problem', None) or 'not valid YAML'}"
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "all of it"
        found = "" if first["type"] in ("missing", "extra_forbidden") else f" is {first['input']!r}"
        problem = f"{key}{found}: {first['msg'].removeprefix('Value error, ')}"
    raise InputError(f"{path}: {problem}: restore it from git, or remove what is wrong and run `mathmind pin --all`")


def split_key(config: str | None, split: str) -> str:
    """How the lock names the files of a dataset's configuration and split."""
    return f"{config or DEFAULT}/{split}"


def pinned_dataset(lock: Path, name: str, repo: str, config: str | None, split: str) -> Snapshot:
    """The pinned files of a configuration and split of a dataset; `name` is the source's in params.yaml."""
    entry, key = read_lock(lock).datasets.get(repo), split_key(config, split)
    if entry is None or key not in entry.files:
        raise InputError(f"{lock} pins no commit of {repo} {key}: run `mathmind pin {name}`")
    return Snapshot(Repository("dataset", repo, name), entry, entry.files[key], lock)


def pinned_model(lock: Path, repo: str) -> Snapshot:
    """The pinned files of base-model's model."""
    entry = read_lock(lock).models.get(repo)
    if entry is None:
        raise InputError(f"{lock} pins no commit of {repo}: run `mathmind pin base-model`")
    return Snapshot(Repository("model", repo, "base-model"), entry, entry.files, lock)


def is_weights(name: str) -> bool:
    """Whether a file of a model's repository holds its weights, or says which of several files holds which."""
    return WEIGHTS.fullmatch(name) is not None


def refuse_own_code(model: Repository | str, file: str, value: dict[str, Any]) -> None:
    """InputError where a model's JSON file asks for code from its repository (`trust_remote_code`), which never runs here."""
    if "auto_map" in value:
        raise InputError(f"{model} needs code of its own (auto_map in {file}), which is not run here: name a model in "
                         "params.yaml's base_model that transformers itself knows")  # fmt: skip


def refuse_no_weights(model: str, names: Collection[str]) -> None:
    """InputError where a model's files are no weights, or weights as pickles alone, or lack a configuration."""
    if not any(map(is_weights, names)):
        pickles = [name for name in names if name.endswith(PICKLES)]
        holds = (
            f"its weights as pickles only ({pickles[0]}), which run code when they are read"
            if pickles
            else "no weights"
        )
        raise InputError(f"{model} holds {holds}: name a model with model.safetensors")
    if "config.json" not in names:
        raise InputError(f"{model} holds no config.json: name a model that transformers reads")
