"""Observations put together: one series per thing measured, and ratios of contenders.

A ratio of two contenders is formed round by round, for what was measured side by side, and then
summarised: what disturbs a round disturbs both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench import intervals
from bench.intervals import Interval
from bench.observation import Observation
from bench.result import Facets, facets

_MORE_IS_BETTER = ("1/s", "bit/s", "by_worker", "reached")
"""Units, and metrics, of which more is better."""
# The floor first, then what the kernel alone does: what a contender is held against.
_REFERENCES = ("c", "dnat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one contender under the same parameters, over the rounds."""

    experiment: str
    metric: str
    unit: str
    contender: str
    facets: Facets
    is_more_better: bool
    """Whether a greater value is the better one: rates; all else is a cost or a loss."""
    by_round: dict[int, float]

    @property
    def interval(self) -> Interval:
        """Median over the rounds."""
        return intervals.of_median(self.by_round.values())

    def ratios_to(self, other: "Series") -> dict[int, float]:
        """This / other by round; empty if a value of the other is 0."""
        shared = sorted(self.by_round.keys() & other.by_round.keys())
        if any(other.by_round[number] <= 0 for number in shared):
            return {}
        return {number: self.by_round[number] / other.by_round[number] for number in shared}

    def ratio_to(self, other: "Series") -> Interval | None:
        """This / other, paired by round; None without a round in common or with a value of 0."""
        ratios = self.ratios_to(other)
        return intervals.of_median(ratios.values()) if ratios else None

    def with_values(self, by_round: dict[int, float], *, unit: str) -> "Series":
        """The same thing in other figures; which side is the better one stays."""
        return replace(self, by_round=by_round, unit=unit)


def series(observations: Iterable[Observation]) -> list[Series]:
    """All series, in the order in which they were first observed."""
    found: dict[tuple[object, ...], Series] = {}
    for each in observations:
        key = (each.experiment, each.metric, each.contender, facets(each.parameters))
        one = found.get(key)
        if one is None:
            one = found[key] = Series(
                experiment=each.experiment,
                metric=each.metric,
                unit=each.unit,
                contender=each.contender,
                facets=facets(each.parameters),
                is_more_better=each.unit in _MORE_IS_BETTER or each.metric in _MORE_IS_BETTER,
                by_round={},
            )
        one.by_round[each.round] = each.value
    return list(found.values())


def reference(contenders: Iterable[str]) -> str | None:
    """The contender that the others are held against; None when there is none."""
    there = set(contenders)
    return next((name for name in _REFERENCES if name in there), None)
