"""`mathmind teach`: asks a teacher the problems that preference-pairs needs answers to, and keeps every reply.

The endpoint speaks OpenAI's chat-completions API; its official client waits and asks again after passing faults, as long as
the server says. A reply is on the disk before the next is asked for, so an interrupted run has lost nothing and the next one
asks only for what is missing.
"""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from stages.corpus import mixing
from stages.corpus.pairing import Asking, problems_to_ask
from stages.corpus.sources import Sources
from stages.corpus.teacher import REPLIES, Row, Teacher, key_of, read_replies, request_of
from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows, write_rows
from stages.harness.params import StageParams, read_params, section
from stages.harness.progress import progress
from stages.host.graph import DVC

FOLDER = Path("data/teacher")
PART = Path(".dvc/tmp/mathmind/teach") / REPLIES  # what a killed run had
RETRIES = 6  # the client's own: half a second, doubled each time, or as the server says
TIMEOUT = 600  # seconds for one reply
KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"


@dataclass(frozen=True)
class Lesson:
    """What a run asked and has: replies asked for and had before, and tokens of the new ones."""

    asked: int
    had: int
    prompt_tokens: int
    completion_tokens: int
    cut_off: int  # new replies that ended at max_tokens

    def cost(self, price_in: float, price_out: float) -> float:
        """Dollars, at prices for a million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


def teach(folder: Path, base_url: str | None, concurrency: int, limit: int | None) -> Lesson:
    """Asks what is missing, at most `limit` requests; then writes the replies in their keys' order and gives them to DVC.

    Raises InputError where there is no key, no data/raw, or the endpoint refuses.
    """
    if not os.environ.get(KEY):
        raise InputError(f"{KEY} is not set: set it to the endpoint's key (any text where it asks for none)")
    kept = read_replies(folder / FOLDER)
    part = folder / PART
    part.parent.mkdir(parents=True, exist_ok=True)
    kept |= _replies_in(part)
    requests = needed_requests(folder)
    missing = [key for key in requests if key not in kept][:limit]
    new: list[Row] = []
    try:
        for row in _ask({key: requests[key] for key in missing}, base_url, concurrency, _writer(part)):
            new.append(row)
    finally:
        kept |= _replies_in(part)  # after an error too those that were still under way
        if kept:
            _write(folder, kept)
            part.unlink(missing_ok=True)
    return Lesson(
        asked=len(new),
        had=len(requests) - len([key for key in requests if key not in kept]) - len(new),
        prompt_tokens=sum(row["prompt_tokens"] for row in new),
        completion_tokens=sum(row["completion_tokens"] for row in new),
        cut_off=sum(row["finish_reason"] == "length" for row in new),
    )


def needed_requests(folder: Path) -> dict[str, Row]:
    """The requests of the problems that preference-pairs asks, by key, in the order of the problems."""
    path, raw = folder / "params.yaml", folder / "data/raw"
    values = read_params(path)
    if not (raw / "sources.json").is_file():
        raise InputError("data/raw is missing: run `dvc repro fetch`, or bring it with `dvc pull`")
    own = values["preference_pairs"]
    asking = section(path, {**values, "preference_pairs": {name: own.get(name) for name in ("seed", "clean", "questions")}},
                     "preference_pairs", Asking)  # fmt: skip
    teacher = section(path, values, "preference_pairs", _Taught).teacher
    problems = problems_to_ask(asking, Sources(raw), mixing.Account(), os.cpu_count() or 1)
    requests = [request_of(teacher, problem) for problem in problems]
    return {key_of(request): request for request in requests}


class _Taught(StageParams, extra="ignore"):
    teacher: Teacher


def _replies_in(part: Path) -> dict[str, Row]:
    """The replies that a run kept, by key; what a full disk or a kill left of a last line is cut off."""
    if not part.is_file():
        return {}
    os.truncate(part, part.read_bytes().rfind(b"\n") + 1)
    return {row["request"]: row for row in read_rows(part)}


def _writer(part: Path) -> Callable[[Row], None]:
    """Puts a reply on the disk, once it returns for good."""
    one_at_a_time = Lock()

    def write(row: Row) -> None:
        with one_at_a_time, part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    return write


def _ask(requests: dict[str, Row], base_url: str | None, concurrency: int, keep: Callable[[Row], None]):
    """Yields the reply to each request as it comes, already kept; after an error asks no more."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, max_retries=RETRIES, timeout=TIMEOUT)
    address = str(client.base_url).rstrip("/")

    def one(key: str) -> Row:
        row = _reply(client, address, key, requests[key])
        keep(row)
        return row

    with progress("teach", len(requests)) as advance, ThreadPoolExecutor(concurrency) as threads:
        waiting = [threads.submit(one, key) for key in requests]
        try:
            for ended in as_completed(waiting):
                yield ended.result()
                advance(1)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _reply(client, address: str, key: str, request: Row) -> Row:
    import openai

    try:
        answer = client.chat.completions.create(**request)
    except openai.AuthenticationError:
        raise InputError(f"{address} refuses the key: set {KEY} to a valid one") from None
    except openai.NotFoundError:
        raise InputError(f"{address} has no model {request['model']!r} or is no such endpoint: mend preference_pairs.teacher.model "
                         f"in params.yaml, or {ADDRESS}") from None  # fmt: skip
    except openai.APIConnectionError:
        raise InputError(
            f"{address} is out of reach: mend the network, or {ADDRESS} (--base-url); what has come is kept"
        ) from None
    except openai.APIStatusError as error:
        raise InputError(f"{address} answers {error.status_code} to request {key[:12]}, after {RETRIES} more tries where that could "
                         "pass: try again later, or mend preference_pairs.teacher; what has come is kept") from None  # fmt: skip
    text = answer.choices[0].message.content if answer.choices else None
    if not text or not text.strip():
        raise InputError(
            f"{address} answers request {key[:12]} without text: choose another model; what has come is kept"
        )
    usage = answer.usage
    return {
        "request": key,
        "text": text,
        "finish_reason": answer.choices[0].finish_reason,
        "model": answer.model,
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
    }


def _write(folder: Path, kept: dict[str, Row]) -> None:
    """Writes the replies in their keys' order, whole or not at all, and has DVC keep them."""
    path = folder / FOLDER / REPLIES
    new = path.with_name(f"{REPLIES}.new")
    write_rows(new, (kept[key] for key in sorted(kept)))
    new.replace(path)
    added = [*DVC, "add", "--quiet", str(FOLDER / REPLIES)]
    done = subprocess.run(added, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"`dvc add {FOLDER / REPLIES}` failed ({done.stderr.strip().splitlines()[-1]}): run it yourself; "
                         "the replies are there")  # fmt: skip
