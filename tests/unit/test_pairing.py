"""How far length alone tells chosen from rejected answers."""

import random

import pytest
from scipy.stats import mannwhitneyu

from stages.corpus.pairing import length_bias


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_is_mann_and_whitneys_u_over_all_pairs(seed):
    chance = random.Random(seed)
    chosen = [chance.randint(1, 30) for _ in range(200)]
    rejected = [chance.randint(1, 40) for _ in range(200)]
    expected = mannwhitneyu(chosen, rejected).statistic / (len(chosen) * len(rejected))
    assert length_bias(chosen, rejected)["auc"] == pytest.approx(expected, abs=1e-4)


def test_equal_lengths_tell_nothing_and_longer_ones_all():
    assert length_bias([4, 4], [4, 4]) | {"chosen_longer": 0.0, "auc": 0.5, "difference": 0.0} == length_bias(
        [4, 4], [4, 4]
    )
    longer = length_bias([9, 10, 11], [1, 2, 6])
    assert (longer["chosen_longer"], longer["auc"], longer["difference"]) == (1.0, 1.0, 7.0)
    assert longer["chosen"] == {"mean": 10.0, "median": 10} and longer["rejected"] == {"mean": 3.0, "median": 2}
