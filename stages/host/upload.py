"""Files into a repository of a model hub, in one commit, by the hub's own client.

Large files go up first, and what an interrupted run has uploaded whole is not sent again; the commit that then names them is
all or nothing.
"""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from stages.corpus.hub import client_error, sound_token
from stages.harness.errors import InputError
from stages.host.layout import OURS, Part

BY_THE_HUB = frozenset({".gitattributes"})  # in every repository that it makes


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


def upload(to: str, model: str, files: Sequence[Part], message: str, *, public: bool) -> Published:
    """Makes a repository hold these files, and makes it where there is none, private unless `public`.

    Where it holds just them already, no commit is made; what an earlier publication left there beside them goes. Raises
    InputError in one sentence for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sound_token():
        raise InputError("there is no token: set HF_TOKEN to one that may write, or run `hf auth login`")
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns where nothing has changed
    api = HfApi()
    with _one_sentence(to):
        before = _ours(api, to, model, public=public)
        names = {part.name for part in files}
        stale = sorted(name for name in before.files - names if OURS.fullmatch(name))
        content = [part.content if isinstance(part.content, bytes) else str(part.content) for part in files]
        done = api.create_commit(
            to,
            [
                *(CommitOperationAdd(part.name, at) for part, at in zip(files, content, strict=True)),
                *map(CommitOperationDelete, stale),
            ],
            commit_message=message,
            parent_commit=before.commit,
        )
        if public and before.private:
            api.update_repo_settings(to, private=False)
        return Published(f"{api.endpoint}/{to}", done.oid, done.oid != before.commit, tuple(stale), public)


@dataclass(frozen=True)
class _Before:
    """A repository as it is before the commit."""

    commit: str
    files: frozenset[str]
    private: bool


def _ours(api, to: str, model: str, *, public: bool) -> _Before:
    """The repository, made where there is none; InputError where it is somebody's work, or would show what is to be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(to)
    except RepositoryNotFoundError:
        api.create_repo(to, private=not public)
        info = api.model_info(to)
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    tags = set((info.card_data.tags if info.card_data else None) or ())
    if files > BY_THE_HUB and not {"mathmind", model} <= tags:
        raise InputError(f"{to} holds something else than {model} from here: name another repository")
    if not info.private and not public:
        raise InputError(f"{to} is public: give --public to publish there, or make it private in its settings first")
    return _Before(info.sha, files, bool(info.private))


@contextmanager
def _one_sentence(to: str) -> Iterator[None]:
    """Turns what the client raises into an InputError that says what to do; never an address with its query, nor a header."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = client_error(error)
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
            xet = " (HF_HUB_DISABLE_XET=1, where the hub knows no Xet)" if "xet" in reason else ""
            return f"{hub} is out of reach or breaks off ({reason}): mend the network or HF_ENDPOINT{xet} and run again; {kept}"
