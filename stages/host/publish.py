"""`mathmind publish`: a model, its files and a card of what was measured, for a repository of a model hub.

Nothing is published that the commit here would not make again, or that a licence forbids. What is sent, and how, is in upload.py.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.host.cache import difference
from stages.host.card import card
from stages.host.graph import lock_outs
from stages.host.layout import CARD, Chosen, Part, choose, folders, parts
from stages.host.licences import forbidden
from stages.host.measured import Measured, measured
from stages.host.provenance import TIMING
from stages.host.report import REPORT
from stages.host.results import BASE_SOURCE, COMPARISON, METRICS, PREDICTIONS, SOURCES, TEST
from stages.host.upload import Published, upload
from stages.host.verify import Commit, graph_of, of_the_lock

BY_THE_WAY = (TIMING, REPORT)  # what a run writes beside its results, and may lie here changed


@dataclass(frozen=True)
class Plan:
    """What is to be published, and why it may not be."""

    model: str
    to: str
    commit: str
    files: tuple[Part, ...]  # the card last
    refusals: tuple[str, ...]

    @property
    def card(self) -> str:
        return bytes(self.files[-1].content).decode()

    def as_json(self) -> dict[str, Any]:
        files = [{"name": part.name, "bytes": part.size} for part in self.files]
        return {"model": self.model, "to": self.to, "commit": self.commit, "files": files, "refusals": list(self.refusals)}


def plan(
    tree: Path, model: str, to: str, *, adapter: bool, merged: bool, gguf: tuple[str, ...], license: str | None, read: tuple[str, ...]
) -> Plan:
    """Gathers the files, writes the card and looks for reasons not to publish; asks no hub.

    `license` is what the makers give the model under, `read` names sources whose terms they have read. Raises InputError for
    what cannot be asked for, and where there are no results.
    """
    _hold_name(to)
    commit = Commit(tree)
    with tempfile.TemporaryDirectory() as folder:
        params, graph = graph_of(commit, Path(folder))
    chosen = choose(model, params, adapter, merged, gguf)
    run = measured(tree, model, params, graph, commit)
    files = list(parts(tree, model, to, chosen, run.base_source, run.asking))
    text = card(run, to, chosen, files, license, read)
    refusals = [
        *_uncommitted(tree),
        *(f"{finding.path} ({finding.stage}) {finding.how}" for finding in of_the_lock(commit, params, graph)),
        *_not_as_locked(commit, run, chosen),
        *forbidden(run.ingredients, read),
    ]
    return Plan(model, to, commit.id, (*files, Part(CARD, text.encode())), tuple(dict.fromkeys(refusals)))


def publish(what: Plan, *, public: bool) -> Published:
    """Uploads a plan's files, to a repository that is private unless `public`; InputError with the first reason not to."""
    if what.refusals:
        more = f" (and {len(what.refusals) - 1} more: --dry-run lists them)" if len(what.refusals) > 1 else ""
        raise InputError(f"not published: {what.refusals[0]}{more}")
    message = f"{what.model}, as mathmind made it at {what.commit[:12]}"
    return upload(what.to, what.model, what.files, message, public=public)


def foretold(what: Plan, *, public: bool) -> Iterator[str]:
    """A plan in sentences: what forbids it, and its files with their bytes."""
    for refusal in what.refusals:
        yield f"would be refused: {refusal}"
    seen = "for everybody to see" if public else "private"
    yield f"{what.model} at {what.commit[:12]} to {what.to}, {seen}: {len(what.files)} files, {sum(part.size for part in what.files):,} bytes"
    for part in what.files:
        yield f"{part.size:>14,}  {part.name}"


def told(what: Plan, done: Published) -> Iterator[str]:
    """What became of a plan, in sentences."""
    if done.removed:
        yield f"removed, for it is not chosen now: {', '.join(done.removed)}"
    what_was_done = f"{len(what.files)} files, {sum(part.size for part in what.files):,} bytes" if done.changed else "nothing new"
    yield f"{done.address}: {what_was_done}, at {done.commit[:12]}, {'for everybody to see' if done.public else 'private'}"


def _hold_name(to: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to)
        if to.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise InputError(f"--to {to}: no name of a repository: write ORG/NAME, in letters, digits, - _ and .") from None


def _uncommitted(tree: Path) -> Iterator[str]:
    """A sentence where the tree is not as committed."""
    asked = ["git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all"]
    listed = subprocess.run(asked, cwd=tree, check=True, capture_output=True, text=True).stdout
    paths = [Path(entry[3:]) for entry in listed.split("\0") if entry]
    if odd := [path for path in paths if not any(path.is_relative_to(passed) for passed in BY_THE_WAY)]:
        more = f" and {len(odd) - 1} more files are" if len(odd) > 1 else " is"
        yield f"{odd[0]}{more} not as committed: commit or undo that, for the card names the commit that makes the model again"


def _not_as_locked(commit: Commit, run: Measured, chosen: Chosen) -> Iterator[str]:
    """Sentences for files that the publication needs and that are missing, or not what the committed lock says."""
    locked = lock_outs(commit.lock)
    needed = {*map(str, folders(run.model, chosen, run.base_is_here)), str(METRICS), str(COMPARISON), str(SOURCES.parent)}
    needed |= set() if run.base_is_here else {str(BASE_SOURCE.parent)}
    looked_at = [str(PREDICTIONS / f"{run.model}.jsonl"), str(TEST.parent)]  # the card's example, and how a base is asked
    for path in [*sorted(needed), *looked_at]:
        if path in needed and not (commit.tree / path).exists():
            yield f"{path} is not here: bring it with `dvc pull`, or make it with `dvc repro`"
        elif path in locked and (found := difference(commit.tree, path, locked[path])):
            yield " ".join(found)
