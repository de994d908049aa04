"""The bars of the design: what "fast" means, and how a result stands to it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.intervals import Interval
from bench.observation import Observation, Parameter
from bench.series import Series, series

NFQPROXY, FLOOR = "nfqproxy", "c"
IPTABLES, NFTABLES, DNAT = "kube-proxy-iptables", "kube-proxy-nftables", "dnat"
MANY, ONE = 5000, 1
"""Services."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Which series is meant."""

    experiment: str
    metric: str
    contender: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """What must be so; parameters not named may be anything, the worst of all counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line of the table in DESIGN section 6."""

    title: str
    measured: Measure
    relative_to: Measure | None = None
    """Divided by this, round by round; None: the value itself counts."""
    bar: float
    aim: float
    unit: str
    """``x`` for a ratio."""
    is_least: bool = False
    """The value has to reach the bar; else it must not pass it."""

    def is_met_by(self, value: float) -> bool:
        """Whether a value keeps to the bar."""
        return value >= self.bar if self.is_least else value <= self.bar


def _ratio(
    title: str,
    measured: Measure,
    relative_to: Measure,
    bar: float,
    aim: float,
    *,
    is_least: bool = False,
) -> Bar:
    return Bar(
        title=title,
        measured=measured,
        relative_to=relative_to,
        bar=bar,
        aim=aim,
        unit="x",
        is_least=is_least,
    )


def _measure(
    experiment: str, metric: str, contender: str = NFQPROXY, **parameters: Parameter
) -> Measure:
    return Measure(experiment=experiment, metric=metric, contender=contender, parameters=parameters)


def _value(title: str, measured: Measure, bar: float, aim: float, unit: str) -> Bar:
    return Bar(title=title, measured=measured, bar=bar, aim=aim, unit=unit)


_MB = 1e6

BARS: tuple[Bar, ...] = (
    _ratio(
        "worker CPU per new TCP connection, 1 Service, to the C worker",
        _measure("connections", "worker_cpu", services=ONE),
        _measure("connections", "worker_cpu", FLOOR),
        1.5,
        1.15,
    ),
    _ratio(
        "worker CPU at 5,000 Services to 1 Service",
        _measure("connections", "worker_cpu", services=MANY),
        _measure("connections", "worker_cpu", services=ONE),
        1.1,
        1.0,
    ),
    _ratio(
        "new connections/s at 5,000 Services to kube-proxy's iptables rules",
        _measure("connections", "rate", services=MANY),
        _measure("connections", "rate", IPTABLES, services=MANY),
        4,
        8,
        is_least=True,
    ),
    _ratio(
        "new connections/s at 5,000 Services to kube-proxy's nftables maps",
        _measure("connections", "rate", services=MANY),
        _measure("connections", "rate", NFTABLES, services=MANY),
        0.5,
        0.9,
        is_least=True,
    ),
    _ratio(
        "connect latency p50, idle, to kube-proxy's nftables maps",
        _measure("latency", "connect", quantile=0.5, load="idle"),
        _measure("latency", "connect", NFTABLES, quantile=0.5, load="idle"),
        3,
        1.5,
    ),
    _ratio(
        "established throughput to plain kernel DNAT",
        _measure("bulk", "throughput"),
        _measure("bulk", "throughput", DNAT),
        0.98,
        1.0,
        is_least=True,
    ),
    _ratio(
        "requests/s over established connections to plain kernel DNAT",
        _measure("requests", "rate"),
        _measure("requests", "rate", DNAT),
        0.98,
        1.0,
        is_least=True,
    ),
    _value(
        "packets of established connections in userspace",
        _measure("requests", "userspace_packets"),
        0,
        0,
        "",
    ),
    _value(
        "first sync, 5,000 Services / 15,000 endpoints",
        _measure("programming", "first_sync", services=MANY),
        3000,
        1000,
        "ms",
    ),
    _value(
        "endpoint change to first correct pick, 5,000 / 80,000",
        _measure("programming", "endpoint_change", services=MANY),
        20,
        2,
        "ms",
    ),
    _value(
        "resident memory of the supervisor, 5,000 / 15,000",
        _measure("memory", "supervisor_rss", services=MANY),
        150 * _MB,
        90 * _MB,
        "bytes",
    ),
    _value(
        "resident memory of a worker, 5,000 / 15,000",
        _measure("memory", "worker_rss", services=MANY),
        80 * _MB,
        45 * _MB,
        "bytes",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a result stands to one bar."""

    bar: Bar
    measured: Interval | None
    """None: the result does not hold it."""
    of: str = ""
    """The parameters under which it was measured, where several were."""

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps to the bar; None: not measured."""
        return None if self.measured is None else self.bar.is_met_by(self.measured.middle)


def standings(
    observations: Iterable[Observation], bars: Sequence[Bar] = BARS
) -> tuple[Standing, ...]:
    """One standing per bar, in their order."""
    found = series(observations)
    return tuple(_standing(bar, found) for bar in bars)


def _standing(bar: Bar, found: Sequence[Series]) -> Standing:
    candidates: list[tuple[Interval, str]] = []
    for one in _matching(bar.measured, found):
        interval: Interval | None
        if bar.relative_to is None:
            interval = one.interval
        else:
            interval = next(
                (
                    ratio
                    for other in _comparable(bar, one, found)
                    if (ratio := one.ratio_to(other)) is not None
                ),
                None,
            )
        if interval is not None:
            candidates.append((interval, described(one, but=bar.measured.parameters)))
    if not candidates:
        return Standing(bar=bar, measured=None)
    worst = (min if bar.is_least else max)(candidates, key=lambda each: each[0].middle)
    return Standing(bar=bar, measured=worst[0], of=worst[1] if len(candidates) > 1 else "")


def _matching(measure: Measure, found: Sequence[Series]) -> list[Series]:
    return [
        one
        for one in found
        if (one.experiment, one.metric, one.contender)
        == (measure.experiment, measure.metric, measure.contender)
        and measure.parameters.items() <= dict(one.facets).items()
    ]


def _comparable(bar: Bar, one: Series, found: Sequence[Series]) -> list[Series]:
    """Series of the other side that agree in all parameters that neither side names.

    A contender may lack a parameter that means nothing to it (the C worker knows one Service).
    """
    assert bar.relative_to is not None
    named = bar.measured.parameters.keys() | bar.relative_to.parameters.keys()
    free = {key: value for key, value in one.facets if key not in named}
    others = [
        other
        for other in _matching(bar.relative_to, found)
        if all(free.get(key, value) == value for key, value in other.facets if key not in named)
    ]
    return sorted(
        others, key=lambda other: len(dict(other.facets).items() ^ dict(one.facets).items())
    )


def described(one: Series, but: Mapping[str, Parameter] | None = None) -> str:
    """Its parameters in words, without those of ``but``."""
    return ", ".join(f"{key} {value}" for key, value in one.facets if key not in (but or {}))
