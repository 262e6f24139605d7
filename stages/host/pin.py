"""`mathmind pin`: asks the hub once which commit, files and terms a source has now, and writes params/sources.lock.yaml.

Which files belong to a dataset's configuration and split is for the datasets library to say, by the rules of
`load_dataset`; their sizes and hashes are the hub's own.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from stages.corpus import tables
from stages.corpus.hub import one_sentence, patiently
from stages.corpus.sources_lock import (
    CONFIGS,
    DEFAULT,
    Pinned,
    PinnedDataset,
    PinnedFile,
    PinnedModel,
    Repository,
    SourcesLock,
    is_weights,
    read_lock,
    refuse_no_weights,
    refuse_own_code,
)  # fmt: skip
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.params import read_params
from stages.harness.progress import MB
from stages.host.hub_sources import LOCK, HubSource, hub_sources, in_words

BRANCH = "main"
# What transformers reads a tokenizer from; a repository holds some of them.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Where a source is pinned now, and where it was before."""

    name: str
    source: str  # the repository, and of a dataset the configuration and split
    commit: str
    before: str | None  # None where it was not pinned
    changed: bool  # whether the lock is another now
    files: int
    bytes: int
    terms: str

    def __str__(self) -> str:
        if not self.changed:
            return f"{self.name}: {self.source} stays at {self.commit[:12]}"
        moves = f"moves from {self.before[:12]} to" if self.before not in (None, self.commit) else "is pinned at"
        holds = f"files {self.files}, {self.bytes / MB:.1f} MB, {self.terms}"
        return f"{self.name}: {self.source} {moves} {self.commit[:12]}: {holds}"


def pin(tree: Path, name: str | None, *, update: bool) -> Iterator[Outcome]:
    """Pins the source of that name in params.yaml, or without a name those of every profile.

    A repository that is pinned stays at its commit, at which files that are missing are added; with `update` it moves
    to its branch's newest, with everything that is pinned of it. The lock is written after each source.
    """
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it warns of what is no fault: a card without metadata
    lock = read_lock(tree / LOCK)
    for source in _chosen(tree, name):
        with one_sentence(source.repository):
            lock, outcome = _pinned(lock, source, update)
        _write(tree / LOCK, lock)
        yield outcome


def _chosen(tree: Path, name: str | None) -> list[HubSource]:
    """The sources that are meant; where several profiles name the same files, the first of them."""
    if name:
        here = hub_sources(Path("params.yaml"), read_params(tree / "params.yaml"))
        if found := [source for source in here if source.name == name]:
            return found
        there = f"its hub sources are {', '.join(source.name for source in here)}" if here else "it has none"
        raise InputError(f"params.yaml names no hub source {name}: {there}; `mathmind pin --all` pins every profile's")
    profiles = [path for path in sorted((tree / "params").glob("*.yaml")) if path.name != LOCK.name]
    found = {}
    for path in [tree / "params.yaml", *profiles]:
        for source in hub_sources(path.relative_to(tree), read_params(path)):
            found.setdefault(str(source), source)
    return list(found.values())


def _pinned(lock: SourcesLock, source: HubSource, update: bool) -> tuple[SourcesLock, Outcome]:
    """The lock with a source in it, and what has changed."""
    repository = source.repository
    entries = lock.datasets if repository.kind == "dataset" else lock.models
    old = entries.get(repository.id)
    if old and not update:
        commit, terms = old.commit, old.terms
    else:
        commit, terms = _newest(repository)
    stays = old is not None and commit == old.commit
    outcome = partial(Outcome, source.name, str(source), commit, old.commit if old else None)
    if stays and source.pinned(lock) and terms == old.terms:
        files = old.files if repository.kind == "model" else old.files[source.part]
        return lock, outcome(False, len(files), _size(files), in_words(old))

    with one_sentence(repository, commit):
        if repository.kind == "model":
            files = _model_files(repository, commit)
            new: Pinned = PinnedModel(commit=commit, **terms, files=files)
        else:
            parts = dict(old.files) if old else {}
            for part in [source.part] if stays else sorted({source.part, *parts}):
                parts[part] = _dataset_files(repository, commit, part)
            files = parts[source.part]
            new = PinnedDataset(commit=commit, **terms, files=dict(sorted(parts.items())))
    field = "datasets" if repository.kind == "dataset" else "models"
    lock = lock.model_copy(update={field: dict(sorted({**entries, repository.id: new}.items()))})
    return lock, outcome(True, len(files), _size(files), in_words(new))


def _size(files: dict[str, PinnedFile]) -> int:
    return sum(file.bytes for file in files.values())


