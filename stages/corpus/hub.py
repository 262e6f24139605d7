"""Data and models from a hub: at pinned commits only, every file checked, a half one continued where it stopped.

Files come over plain HTTP through the official client's session, which follows redirects and sends no token to another
host. The client's own download (huggingface_hub 1.33) is not used: it keeps no half file for the next process, does not
repeat a 503, and waits for as long as a server says; its faster protocol, Xet, cannot continue inside a file at all.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar

from stages.corpus.sources_lock import PinnedFile, Repository, Snapshot
from stages.harness.errors import InputError
from stages.harness.progress import MB, megabytes, progress

SIDE_BY_SIDE = 4  # files
WAITS = (1, 2, 4, 8)  # seconds before each new try, where the hub names no time
LONGEST_WAIT = 300  # seconds: the hub counts requests in windows of five minutes
ENOUGH = 2**20  # bytes: a connection that brought so many before it broke is no failed try
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be others in a moment
T = TypeVar("T")


def download(source: Snapshot, folder: Path) -> list[Path]:
    """Brings a snapshot's files into `folder`, under their names in the repository, a few side by side.

    A file is called NAME.part until its size and hash are the lock's, so a run that finds the folder of a killed one
    continues it. InputError says in one sentence what the hub refused, or which file's bytes are wrong.
    """
    parts = {name: _part(folder / name, wanted) for name, wanted in source.files.items()}
    here = sum(part.stat().st_size for part in parts.values())
    wanted = sum(file.bytes for file in source.files.values())
    started, stop, one_at_a_time = time.monotonic(), Event(), Lock()
    with progress(source.repository.id, wanted - here, "bytes") as advance, ThreadPoolExecutor(SIDE_BY_SIDE) as threads:

        def came(size: int) -> None:
            with one_at_a_time:
                advance(size)

        try:
            for ended in as_completed(
                [threads.submit(_bring, source, name, parts[name], stop, came) for name in parts]
            ):
                ended.result()
        finally:
            stop.set()  # after one file's error, the others need not come any more
    earlier = f", and {here / MB:.1f} MB of an earlier run" if here else ""
    amount = megabytes(wanted - here, time.monotonic() - started)
    print(f"{source.repository.id} at {source.commit[:12]}: files {len(parts)}, {amount}{earlier}", flush=True)
    return [folder / name for name in source.files]


def keep(file: Path, place: Path) -> None:
    """Gives a downloaded file its place among the outs without a second copy of its bytes where the disk allows that."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, place)


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` gives, asked again after failures that may pass."""
    for failures in count(1):
        try:
            return ask()
        except _client_errors() as error:
            time.sleep(pause(error, failures))


def pause(error: Exception, failures: int) -> float:
    """Seconds to wait after a failed try, as the hub asks or else a little longer each time.

    Raises the error itself where it will not pass, after too many tries, or where the hub asks for too long a wait.
    """
    import httpx

    passing = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
    status = _status(error)
    if not isinstance(error, passing) and status not in PASSING or failures > len(WAITS):
        raise error
    asked = _asked_to_wait(error)
    if asked is not None and asked > LONGEST_WAIT:
        raise error
    return WAITS[failures - 1] if asked is None else asked


@contextmanager
def one_sentence(repository: Repository, commit: str | None = None, file: str = "") -> Iterator[None]:
    """Turns the client's errors, and others that they caused, into an InputError that says what to do."""
    sound_token()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (cause := client_error(error)) is None:
            raise
        raise InputError(_sentence(cause, repository, commit, file)) from None


def sound_token() -> str | None:
    """The token that the client will send, if there is one; InputError where a library that met it would quote it in its error."""
    from huggingface_hub import get_token

    token = get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise InputError("HF_TOKEN holds characters that no token has: set it anew, or unset it")
    return token


def client_error(error: BaseException) -> BaseException | None:
    """The client's own error: this one, or one that caused it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _client_errors()):
        cause = cause.__cause__ or cause.__context__
    return cause


def _client_errors() -> tuple[type[Exception], ...]:
    """All that the client raises for what the hub, the network or a name does wrong."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    return (HfHubHTTPError, httpx.HTTPError, httpx.InvalidURL, OfflineModeIsEnabled, HFValidationError)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _asked_to_wait(error: BaseException) -> int | None:
    """The seconds that an answer asks the caller to wait: Retry-After, or the hub's own header for its limits."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = error.response.headers if _status(error) is not None else {}
    if (after := headers.get("retry-after", "").strip()).isdigit():
        return int(after)
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds if limit and limit.remaining == 0 else None


def _sentence(error: BaseException, repository: Repository, commit: str | None, file: str) -> str:
    """What went wrong and what to do; never an address with its query, nor a header, where secrets may stand."""
    from huggingface_hub import constants, errors

    hub, again = constants.ENDPOINT, f"pin again with `mathmind pin {repository.name} --update`"
    at = f"{repository} at {commit[:12]}" if commit else str(repository)
    kept = "; what has come is kept" if file else ""
    match error:
        case errors.GatedRepoError():
            return f"{repository} is gated: accept its terms at {repository.page}, then set HF_TOKEN to that account's token"
        case errors.RevisionNotFoundError():
            return f"{hub} has no commit {commit} of {repository}: {again}"
        case errors.RemoteEntryNotFoundError():
            return f"{hub} has no file {file} in {at}: {again}"
        case errors.RepositoryNotFoundError():
            return f"{hub} shows no {repository}: mend its name in params.yaml, or set HF_TOKEN to a token that may read it"
        case errors.HfHubHTTPError() if (status := _status(error)) in PASSING:
            waits = _asked_to_wait(error)
            after = (
                f"asks to wait {waits} s"
                if waits and waits > LONGEST_WAIT
                else f"still answers {status} after {len(WAITS) + 1} tries"
            )
            return f"{hub} {after} for {file or at}: try again later{kept}"
        case errors.HfHubHTTPError() if status in (401, 403):
            return f"{hub} refuses {at} ({status}): set HF_TOKEN to a valid token that may read it, or unset it"
        case errors.HfHubHTTPError():
            return f"{hub} answers {status} for {file or at}: {again}, or see whether the hub is well"
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE forbids to ask the hub: unset it"
        case errors.HFValidationError():
            return f"{repository} is no name of a repository: write owner/name"
        case _:
            reason = str(error) or type(error).__name__
            return f"{hub} is out of reach or breaks off ({reason}; {file or at}): mend the network or set HF_ENDPOINT{kept}"


def _part(place: Path, wanted: PinnedFile) -> Path:
    """Where a file lies until it is checked; one that an earlier run finished is checked again."""
    part = place.with_name(f"{place.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.replace(part)
    part.touch()
    if part.stat().st_size > wanted.bytes:
        os.truncate(part, 0)
    return part


def _bring(source: Snapshot, name: str, part: Path, stop: Event, came: Callable[[int], None]) -> None:
    """Completes one file, checks it and gives it its name; returns early where another file has failed."""
    wanted, failures = source.files[name], 0
    with one_sentence(source.repository, source.commit, name):
        while (have := part.stat().st_size) < wanted.bytes:
            try:
                _continue(source, name, part, have, stop, came)
            except _client_errors() as error:
                failures = 1 if part.stat().st_size - have >= ENOUGH else failures + 1
                stop.wait(pause(error, failures))
            if stop.is_set():
                return
    found, expected = _size_and_hash(part, wanted)
    if found != expected:
        raise _wrong(source, name, part, found, expected)
    part.replace(part.with_name(part.name.removesuffix(".part")))


def _continue(source: Snapshot, name: str, part: Path, have: int, stop: Event, came: Callable[[int], None]) -> None:
    """Asks for what is missing of a file and appends it, until all is there; raises what the client raises."""
    import httpx
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = source.files[name].bytes
    url = hf_hub_url(source.repository.id, name, repo_type=source.repository.kind, revision=source.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # of a compressed body no part can be asked for
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:
            raise _wrong(source, name, part, f"{have} bytes", f"{wanted} bytes")
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # a server that knows no ranges begins anew
            came(-have)
            have = 0
        with part.open("ab" if have else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                came(len(chunk))
                have += len(chunk)
                if have > wanted or stop.is_set():
                    return
    if have < wanted:
        raise httpx.RemoteProtocolError(f"the answer ended after {have} of {wanted} bytes")


def _size_and_hash(file: Path, wanted: PinnedFile) -> tuple[str, str]:
    """What a file is and what it must be, both in words."""
    size = file.stat().st_size
    if size != wanted.bytes:
        return f"{size} bytes or more", f"{wanted.bytes} bytes"
    with file.open("rb") as content:
        if wanted.sha256:
            return f"sha256 {hashlib.file_digest(content, 'sha256').hexdigest()}", f"sha256 {wanted.sha256}"
        git = hashlib.file_digest(content, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
        return f"git_sha1 {git.hexdigest()}", f"git_sha1 {wanted.git_sha1}"


def _wrong(source: Snapshot, name: str, part: Path, found: str, expected: str) -> InputError:
    """Deletes a file whose bytes are not the lock's, and says so."""
    part.unlink()
    return InputError(
        f"{source.repository.id}: {name} has {found}, {source.lock} wants {expected}: it is deleted; run again, and if "
        f"that gives the same, pin again with `mathmind pin {source.repository.name} --update`"
    )
