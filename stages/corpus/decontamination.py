"""Keeps test questions out of training: words and numbers count, whatever their case, spaces and marks.

Two ways to be alike: the whole question (GPT-2's contamination study and after), or so many words in a row (13 in Brown et
al. 2020, "Language Models are Few-Shot Learners", appendix C).
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse in 64 bits
_BITS = 22  # of a hash, by which runs of the test are looked up: a table of 4 MB, with few others in it


def words(text: str) -> list[str]:
    """A text's words and numbers, in order: NFKC, lower case, without marks."""
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


class TestQuestions:
    """The questions of a test, to be looked for in other texts."""

    __test__ = False  # no test of ours, whatever pytest makes of the name

    def __init__(self, questions: Mapping[str, str], run: int) -> None:
        """`questions` by id; `run` is how many words in a row make a text alike."""
        self.run = run
        self.whole: dict[tuple[str, ...], str] = {}
        self.runs: dict[tuple[str, ...], str] = {}
        for id, question in questions.items():
            asked = tuple(words(question))
            self.whole.setdefault(asked, id)
            for start in range(len(asked) - run + 1):
                self.runs.setdefault(asked[start : start + run], id)
        self.numbers = {word: _number(word) for asked in self.runs for word in asked}
        self.table = self._table()

    def asked_in(self, asked: Sequence[str]) -> str | None:
        """The id of the test question with exactly these words, or None."""
        return self.whole.get(tuple(asked))

    def shares_with(self, text: Sequence[str]) -> str | None:
        """The id of a test question that has `run` words in a row in common with a text, or None."""
        for start in self._candidates(text):
            if found := self.runs.get(tuple(text[start : start + self.run])):
                return found
        return None

    def _candidates(self, text: Sequence[str]) -> list[int]:
        """Where in a text a run of the test may stand: by hash, so that texts of thousands of words take a millisecond."""
        if len(text) < self.run:
            return []
        return self.table[self._hashes(text)].nonzero()[0].tolist()

    def _table(self):
        """Which hashes are those of a run of the test."""
        import numpy as np

        table = np.zeros(2**_BITS, dtype=bool)
        for asked in self.runs:
            table[self._hashes(asked)] = True
        return table

    def _hashes(self, text: Sequence[str]):
        """The first bits of a polynomial hash of each run in a text (Karp and Rabin 1987), rolled by sums of powers."""
        import numpy as np

        numbers = np.fromiter(map(self.numbers.get, text, repeat(0)), dtype=np.uint64, count=len(text))
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(numbers * _powers(_BASE, len(text)))))
        starts = len(text) - self.run + 1
        return (sums[self.run :] - sums[:starts]) * _powers(pow(_BASE, -1, 2**64), starts) >> np.uint64(64 - _BITS)


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def _powers(base: int, count: int):
    """The first so many powers of a number, from 0 on, in 64 bits."""
    return _all_powers(base, 1 << count.bit_length())[:count]


@cache
def _all_powers(base: int, count: int):
    import numpy as np

    return np.cumprod(np.array([1] + [base] * (count - 1), dtype=np.uint64))
