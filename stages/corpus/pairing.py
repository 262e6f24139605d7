"""Pairs of a good and a bad answer: which problems they are made of, and whether their lengths give the good one away."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from pydantic import Field

from stages.corpus import mixing
from stages.corpus.cleaning import Checks, Cleaning
from stages.corpus.schemas import MathProblem
from stages.corpus.sources import Sources
from stages.harness.params import StageParams
from stages.scoring.answers import parse_number


class Asking(StageParams):
    """Which problems are asked: of the base by preference-pairs, of a teacher by `mathmind teach`."""

    seed: int
    clean: Checks
    questions: int = Field(gt=0)


@dataclass(frozen=True)
class Pair:
    """A question with a chosen and a rejected answer."""

    id: str
    question: str
    chosen: str
    rejected: str

    @property
    def asked(self) -> str:
        return self.question


def problems_to_ask(p: Asking, sources: Sources, account: mixing.Account, workers: int) -> list[MathProblem]:
    """The first `questions` problems, in an order that the seed decides, whose answer can be checked and has a working."""
    cleaning = Cleaning(p.clean, sources.test_questions(), account, workers)
    problems = account.keep(
        "problems",
        cleaning.keep("reasoning", sources.problems("reasoning")),
        answer_is_no_number=lambda problem: parse_number(problem.answer) is None,
        no_working=lambda problem: not problem.working,
    )
    return mixing.shuffled(problems, p.seed, "preference pairs")[: p.questions]


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Any]:
    """How far length alone tells chosen answers from rejected ones; both in tokens, pair by pair.

    `chosen_longer` is the share of pairs whose chosen answer is the longer one. `auc` is the chance that a chosen answer is
    longer than a rejected one of any pair, ties counting half (Mann and Whitney's U over both counts): 0.5 is no bias, and a
    model that only learnt length would tell them apart so often.
    """
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True))
    return {
        "chosen": {"mean": round(mean(chosen), 2), "median": median(chosen)},
        "rejected": {"mean": round(mean(rejected), 2), "median": median(rejected)},
        "difference": round(mean(chosen) - mean(rejected), 2),
        "chosen_longer": round(longer / len(chosen), 4),
        "auc": round(_auc(chosen, rejected), 4),
    }


def _auc(ones: Sequence[int], others: Sequence[int]) -> float:
    import numpy as np

    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, ones, side).sum() for side in ("left", "right"))
    return float(below + up_to) / 2 / (len(ones) * len(others))
