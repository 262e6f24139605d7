"""The intervals and tests agree with scipy, statsmodels and published examples, and cover what they promise."""

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from stages.harness.errors import InputError
from stages.scoring.statistics import holm, mcnemar_exact, paired_difference, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 100), (41, 100), (53, 100), (100, 100), (700, 1319)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys_and_statsmodels(successes, n, confidence):
    theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    theirs = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (2, 1), (-1, 5)])
def test_an_interval_needs_a_trial(successes, n):
    with pytest.raises(InputError):
        wilson(successes, n)


@pytest.mark.parametrize("rate", [0.05, 0.41, 0.53, 0.9])
@pytest.mark.parametrize("n", [100, 1319])
def test_wilson_covers_the_true_rate_95_times_in_100(rate, n):
    drawn = np.random.default_rng(1).binomial(n, rate, size=4000).tolist()
    bounds = {successes: wilson(successes, n) for successes in set(drawn)}
    covered = np.mean([bounds[successes][0] <= rate <= bounds[successes][1] for successes in drawn])
    assert 0.935 <= covered <= 0.97


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 0), (5, 5), (6, 16), (16, 6), (3, 40), (700, 619)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    assert mcnemar_exact(only_a, only_b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-10)
    theirs = mcnemar([[50, only_a], [only_b, 50]], exact=True).pvalue
    assert mcnemar_exact(only_a, only_b) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_of_no_disagreement_is_one():
    assert mcnemar_exact(0, 0) == 1


def answers_of(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    return (
        [True] * (both + only_a) + [False] * (only_b + neither),
        [True] * both + [False] * only_a + [True] * only_b + [False] * neither,
    )


@pytest.mark.parametrize(
    ("table", "difference", "low", "high"),
    [
        # Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8: Cavo et al. 2012
        ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046),
        # Altman et al., Statistics with Confidence (2000), p. 52
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),
    ],
)
def test_the_paired_interval_is_the_published_one(table, difference, low, high):
    found = paired_difference(*answers_of(*table))
    digits = 0.5 * 10.0 ** -len(str(low).partition(".")[2])
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((difference, low, high), abs=digits)
    assert found["p"] == mcnemar_exact(table[1], table[2])


def test_swapping_the_models_mirrors_the_paired_interval():
    a, b = answers_of(30, 12, 5, 53)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one["difference"] == -other["difference"] and one["p"] == other["p"]
    assert one["low"] == pytest.approx(-other["high"]) and one["high"] == pytest.approx(-other["low"])


@pytest.mark.parametrize(
    "table", [(5, 0, 0, 0), (0, 0, 0, 5), (0, 5, 0, 0), (0, 0, 5, 0), (1, 0, 0, 0), (4, 0, 0, 4), (0, 4, 4, 0)]
)
def test_extreme_tables_stay_within_one(table):
    found = paired_difference(*answers_of(*table))
    assert -1 <= found["low"] <= found["difference"] <= found["high"] <= 1


@pytest.mark.parametrize(
    ("n", "chances"), [(100, (0.35, 0.18, 0.06, 0.41)), (500, (0.4, 0.1, 0.1, 0.4)), (100, (0.02, 0.03, 0.05, 0.9))]
)
def test_the_paired_interval_covers_the_true_difference_95_times_in_100(n, chances):
    truth = chances[1] - chances[2]
    tables = np.random.default_rng(2).multinomial(n, chances, size=2000).tolist()
    intervals = [paired_difference(*answers_of(*table)) for table in tables]
    assert 0.935 <= np.mean([found["low"] <= truth <= found["high"] for found in intervals]) <= 0.985


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], []), ([True], [True, False])])
def test_a_comparison_needs_the_same_problems(a, b):
    with pytest.raises(InputError):
        paired_difference(a, b)


def test_holm_adjusts_by_rank_and_keeps_the_names():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({}) == {} and holm({"a": 0.2}) == {"a": 0.2} and holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}


def test_holm_is_statsmodels_and_between_the_raw_p_and_bonferroni():
    generator = np.random.default_rng(3)
    for size in range(1, 12):
        raw = dict(enumerate(generator.random(size) ** 3))
        adjusted = holm(raw)
        order = sorted(raw, key=raw.get)
        assert all(adjusted[first] <= adjusted[second] for first, second in zip(order, order[1:], strict=False))
        assert all(raw[name] <= adjusted[name] <= min(1, size * raw[name]) for name in raw)
        theirs = multipletests(list(raw.values()), method="holm")[1]
        assert list(adjusted.values()) == pytest.approx(theirs, abs=1e-12)
