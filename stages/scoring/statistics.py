"""How sure a score is, and whether two differ: intervals and tests for right-or-wrong answers to the same problems.

Written out, since scipy.stats takes a second to import and scoring has two. The tests hold each to scipy's own.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import NormalDist

from stages.harness.errors import InputError


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a proportion (Wilson 1927, JASA 22:209).

    Raises InputError for n = 0 and for more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"an interval for {successes} right of {n} does not exist: score one prediction at least")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    # At 0 and n the bound is 0 and 1; rounding would leave it a hair beside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """The two-sided exact McNemar p: is a coin fair that fell `only_a` times one way and `only_b` the other?

    The arguments count the problems that only one of two models got right. 1.0 where there are none.
    """
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**discordant)))


def paired_difference(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> dict[str, float]:
    """The accuracy of a minus that of b on the same problems, in the same order, with interval and p.

    `low` and `high` are the 95% interval for paired proportions by squaring and adding Wilson's intervals, with the
    corrected phi for the pairing: method 10 of Newcombe 1998, Statistics in Medicine 17:2635-2650. `p` is McNemar's,
    exact. The two can disagree at the edge of significance, being different methods. Raises InputError where there are
    no problems or the lists differ in length.
    """
    n = len(correct_a)
    if n == 0 or n != len(correct_b):
        raise InputError(f"a paired comparison needs the same problems for both: got {n} and {len(correct_b)}")
    both = sum(a and b for a, b in zip(correct_a, correct_b, strict=True))
    right_a, right_b = sum(map(bool, correct_a)), sum(map(bool, correct_b))
    only_a, only_b = right_a - both, right_b - both
    neither = n - both - only_a - only_b

    phi = both * neither - only_a * only_b
    if phi > 0:
        phi = max(phi - n / 2, 0)
    spread = right_a * (n - right_a) * right_b * (n - right_b)
    phi = phi / math.sqrt(spread) if spread else 0.0

    rate_a, rate_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)

    def reach(above: float, below: float) -> float:
        return math.sqrt(max(above**2 - 2 * phi * above * below + below**2, 0))

    difference = (right_a - right_b) / n
    return {
        "difference": difference,
        "low": max(-1.0, difference - reach(rate_a - low_a, high_b - rate_b)),
        "high": min(1.0, difference + reach(high_a - rate_a, rate_b - low_b)),
        "p": mcnemar_exact(only_a, only_b),
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p values adjusted for being several, by Holm's step-down method, in the order given (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
