"""What does not belong in training: rows that hold the test's questions, duplicates, damaged chats, wrong answers.

Every check runs on every row and is counted; a switch says whether what it finds is dropped, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from stages.corpus import schemas
from stages.corpus.decontamination import TestQuestions, words
from stages.corpus.duplicates import Duplicates, NearDuplicates, sketch
from stages.corpus.mixing import Account
from stages.corpus.schemas import Conversation, MathProblem, Preference, Unusable
from stages.harness.errors import InputError
from stages.harness.params import StageParams
from stages.harness.workers import in_order
from stages.scoring.answers import equal, extract_strict, parse_number

Source = TypeVar("Source", MathProblem, Conversation, Preference)


class Checks(StageParams):
    """The switches: true drops what a check finds, false only counts it."""

    turns: bool  # a chat with an empty turn, or turns out of order
    wrong_gold: bool  # a solution whose own last answer is another number than its gold answer
    asked_in_the_test: bool  # the same words as a question of the test
    shares_words_with_the_test: bool  # so many words in a row of a question of the test, anywhere in the row
    duplicate: bool  # the same words as an earlier row of its source, answer included
    near_duplicate: bool  # asks nearly what an earlier row of its source asks, about the same numbers
    words_shared: int = Field(gt=0)  # in a row
    similarity: float = Field(gt=0, le=1)  # of near duplicates: Jaccard, of runs of three words

    def only_counted(self) -> set[str]:
        """The checks that are switched off."""
        return {name for name, value in self if value is False}


@dataclass(frozen=True)
class Facts:
    """What the checks need to know of a row, which any process can find."""

    turns: str | None  # what is wrong with them
    wrong_gold: bool
    asked_in: str | None  # the test question that it asks
    shares_with: str | None  # the test question that it shares words with
    digest: bytes  # of its words
    bands: list[bytes]  # of its question, for near duplicates


@dataclass(frozen=True)
class Looked:
    """A row and its facts."""

    row: Any
    facts: Facts

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def asked(self) -> str:
        return self.row.asked


class Cleaning:
    """The checks of one stage, with the test that they guard and the account that they fill."""

    def __init__(self, checks: Checks, test: Mapping[str, str], account: Account, workers: int) -> None:
        """`test`: its questions by id."""
        self.checks, self.account, self.workers = checks, account, workers
        self.test = TestQuestions(test, checks.words_shared)
        sketch("", [])  # its library takes a second to import: here, or in each process

    def keep(self, source: str, rows: Sequence[Source | Unusable], most: int | None = None) -> list[Source]:
        """The rows of a source that pass every check, in their order; the first `most`, InputError where there are fewer."""
        looked = (
            row if facts is None else Looked(row, facts) for row, facts in in_order(self._facts, rows, self.workers)
        )
        duplicates, near = Duplicates(), NearDuplicates(self.checks.similarity)
        kept = self.account.keep(
            source,
            looked,
            only_counted=self.checks.only_counted(),
            most=most,
            turns=lambda look: look.facts.turns,
            wrong_gold=lambda look: look.facts.wrong_gold,
            asked_in_the_test=lambda look: look.facts.asked_in,
            shares_words_with_the_test=lambda look: look.facts.shares_with,
            duplicate=lambda look: duplicates.earlier(look.id, look.facts.digest),
            near_duplicate=lambda look: near.earlier(look.id, look.asked, look.facts.bands),
        )
        self.account.used(source, rows=len(rows))
        if most is not None and len(kept) < most:
            raise InputError(f"{most} rows of the source {source} are needed and {len(kept)} of its {len(rows)} can be used: "
                             "fetch more of it")  # fmt: skip
        return [look.row for look in kept]

    def _facts(self, row: Source | Unusable) -> Facts | None:
        if isinstance(row, Unusable):
            return None
        asked, said = words(row.asked), words(row.said)
        return Facts(
            turns=schemas.turn_fault(row.messages) if isinstance(row, Conversation) else None,
            wrong_gold=isinstance(row, MathProblem) and _is_wrong(row),
            asked_in=self.test.asked_in(asked),
            shares_with=self.test.shares_with(said),
            digest=hashlib.sha256(" ".join(said).encode()).digest(),
            bands=sketch(row.asked, asked),
        )


def _is_wrong(problem: MathProblem) -> bool:
    """Whether a solution declares a number and its gold answer is another."""
    declared, gold = extract_strict(problem.solution), parse_number(problem.answer)
    return (
        gold is not None and declared is not None and parse_number(declared) is not None and not equal(declared, gold)
    )
