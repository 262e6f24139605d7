"""What params.yaml asks of a hub: the datasets of fetch and the model of base-model, where their kind is `hub`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.corpus.sources_lock import Pinned, Repository, SourcesLock, split_key
from stages.harness.errors import InputError

LOCK = Path("params/sources.lock.yaml")
BASE_MODEL = "base-model"  # under this name `mathmind pin` knows the model


@dataclass(frozen=True)
class HubSource:
    """One source: a configuration and split of a dataset, or a model."""

    repository: Repository
    part: str | None = None  # of a dataset, as the lock's keys are: main/test

    @property
    def stage(self) -> str:
        return "fetch" if self.repository.kind == "dataset" else BASE_MODEL

    @property
    def name(self) -> str:
        return self.repository.name

    def pinned(self, lock: SourcesLock) -> Pinned | None:
        """What the lock holds of it, if it holds the files that are needed."""
        if self.repository.kind == "model":
            return lock.models.get(self.repository.id)
        entry = lock.datasets.get(self.repository.id)
        return entry if entry and self.part in entry.files else None

    def __str__(self) -> str:
        return f"{self.repository.id} {self.part}" if self.part else self.repository.id


def hub_sources(path: Path, values: dict[str, Any]) -> list[HubSource]:
    """The hub sources of a profile, base-model last; InputError where one does not say which repository it means."""
    found = []
    for name, source in values["fetch"]["sources"].items():
        if source.get("kind") == "hub":
            repo, config, split = map(source.get, ("repo", "config", "split"))
            if not repo or not split:
                raise InputError(f"{path}: fetch.sources.{name}: a hub source needs repo and split")
            found.append(HubSource(Repository("dataset", repo, name), split_key(config, split)))
    base = values["base_model"]
    if base.get("kind") == "hub":
        if not base.get("repo"):
            raise InputError(f"{path}: base_model.repo: a hub model needs it, such as Qwen/Qwen1.5-4B")
        found.append(HubSource(Repository("model", base["repo"], BASE_MODEL)))
    return found


def in_words(pinned: Pinned) -> str:
    """The terms on which a repository is given, as its card and the hub say them."""
    more = ", ".join(word for word in (pinned.license_name, pinned.license_link) if word)
    licence = f"licence {pinned.license}" if pinned.license else "no licence named"
    gated = f", gated ({pinned.gated})" if pinned.gated else ""
    return f"{licence}{f' ({more})' if more else ''}{gated}"