def _newest(repository: Repository) -> tuple[str, dict[str, Any]]:
    """The commit that the branch is at now, and the terms that the repository's card and the hub name."""
    from huggingface_hub import HfApi

    info = patiently(lambda: HfApi().repo_info(repository.id, repo_type=repository.kind, revision=BRANCH))
    card = info.card_data.to_dict() if info.card_data else {}
    license = card.get("license")
    terms = {"license": ", ".join(license) if isinstance(license, list) else license, "gated": info.gated or False}
    return info.sha, terms | {name: card[name] for name in ("license_name", "license_link") if card.get(name)}


def _dataset_files(repository: Repository, commit: str, part: str) -> dict[str, PinnedFile]:
    """The files of a configuration and split, in the order in which the datasets library reads them."""
    from datasets import load_dataset_builder
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    # The library hides what the hub refuses behind errors of its own, so that is asked first.
    card = hf_hub_url(repository.id, "README.md", repo_type="dataset", revision=commit)
    with suppress(RemoteEntryNotFoundError):
        patiently(lambda: get_hf_file_metadata(card))
    script = f"{repository.id.rpartition('/')[2]}.py"
    if _files(repository, commit, [script]):
        raise InputError(f"{repository} is read by a script ({script}), which is not run here: name a dataset of "
                         f"{', '.join(tables.SUFFIXES)} files")  # fmt: skip

    config, _, split = part.rpartition("/")
    with TemporaryDirectory() as nothing_cached:
        try:
            builder = load_dataset_builder(
                f"hf://datasets/{repository.id}",
                None if config == DEFAULT else config,
                revision=commit,
                cache_dir=nothing_cached,
            )
        except ConnectionError as error:
            raise InputError(f"{error}: mend the network, or unset HF_DATASETS_OFFLINE") from None
        except (ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).splitlines()[:2])  # an example of usage follows
            raise InputError(f"{repository} at {commit[:12]} has no {part} that can be read ({reason}): mend params.yaml's "
                             f"fetch.sources.{repository.name}") from None  # fmt: skip
    splits = builder.config.data_files or {}
    if split not in splits:
        raise InputError(f"{repository} at {commit[:12]} has no split {split}: it has {', '.join(splits)}: mend "
                         f"params.yaml's fetch.sources.{repository.name}.split")  # fmt: skip
    inside = f"hf://datasets/{repository.id}@{commit}/"
    names = [name.removeprefix(inside) for name in splits[split]]
    if other := [name for name in names if "://" in name or not name.endswith(tables.SUFFIXES)]:
        raise InputError(f"{repository} keeps {part} in {other[0]}: only {', '.join(tables.SUFFIXES)} files of its own "
                         "are read here")  # fmt: skip
    found = _files(repository, commit, names)
    return {name: found[name] for name in names}


def _model_files(repository: Repository, commit: str) -> dict[str, PinnedFile]:
    """Configuration, tokenizer and weights; InputError where they are pickles, or need code of their own."""
    from huggingface_hub import HfApi, hf_hub_download

    listed = patiently(lambda: list(HfApi().list_repo_tree(repository.id, revision=commit)))
    names = [entry.path for entry in listed]
    refuse_no_weights(f"{repository} at {commit[:12]}", names)
    with TemporaryDirectory() as folder:
        for name in set(CONFIGS).intersection(names):
            file = patiently(partial(hf_hub_download, repository.id, name, revision=commit, local_dir=folder))
            refuse_own_code(repository, name, read_json(Path(file)))
    wanted = sorted({"config.json", *filter(is_weights, names), *set(TOKENIZER).intersection(names)})
    found = _files(repository, commit, wanted)
    return {name: found[name] for name in wanted}


def _files(repository: Repository, commit: str, names: list[str]) -> dict[str, PinnedFile]:
    """Sizes and hashes of those of the named files that are there."""
    from huggingface_hub import HfApi

    listed = patiently(lambda: HfApi().get_paths_info(repository.id, names, repo_type=repository.kind, revision=commit))
    return {
        file.path: PinnedFile(bytes=file.size, sha256=file.lfs.sha256)
        if file.lfs
        else PinnedFile(bytes=file.size, git_sha1=file.blob_id)
        for file in listed
    }


def _write(path: Path, lock: SourcesLock) -> None:
    """Replaces the lock in one step; the comment that it begins with stays."""
    header = "".join(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines(True)))
    yaml = YAML()
    yaml.width = 4096  # a link or hash stays on its line
    half = path.with_suffix(".part")
    with half.open("w", encoding="utf-8") as file:
        file.write(header)
        yaml.dump(lock.model_dump(exclude_unset=True), file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
