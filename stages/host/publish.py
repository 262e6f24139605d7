"""`mathmind publish`: a model, its files and a card of what was measured, in a repository of a model hub.

One commit holds all of it, made by the hub's own client: large files are uploaded first, and what an interrupted run has
uploaded whole is not sent again. Nothing is published that the commit here would not make again, or that a licence forbids.
"""

import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.harness.errors import InputError
from stages.host.cache import difference
from stages.host.card import Made, card, made
from stages.host.graph import lock_outs
from stages.host.layout import CARD, OURS, Chosen, Part, choose, folders, parts
from stages.host.licences import forbidden
from stages.host.provenance import TIMING
from stages.host.report import REPORT
from stages.host.results import BASE_SOURCE, COMPARISON, METRICS, PREDICTIONS, SOURCES, TEST
from stages.host.verify import Commit, graph_of, of_the_lock

OURS_TOO = ".gitattributes"  # in every repository that a hub makes
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


@dataclass(frozen=True)
class Published:
    """What became of it."""

    address: str
    commit: str  # of the hub's repository
    changed: bool
    removed: tuple[str, ...]  # files of an earlier publication that were not chosen now
    public: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
    run = made(tree, model, params, graph, commit)
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
    """Uploads a plan's files in one commit, to a repository that is made where there is none, private unless `public`.

    Where the repository holds just that already, no commit is made. Raises InputError with the first reason not to publish,
    and in one sentence for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if what.refusals:
        more = f" (and {len(what.refusals) - 1} more: --dry-run lists them)" if len(what.refusals) > 1 else ""
        raise InputError(f"not published: {what.refusals[0]}{more}")
    token = get_token()
    if not token:
        raise InputError("there is no token: set HF_TOKEN to one that may write, or run `hf auth login`")
    if not (token.isascii() and token.isprintable()):  # a library that met it would quote it in its error
        raise InputError("HF_TOKEN holds characters that no token has: set it anew")
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns where nothing has changed
    api = HfApi()
    with _one_sentence(what.to):
        before = _ours(api, what, public=public)
        names = {part.name for part in what.files}
        stale = sorted(name for name in before.files - names if OURS.fullmatch(name))
        content = [part.content if isinstance(part.content, bytes) else str(part.content) for part in what.files]
        done = api.create_commit(
            what.to,
            [
                *(CommitOperationAdd(part.name, at) for part, at in zip(what.files, content, strict=True)),
                *map(CommitOperationDelete, stale),
            ],
            commit_message=f"{what.model}, as mathmind made it at {what.commit[:12]}",
            parent_commit=before.commit,
        )
        if public and before.private:
            api.update_repo_settings(what.to, private=False)
        return Published(f"{api.endpoint}/{what.to}", done.oid, done.oid != before.commit, tuple(stale), public)


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


@dataclass(frozen=True)
class _Before:
    """A repository as it is before the commit."""

    commit: str
    files: frozenset[str]
    private: bool


def _ours(api, what: Plan, *, public: bool) -> _Before:
    """The repository, made where there is none; InputError where it is somebody's work, or would show what is to be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(what.to)
    except RepositoryNotFoundError:
        api.create_repo(what.to, private=not public)
        info = api.model_info(what.to)
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    tags = set((info.card_data.tags if info.card_data else None) or ())
    if files > {OURS_TOO} and not {"mathmind", what.model} <= tags:
        raise InputError(f"{what.to} holds something else than {what.model} from here: name another repository")
    if not info.private and not public:
        raise InputError(f"{what.to} is public: give --public to publish there, or make it private in its settings first")
    return _Before(info.sha, files, bool(info.private))


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


def _not_as_locked(commit: Commit, run: Made, chosen: Chosen) -> Iterator[str]:
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


@contextmanager
def _one_sentence(to: str) -> Iterator[None]:
    """Turns what the client raises into an InputError that says what to do; never an address with its query, nor a header."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (HfHubHTTPError, httpx.HTTPError, httpx.InvalidURL, OfflineModeIsEnabled)):
            cause = cause.__cause__ or cause.__context__
        if cause is None and not isinstance(error, (RuntimeError, OSError, ValueError)):  # Xet, the client's faster protocol; an odd answer
            raise
        raise InputError(_sentence(cause or error, to, " ".join(str(error).split()))) from None


def _sentence(error: BaseException, to: str, told: str) -> str:
    from huggingface_hub import constants, errors

    hub, kept = constants.ENDPOINT, "what has been uploaded whole is not sent again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE forbids to ask the hub: unset it"
        case errors.HfHubHTTPError() if status in (401, 403, 404):
            return f"{hub} refuses {to} ({status}): set HF_TOKEN to a valid token that may write there, or mend the name"
        case errors.HfHubHTTPError() if status == 400 and told.startswith("Invalid metadata"):
            return f"{hub} does not take the card ({told}): mend --license, or what params.yaml says"
        case errors.HfHubHTTPError() if status == 412:
            return f"{to} has been changed by somebody else meanwhile: look at it, then run again"
        case errors.HfHubHTTPError():
            return f"{hub} answers {status} for {to}: run again when the hub is well; {kept}"
        case ValueError():
            return f"{hub} does not answer as a hub does: mend HF_ENDPOINT, or run again; {kept}"
        case _:
            reason = re.sub(r"\?\S*", "", str(error)) or type(error).__name__
            return f"{hub} is out of reach or breaks off ({reason}): mend the network or HF_ENDPOINT and run again; {kept}"
