"""Intervals against printed tables and against counting all cases."""

import itertools
import math
import random

import pytest

from bench import intervals


@pytest.mark.parametrize(
    ("count", "rank", "coverage"),
    [
        # Ranks of the 95 % interval of a median (tables of the sign test, e.g. Conover 1999, A3):
        # from the rank-th to the (count + 1 - rank)-th value.
        (1, 1, 0.0),
        (2, 1, 0.5),
        (3, 1, 0.75),
        (5, 1, 0.9375),
        (6, 1, 0.96875),
        (8, 1, 0.9921875),
        (9, 2, 0.9609375),
        (10, 2, 0.978515625),
        (20, 6, 0.9586105),
        (25, 8, 0.9567147),
        (40, 14, 0.9615227),
    ],
)
def test_interval_of_a_median_is_that_of_the_tables(count: int, rank: int, coverage: float) -> None:
    values = [float(number) for number in range(1, count + 1)]
    random.Random(count).shuffle(values)
    found = intervals.of_median(values)
    assert (found.low, found.high) == (rank, count + 1 - rank)
    assert found.middle == (count + 1) / 2
    assert found.coverage == pytest.approx(coverage, abs=1e-6)
    assert found.is_sure == (count >= 6)
    assert found.count == count


@pytest.mark.parametrize(
    ("first", "second", "critical"),
    [
        # Greatest U significant at 5 %, two-sided (Mann and Whitney's test; any printed table).
        (4, 4, 0),
        (5, 5, 2),
        (5, 8, 6),
        (6, 6, 5),
        (8, 8, 13),
        (9, 9, 17),
        (10, 10, 23),
        (12, 7, 18),
        (20, 20, 127),
    ],
)
def test_interval_of_a_ratio_has_the_ranks_of_the_tables(
    first: int, second: int, critical: int
) -> None:
    rng = random.Random(first * 100 + second)
    before = [rng.uniform(1, 2) for _ in range(first)]
    after = [rng.uniform(1, 2) for _ in range(second)]
    quotients = sorted(b / a for a in before for b in after)
    found = intervals.of_ratio(before, after)
    assert (found.low, found.high) == (quotients[critical], quotients[-critical - 1])
    assert found.is_sure
    assert found.coverage < 1


def test_coverage_of_a_ratio_is_that_of_counting_all_orders() -> None:
    first, second = 4, 5
    found = intervals.of_ratio([1.0] * first, [1.0] * second)
    # U of every way to spread the first sample's places among all.
    counts = []
    for places in itertools.combinations(range(first + second), first):
        others = [place for place in range(first + second) if place not in places]
        counts.append(sum(other < place for place in places for other in others))
    critical = max(
        u for u in range(first * second) if sum(c <= u for c in counts) <= 0.025 * len(counts)
    )
    below = sum(count <= critical for count in counts) / len(counts)
    assert found.coverage == pytest.approx(1 - 2 * below)
    assert len(counts) == math.comb(first + second, first)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 9), (3, 3), (3, 4)])
def test_few_rounds_give_the_widest_interval_and_say_that_it_is_not_sure(
    first: int, second: int
) -> None:
    before = [float(number) for number in range(1, first + 1)]
    after = [float(number) for number in range(1, second + 1)]
    found = intervals.of_ratio(before, after)
    assert (found.low, found.high) == (1 / first, second)
    assert not found.is_sure
    assert found.count == min(first, second)


def test_ratio_of_a_sample_to_its_double_is_two() -> None:
    before = [1.0, 1.1, 1.3, 1.25, 0.9]
    found = intervals.of_ratio(before, [2 * value for value in before])
    assert found.middle == pytest.approx(2.0)
    assert found.low < 2.0 < found.high
    assert not found.holds(1.0)
    assert intervals.of_ratio(before, before).holds(1.0)
