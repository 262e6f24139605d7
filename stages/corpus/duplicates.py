"""Rows that say or ask what an earlier row does: the same words, or nearly the same about the same numbers.

A problem with other numbers is another problem, however alike its words; so near duplicates have all their numbers in common.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache

from stages.corpus.decontamination import words

SHINGLE = 3  # words
# Rows alike in one band of their MinHashes are compared. Of pairs alike to 0.8 this misses 2 in 100,000: (1 - 0.8^5)^25.
BANDS, ROWS = 25, 5
SCHEME = "affine32"  # datasketch's name for how it hashes
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def sketch(question: str, asked: Sequence[str]) -> list[bytes]:
    """A key for each band of a question's MinHash and its numbers; near duplicates have one in common.

    `asked` holds the question's words.
    """
    minhash = _empty_minhash().copy()
    minhash.update_batch(sorted(shingle.encode() for shingle in _shingles(asked)))
    numbers = " ".join(_numbers(question)).encode()
    bands = minhash.hashvalues.reshape(BANDS, ROWS)
    return [
        hashlib.blake2b(bytes([band]) + values.tobytes() + numbers, digest_size=8).digest()
        for band, values in enumerate(bands)
    ]


class Duplicates:
    """Finds, among rows given in order, those whose words are all an earlier row's."""

    def __init__(self) -> None:
        self.first: dict[bytes, str] = {}

    def earlier(self, id: str, digest: bytes) -> str | None:
        """The id of the first row with this digest, or None and the row is remembered."""
        if digest in self.first:
            return self.first[digest]
        self.first[digest] = id
        return None


class NearDuplicates:
    """Finds, among questions given in order, those that ask nearly what an earlier one asks."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: the Jaccard similarity of two questions' shingles from which they are near duplicates."""
        self.threshold = threshold
        self.seen: list[tuple[str, str]] = []  # id and question
        self.places: dict[bytes, list[int]] = {}  # in `seen`, by band

    def earlier(self, id: str, question: str, sketched: Sequence[bytes]) -> str | None:
        """The id of the first question that this one nearly repeats, or None and the question is remembered."""
        for place in sorted({place for band in sketched for place in self.places.get(band, ())}):
            first, asked = self.seen[place]
            if _numbers(asked) == _numbers(question) and _similarity(asked, question) >= self.threshold:
                return first
        for band in sketched:
            self.places.setdefault(band, []).append(len(self.seen))
        self.seen.append((id, question))
        return None


@cache
def _empty_minhash():
    from datasketch import MinHash

    return MinHash(BANDS * ROWS, scheme=SCHEME)


def _shingles(asked: Sequence[str]) -> set[str]:
    return {" ".join(asked[start : start + SHINGLE]) for start in range(max(1, len(asked) - SHINGLE + 1))}


def _numbers(question: str) -> list[str]:
    return sorted(_NUMBER.findall(question))


def _similarity(one: str, other: str) -> float:
    """The Jaccard similarity of two questions' shingles."""
    shingles = _shingles(words(one)), _shingles(words(other))
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
