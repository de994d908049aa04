"""Intervals without assumptions about how the values are distributed.

Times of a machine that others share have a long tail, so neither means nor standard deviations are
used. A median's interval lies between two of the ordered values (the sign test turned round; Conover,
Practical Nonparametric Statistics, 3rd ed., 3.2); that of a ratio of two runs between two of all
ordered quotients (Mann and Whitney's test turned round, for the logarithms; Hollander, Wolfe and
Chicken, Nonparametric Statistical Methods, 3rd ed., 4.3). Both are exact for any number of rounds and
draw no random numbers. Few rounds cannot give much certainty: with less than 6 rounds (ratio: 4 and 4)
no interval covers 95 %, and the widest one is given with the coverage that it has.

They tell how far the rounds of a run scatter. What is common to a whole run (the placement of memory, a
neighbour that is busy all along) is not in them; a ratio to a contender of the same round has less of it.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95
"""Coverage asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A middle and what lies around it."""

    middle: float
    low: float
    high: float
    coverage: float
    """Probability with which such an interval holds the true value; 0 for a single value."""
    count: int
    """Values it was made of; for a ratio of two runs of the smaller run."""

    @property
    def is_sure(self) -> bool:
        """Whether there were enough values for the coverage asked for."""
        return self.coverage >= CONFIDENCE

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within."""
        return self.low <= value <= self.high


def of_median(values: Iterable[float], confidence: float = CONFIDENCE) -> Interval:
    """Median of at least one value, and the narrowest pair of ordered values that covers it."""
    ordered = sorted(values)
    count = len(ordered)
    # below: P(fewer than `rank` values are under the true median), for the rank that is tried.
    rank, below = 1, 0.5**count
    while (wider := below + math.comb(count, rank) * 0.5**count) <= (1 - confidence) / 2:
        rank, below = rank + 1, wider
    return Interval(
        middle=statistics.median(ordered),
        low=ordered[rank - 1],
        high=ordered[count - rank],
        coverage=max(0.0, 1 - 2 * below),
        count=count,
    )


def of_ratio(
    before: Iterable[float], after: Iterable[float], confidence: float = CONFIDENCE
) -> Interval:
    """``after`` / ``before`` of two independent samples of positive values, at least one each."""
    denominators, numerators = list(before), list(after)
    quotients = sorted(top / bottom for top in numerators for bottom in denominators)
    ways = _rank_sum_ways(len(numerators), len(denominators))
    total = sum(ways)
    rank, below = 1, ways[0]
    while 2 * rank < len(ways) and 2 * (below + ways[rank]) <= (1 - confidence) * total:
        below += ways[rank]
        rank += 1
    return Interval(
        middle=statistics.median(quotients),
        low=quotients[rank - 1],
        high=quotients[-rank],
        coverage=max(0.0, 1 - 2 * below / total),
        count=min(len(numerators), len(denominators)),
    )


@cache
def _rank_sum_ways(first: int, second: int) -> tuple[int, ...]:
    """For u = 0, 1, ... first * second: orders of two samples in which u pairs are turned round.

    Mann and Whitney's recursion, by the greatest value: it belongs to one sample or to the other.
    """
    if not first or not second:
        return (1,)
    ways = [0] * (first * second + 1)
    for u, count in enumerate(_rank_sum_ways(first - 1, second)):
        ways[u + second] += count
    for u, count in enumerate(_rank_sum_ways(first, second - 1)):
        ways[u] += count
    return tuple(ways)
