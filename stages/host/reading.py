"""A model's text as a reader wants it: the working apart from the answer, also while it is still being written."""

import re
from typing import NamedTuple

from stages.corpus.marks import ANY_STOP, SOLUTION_START, TAGS
from stages.scoring.answers import find_declaration, until_stop

_OPENING = re.compile(rf"{SOLUTION_START}|\\(?:boxed|fbox)\s*{{|####")
_MARKS = (*TAGS, *ANY_STOP, r"\boxed{", r"\fbox{", "####")
_TAG = re.compile("|".join(map(re.escape, TAGS)))


class Reading(NamedTuple):
    """`answer` is what the model declares, or has begun to where it is still writing; None where it declares nothing."""

    working: str
    answer: str | None


def read(text: str, ended: bool = True) -> Reading:
    """Parts a model's text into working and answer, without the marks of either.

    A whole text's answer is the one that scoring reads (see find_declaration). Of a text that has not ended, a declaration
    that is open counts too, and a mark of which only the beginning is there is held back.
    """
    text = until_stop(text) if ended else _without_begun_mark(until_stop(text))
    found = find_declaration(text)
    opened = None if ended else _open_declaration(text, found.end if found else 0)
    if opened:
        return Reading(_plain(text[: opened.start()]), _TAG.sub("", text[opened.end() :]).strip())
    if found:
        return Reading(_plain(text[: found.start] + text[found.end :]), found.answer.strip())
    return Reading(_plain(text), None)


def _open_declaration(text: str, start: int) -> re.Match[str] | None:
    """The opening of a declaration that has not closed yet."""
    for opening in _OPENING.finditer(text, start):
        if opening[0] != "####" or "\n" not in text[opening.end() :]:  # a heading ended with its line
            return opening
    return None


def _without_begun_mark(text: str) -> str:
    """The text up to a mark whose first letters it ends in."""
    if text.endswith(_MARKS):
        return text
    for length in range(max(map(len, _MARKS)) - 1, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in _MARKS if len(mark) > length):
            return text[:-length]
    return text


def _plain(working: str) -> str:
    return _TAG.sub("", working).strip()
