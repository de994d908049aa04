"""Ratios paired by round, and how a result stands to the bars of the design."""

import pytest

from bench import bars
from bench.bars import BARS, Bar, Measure, standings
from bench.observation import Observation
from bench.series import series
from tests.unit.bench.samples import observe

CPU = Bar(
    title="CPU to C",
    measured=Measure(
        experiment="connections",
        metric="worker_cpu",
        contender="nfqproxy",
        parameters={"services": 1},
    ),
    relative_to=Measure(experiment="connections", metric="worker_cpu", contender="c"),
    bar=1.5,
    aim=1.15,
    unit="x",
)


def one(observations: list[Observation], bar: Bar = CPU) -> bars.Standing:
    (standing,) = standings(observations, [bar])
    return standing


def test_a_ratio_is_formed_within_each_round() -> None:
    # The machine was ten times slower in round 2: medians divided would give 3.
    found = series(
        [*observe([2, 20, 3]), *observe([1, 10, 1], contender="c"), *observe([9], contender="x")]
    )
    ratio = found[0].ratio_to(found[1])
    assert ratio is not None
    assert (ratio.low, ratio.middle, ratio.high) == (2, 2, 3)
    lone = found[2].ratio_to(found[1])
    assert lone is not None
    assert lone.count == 1


def test_a_value_of_zero_gives_no_ratio() -> None:
    found = series([*observe([2, 2]), *observe([1, 0], contender="c")])
    assert found[0].ratio_to(found[1]) is None


@pytest.mark.parametrize(("cost", "is_met"), [(1.5, True), (1.51, False)])
def test_the_median_decides_whether_a_bar_is_met(cost: float, is_met: bool) -> None:
    values = [cost - 0.2, cost, cost + 9]
    standing = one([*observe(values, services=1), *observe([1, 1, 1], contender="c", services=1)])
    assert standing.measured is not None
    assert standing.measured.middle == cost
    assert standing.is_met is is_met


def test_what_must_be_reached_is_met_from_the_bar_on() -> None:
    least = Bar(title="", measured=CPU.measured, bar=4, aim=8, unit="x", is_least=True)
    assert [least.is_met_by(value) for value in (3.9, 4, 9)] == [False, True, True]


def test_without_either_side_a_bar_is_not_measured() -> None:
    assert one([]).is_met is None
    assert one(observe([1], services=1)).is_met is None
    assert one(observe([1], services=100)).measured is None


def test_the_same_parameters_are_compared() -> None:
    standing = one(
        [
            *observe([2], services=1),
            *observe([100], contender="c", services=5000),
            *observe([1], contender="c", services=1),
        ]
    )
    assert standing.measured is not None
    assert standing.measured.middle == 2


def test_a_yardstick_without_a_parameter_serves_all() -> None:
    standing = one([*observe([3], services=1), *observe([2], contender="c")])
    assert standing.measured is not None
    assert standing.measured.middle == 1.5


def test_of_several_the_worst_counts_and_is_named() -> None:
    bar = Bar(
        title="sync",
        measured=Measure(
            experiment="programming",
            metric="first_sync",
            contender="nfqproxy",
            parameters={"services": 5000},
        ),
        bar=3000,
        aim=1000,
        unit="ms",
    )
    found = [
        each
        for source, value in (("directory", 4000), ("file", 900))
        for each in observe(
            [value],
            experiment="programming",
            metric="first_sync",
            unit="ms",
            services=5000,
            source=source,
        )
    ]
    standing = one(found, bar)
    assert standing.measured is not None
    assert standing.measured.middle == 4000
    assert standing.of == "source directory"
    assert standing.is_met is False


def test_every_bar_of_the_design_can_be_met_and_missed() -> None:
    for bar in BARS:
        below, above = bar.bar - 1, bar.bar * 2 + 1
        assert bar.is_met_by(bar.aim), bar.title
        assert not bar.is_met_by(below if bar.is_least else above), bar.title


def test_zero_packets_in_userspace_meet_their_bar() -> None:
    (bar,) = [bar for bar in BARS if bar.measured.metric == "userspace_packets"]
    zero = observe([0, 0], experiment="requests", metric="userspace_packets", unit="packets")
    assert one(zero, bar).is_met is True
    some = observe([0, 1, 1], experiment="requests", metric="userspace_packets", unit="packets")
    assert one(some, bar).is_met is False
