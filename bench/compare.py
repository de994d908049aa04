"""Two results beside each other: what changed by more than the rounds scatter."""

from dataclasses import dataclass

from bench import intervals
from bench.intervals import Interval
from bench.result import Facets, Result
from bench.series import Series, series
from nfqproxy.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One series in both results."""

    before: Series
    after: Series
    ratio: Interval | None
    """After / before; None where a value is 0 or below, and there is no ratio."""

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval leaves 1 out, or without a ratio whether the values do not overlap."""
        if self.ratio is not None:
            return self.ratio.is_sure and not self.ratio.holds(1.0)
        before, after = self.before.by_round.values(), self.after.by_round.values()
        return max(before) < min(after) or max(after) < min(before)

    @property
    def is_worse(self) -> bool:
        """Whether the median moved to the bad side."""
        before, after = self.before.interval.middle, self.after.interval.middle
        return after < before if self.before.is_more_better else after > before

    def is_worse_by(self, limit: float) -> bool:
        """Whether it got worse by more than this factor, above 1, beyond noise."""
        if self.ratio is None:
            return self.is_worse and self.is_beyond_noise
        factor = 1 / self.ratio.middle if self.before.is_more_better else self.ratio.middle
        return factor > limit and self.is_beyond_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All of two results."""

    changes: tuple[Change, ...]
    only_before: tuple[Series, ...]
    only_after: tuple[Series, ...]


def compare(
    before: Result,
    after: Result,
    *,
    relative_to: str | None = None,
    allow_different_machines: bool = False,
) -> Comparison:
    """Series by series; raises :class:`InputError` if the two must not be compared.

    ``relative_to``: a contender; every value is divided by its value of the same round first, so that
    only what changed against it shows.
    """
    if before.same_place != after.same_place and not allow_different_machines:
        raise InputError(
            f"the results are of different machines ({_place(before)}; {_place(after)}): measure both "
            f"on one, or give --different-machines and mind the figures"
        )
    first, second = (
        _keyed(result, relative_to=relative_to, name=name)
        for result, name in ((before, "first"), (after, "second"))
    )
    changes = []
    for key, old in first.items():
        new = second.get(key)
        if new is None:
            continue
        if old.unit != new.unit:
            raise InputError(
                f"{old.metric} of {old.experiment} is in {old.unit} in one result and in {new.unit} "
                f"in the other: measure again with one commit's bench"
            )
        values = [*old.by_round.values(), *new.by_round.values()]
        changes.append(
            Change(
                before=old,
                after=new,
                ratio=intervals.of_ratio(old.by_round.values(), new.by_round.values())
                if min(values) > 0
                else None,
            )
        )
    return Comparison(
        changes=tuple(changes),
        only_before=tuple(one for key, one in first.items() if key not in second),
        only_after=tuple(one for key, one in second.items() if key not in first),
    )


_Key = tuple[str, str, str, Facets]


def _keyed(result: Result, *, relative_to: str | None, name: str) -> dict[_Key, Series]:
    found = {
        (one.experiment, one.metric, one.contender, one.facets): one
        for one in series(result.observations)
    }
    if relative_to is None:
        return found
    if all(one.contender != relative_to for one in found.values()):
        there = ", ".join(sorted({one.contender for one in found.values()})) or "none"
        raise InputError(f"the {name} result has no contender {relative_to!r}, it has {there}")
    relative: dict[_Key, Series] = {}
    for key, one in found.items():
        other = found.get((one.experiment, one.metric, relative_to, one.facets))
        if other is None or other is one:
            continue
        quotients = one.ratios_to(other)
        if quotients:
            relative[key] = one.with_values(quotients, unit=f"x {relative_to}")
    return relative


def _place(result: Result) -> str:
    return f"{result.machine.get('cpu')} x {result.machine.get('cpus')}, {result.kernel}"
