"""Weighted random: proportion, determinism, zero weights, the empty set."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy import balancers
from nfqproxy.balancers import WeightedRandom
from nfqproxy.errors import InputError


def draw(weights: list[int], count: int, seed: int = 1) -> Counter[int]:
    balancer = WeightedRandom()
    balancer.update(weights, Random(seed))
    return Counter(balancer.pick() for _ in range(count))


@pytest.mark.parametrize(
    "weights", [[5, 3, 2], [1, 1, 1], [1, 1000], [7], [0, 4, 0, 1], list(range(50))]
)
def test_a_million_picks_follow_the_weights(weights: list[int]) -> None:
    count = 1_000_000
    seen = draw(weights, count)
    total = sum(weights)
    expected = {i: w * count / total for i, w in enumerate(weights) if w}
    assert set(seen) == set(expected)
    chi2 = sum((seen[i] - e) ** 2 / e for i, e in expected.items())
    # Wilson-Hilferty: the 99.9 % quantile of chi-square with k degrees of freedom.
    k = max(1, len(expected) - 1)
    assert chi2 < k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
def test_the_alias_table_holds_the_exact_shares(weights: list[int]) -> None:
    balancer = WeightedRandom()
    balancer.update(weights, Random(1))
    if sum(w > 0 for w in weights) < 2 or len(set(weights)) == 1:
        return
    size = len(weights)
    shares = [0.0] * size
    for column, (keep, alias) in enumerate(zip(balancer._keep, balancer._alias, strict=True)):
        shares[column] += keep - column
        shares[alias] += 1 - (keep - column)
    total = sum(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert share / size == pytest.approx(weight / total, abs=1e-12)


@given(st.lists(st.integers(0, 9), max_size=10), st.integers(0, 99))
def test_only_positive_weights_are_picked(weights: list[int], seed: int) -> None:
    seen = draw(weights, 50, seed)
    if any(weights):
        assert all(weights[index] > 0 for index in seen)
    else:
        assert set(seen) == {-1}


def test_one_seed_gives_one_sequence() -> None:
    first, second = WeightedRandom(), WeightedRandom()
    first.update([5, 3, 2], Random(7))
    second.update([5, 3, 2], Random(7))
    assert [first.pick() for _ in range(100)] == [second.pick() for _ in range(100)]


def test_probabilities_are_the_shares() -> None:
    balancer = WeightedRandom()
    balancer.update([5, 3, 2, 0], Random(1))
    assert balancer.probabilities() == (0.5, 0.3, 0.2, 0.0)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="known are: weighted-random"):
        balancers.create("rount-robin")
