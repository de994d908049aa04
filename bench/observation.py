"""The one form of every measured value, from the experiments to the reports.

An experiment yields observations: one number each, with what was measured, of whom, in which round and
under which parameters. Everything later (medians, intervals, ratios of contenders in the same round,
tables, plots, comparisons of two results) is computed from these and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

Parameter = int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measured value."""

    experiment: str
    """Name of the experiment, e.g. ``connections``."""
    contender: str
    metric: str
    """What was measured, e.g. ``worker_cpu``."""
    unit: str
    """Of ``value``: ``us``, ``1/s``, ``bit/s``, ``bytes``, ``ms``, ``share``, ..."""
    value: float
    round: int
    """From 1; values of one round were measured next to each other and may be put into ratios."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """What was varied: ``services``, ``workers``, ``quantile``, ``load``, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of everything a profile asks for; an experiment takes from it what concerns it."""

    name: str
    """``smoke``, ``short`` or ``full``."""
    rounds: int
    connections: int
    """New connections per contender and round."""
    services: tuple[int, ...]
    """Numbers of Services in the table to measure at."""
    workers: tuple[int, ...]
    seconds: float
    """Length of one timed load of latency."""
    turns: int = 1
    """For each round so many of a second's load over established connections, where a percent counts."""
    seed: int = 1


class Experiment(Protocol):
    """One kind of measurement over several contenders, interleaved."""

    name: str
    title: str
    """A line for the report: the question it answers."""

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Measure; raise NfqproxyError, without any value, if connections went wrong.

        ``progress`` is called with a line before each step. Everything made is removed on the way out.
        """
        ...
