"""Two results: what changed, what is noise, and what must not be compared."""

import pytest

from bench.compare import Change, compare
from nfqproxy.errors import InputError
from tests.unit.bench.samples import PLACE, observe, result

QUIET = [1.0, 1.01, 0.99, 1.02, 0.98]


def change(before: list[float], after: list[float], *, unit: str = "us") -> Change:
    found = compare(result(observe(before, unit=unit)), result(observe(after, unit=unit)))
    (one,) = found.changes
    return one


def test_the_same_values_are_no_change() -> None:
    one = change(QUIET, QUIET)
    assert one.ratio is not None
    assert one.ratio.middle == pytest.approx(1)
    assert not one.is_beyond_noise
    assert not one.is_worse_by(1.0)


@pytest.mark.parametrize(("factor", "is_worse"), [(1.2, True), (0.8, False)])
def test_a_cost_that_grew_beyond_the_scatter_is_worse(factor: float, is_worse: bool) -> None:
    one = change(QUIET, [value * factor for value in QUIET])
    assert one.is_beyond_noise
    assert one.is_worse is is_worse
    assert one.is_worse_by(1.1) is is_worse
    assert not one.is_worse_by(1.25)


def test_a_rate_that_fell_is_worse() -> None:
    one = change(QUIET, [value / 1.2 for value in QUIET], unit="1/s")
    assert one.is_worse
    assert one.is_worse_by(1.1)
    assert not one.is_worse_by(1.25)


def test_what_lies_within_the_scatter_is_noise() -> None:
    wide = [1.0, 2.0, 1.5, 0.7, 1.2]
    one = change(wide, [value * 1.2 for value in wide])
    assert not one.is_beyond_noise
    assert not one.is_worse_by(1.1)


def test_three_rounds_are_too_few_to_tell() -> None:
    one = change([1.0, 1.01, 0.99], [2.0, 2.01, 1.99])
    assert one.ratio is not None
    assert not one.ratio.is_sure
    assert not one.is_beyond_noise


@pytest.mark.parametrize(
    ("before", "after", "is_changed"),
    [
        ([0.0, 0.0], [0.0, 0.0], False),
        ([0.0, 0.0], [3.0, 1.0], True),
        ([0.0, 2.0], [1.0, 3.0], False),
    ],
)
def test_from_zero_there_is_no_ratio_but_there_may_be_a_change(
    before: list[float], after: list[float], is_changed: bool
) -> None:
    one = change(before, after)
    assert one.ratio is None
    assert one.is_beyond_noise is is_changed
    assert one.is_worse_by(1.1) is is_changed


def test_relative_to_a_contender_the_machine_does_not_count() -> None:
    slower = [value * 3 for value in QUIET]
    before = result([*observe(QUIET), *observe([0.5] * 5, contender="c")])
    after = result([*observe(slower), *observe([1.5] * 5, contender="c")])
    (one,) = compare(before, after, relative_to="c").changes
    assert one.after.contender == "nfqproxy"
    assert one.after.unit == "x c"
    assert not one.is_beyond_noise
    (absolute,) = (
        each for each in compare(before, after).changes if each.after.contender == "nfqproxy"
    )
    assert absolute.is_worse_by(2.9)


def test_a_contender_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no contender 'c', it has nfqproxy"):
        compare(result(observe(QUIET)), result(observe(QUIET)), relative_to="c")


def test_what_only_one_holds_is_told() -> None:
    found = compare(
        result(observe(QUIET, services=1)),
        result([*observe(QUIET), *observe(QUIET, metric="rate")]),
    )
    assert not found.changes
    assert [one.metric for one in found.only_before] == ["worker_cpu"]
    assert [one.metric for one in found.only_after] == ["worker_cpu", "rate"]


@pytest.mark.parametrize(
    "fields",
    [
        {"machine": {**PLACE, "cpu": "Other CPU"}},
        {"machine": {**PLACE, "cpus": 4}},
        {"kernel": "Linux 6.19"},
    ],
)
def test_different_machines_are_refused_unless_asked_for(fields: dict[str, object]) -> None:
    before, after = result(observe(QUIET)), result(observe(QUIET), **fields)
    with pytest.raises(InputError, match="different machines"):
        compare(before, after)
    assert compare(before, after, allow_different_machines=True).changes


def test_different_units_are_refused() -> None:
    with pytest.raises(InputError, match="in us in one result and in ms in the other"):
        compare(result(observe(QUIET)), result(observe(QUIET, unit="ms")))
