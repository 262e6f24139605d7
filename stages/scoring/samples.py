"""What several sampled answers to each problem say: pass@k, and the majority's vote.

Rows are grouped by problem: each group holds one problem's answers, in the order drawn, as many for every problem.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from stages.harness.errors import InputError


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that one of k answers is right, estimated without bias from n >= k: mean of 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1, with exact integers. Raises InputError for k outside 1..n.
    """
    return _mean([1 - math.comb(len(group) - sum(group), k) / math.comb(len(group), k) for group in _checked(correct, k)])


def majority_at_k(votes: Sequence[Sequence[Hashable | None]], right: Sequence[Hashable], k: int) -> float:
    """The share of k-vote elections that the right answer wins; None is no vote, a tie goes to the answer drawn first.

    Wang et al. 2022 (arXiv 2203.11171). Of n votes, each of the n // k runs of k is an election of its own, so that no
    vote counts twice. Raises InputError for k outside 1..n.
    """
    elections = [
        winner(group[start : start + k]) == answer
        for group, answer in zip(_checked(votes, k), right, strict=True)
        for start in range(0, len(group) - k + 1, k)
    ]
    return _mean(elections)


def winner(votes: Sequence[Hashable | None]) -> Hashable | None:
    """The value with the most votes, the first drawn of several; None where nobody votes."""
    counted = Counter(vote for vote in votes if vote is not None).most_common(1)
    return counted[0][0] if counted else None


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to n, and n itself: the k at which curves are drawn."""
    return sorted({2**exponent for exponent in range(n.bit_length())} | {n})


def _checked(groups: Sequence[Sequence], k: int) -> Sequence[Sequence]:
    smallest = min(map(len, groups), default=0)
    if not 1 <= k <= smallest:
        raise InputError(f"k = {k} needs as many answers to each problem: got {smallest}")
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
