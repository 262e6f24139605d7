"""Keeps test questions out of training: the same question counts as the same whatever its case, spaces and marks."""

import re
import unicodedata
from collections.abc import Set

_NOT_A_WORD = re.compile(r"[^\w]+")


def fingerprint(question: str) -> str:
    """A question's words and numbers, in order: NFKC, lower case, everything else one space."""
    return _NOT_A_WORD.sub(" ", unicodedata.normalize("NFKC", question).lower()).strip()


def asked_in(question: str, fingerprints: Set[str]) -> bool:
    """Whether a question is one of those whose fingerprints are given."""
    return fingerprint(question) in fingerprints
