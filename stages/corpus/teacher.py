"""A teacher's answers: what is asked of it, and the replies that were kept.

`mathmind teach` asks, over the network and for money; stages only read what it kept, by the hash of the whole request. So
a rebuild calls nobody, and a changed prompt, model or temperature is another request.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.corpus.schemas import MathProblem
from stages.harness.errors import InputError
from stages.harness.jsonl import read_rows
from stages.harness.params import StageParams

REPLIES = "replies.jsonl"

Row = dict[str, Any]


class Teacher(StageParams):
    """How the teacher is asked."""

    model: str | None  # as its endpoint names it; null: there is no teacher
    system_prompt: str
    temperature: float = Field(ge=0)
    max_tokens: int = Field(gt=0)
    seed: int | None


def request_of(teacher: Teacher, problem: MathProblem) -> Row:
    """The body of the chat-completions request for a problem (OpenAI's API reference, `POST /chat/completions`)."""
    if teacher.model is None:
        raise InputError("params.yaml: preference_pairs.teacher.model is null: name the model that is to answer")
    messages = [{"role": "system", "content": teacher.system_prompt}, {"role": "user", "content": problem.question}]
    request = {
        "model": teacher.model,
        "messages": messages,
        "temperature": teacher.temperature,
        "max_tokens": teacher.max_tokens,
    }
    return request if teacher.seed is None else {**request, "seed": teacher.seed}


def key_of(request: Row) -> str:
    """The SHA-256 of a request as JSON with its keys in order."""
    written = json.dumps(request, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()


def read_replies(folder: Path) -> dict[str, Row]:
    """The replies kept in a folder, by their request's key: text, finish_reason, prompt_tokens, completion_tokens."""
    path = folder / REPLIES
    return {row["request"]: row for row in read_rows(path)} if path.is_file() else {}


def replies_to(problems: Iterable[MathProblem], teacher: Teacher, folder: Path) -> dict[str, Row]:
    """The reply to each problem, by the problem's id; InputError names the first request that has none."""
    kept, found = read_replies(folder), {}
    for problem in problems:
        key = key_of(request_of(teacher, problem))
        if key not in kept:
            raise InputError(
                f"{folder / REPLIES} has no reply to request {key[:12]} (problem {problem.id}): run `mathmind teach`"
            )
        found[problem.id] = kept[key]
    return found
