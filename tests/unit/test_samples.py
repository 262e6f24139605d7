"""pass@k and maj@k against their definitions, spelled out."""

import random
from itertools import combinations

import pytest

from stages.harness.errors import InputError
from stages.scoring.samples import majority_at_k, pass_at_k, powers_of_two, winner


def drawn(seed: int, problems: int, n: int) -> list[list[bool]]:
    chance = random.Random(seed)
    return [[chance.random() < 0.3 for _ in range(n)] for _ in range(problems)]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_right_answer(k):
    correct = drawn(1, problems=9, n=6)
    shares = [sum(map(any, combinations(group, k))) / len(list(combinations(group, k))) for group in correct]
    assert pass_at_k(correct, k) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_pass_at_k_is_unbiased():
    rate, k = 0.2, 4
    chance = random.Random(2)
    estimates = [pass_at_k([[chance.random() < rate for _ in range(8)]], k) for _ in range(6000)]
    assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - rate) ** k, abs=0.01)


def test_pass_at_one_is_the_mean_and_pass_at_n_is_any():
    correct = drawn(3, problems=50, n=8)
    assert pass_at_k(correct, 1) == pytest.approx(sum(map(sum, correct)) / 400)
    assert pass_at_k(correct, 8) == sum(map(any, correct)) / 50


@pytest.mark.parametrize(
    ("votes", "won"),
    [
        ([7, 7, 3], 7), ([3, 7, 7], 7), ([3, 7], 3), ([7, 3], 7), ([None, None, 3], 3), ([None], None), ([], None),
        ([3, 7, 3, 7], 3),
    ],
)  # fmt: skip
def test_the_majority_wins_and_a_tie_goes_to_the_first(votes, won):
    assert winner(votes) == won


def test_majority_at_k_holds_an_election_for_each_run_of_k():
    votes = [[1, 1, 2, 2], [5, None, None, None]]
    assert majority_at_k(votes, [1, 5], 1) == 3 / 8
    assert majority_at_k(votes, [1, 5], 2) == 2 / 4
    assert majority_at_k(votes, [1, 5], 3) == 2 / 2
    assert majority_at_k(votes, [1, 5], 4) == 2 / 2


@pytest.mark.parametrize("k", [0, 3])
def test_more_than_were_drawn_cannot_be_asked_for(k):
    with pytest.raises(InputError, match="k ="):
        pass_at_k([[True, False]], k)
    with pytest.raises(InputError, match="k ="):
        majority_at_k([[1, 2]], [1], k)


def test_curves_are_drawn_at_powers_of_two_and_at_n():
    assert [powers_of_two(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
