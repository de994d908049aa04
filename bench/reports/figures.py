"""Numbers as people read them."""

import math
from collections.abc import Iterable

from bench.intervals import Interval

# Unit -> (from this on, divisor, label), greatest first.
_LARGER = {
    "bytes": ((1e6, 1e6, "MB"), (1e3, 1e3, "kB")),
    "bit/s": ((1e9, 1e9, "Gbit/s"), (1e6, 1e6, "Mbit/s")),
    "us": ((1e5, 1e3, "ms"),),
    "ms": ((1e5, 1e3, "s"),),
}


def scale(unit: str, values: Iterable[float]) -> tuple[float, str]:
    """Divisor and label of the unit in which these values are short numbers."""
    largest = max((abs(value) for value in values), default=0.0)
    for least, divisor, label in _LARGER.get(unit, ()):
        if largest >= least:
            return divisor, label
    return 1.0, unit


def figure(value: float) -> str:
    """Three significant digits, thousands with commas: 0.0123, 7.09, 118, 24,310."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def interval(one: Interval, divisor: float = 1.0) -> str:
    """The middle and, if that can be told apart, from where to where."""
    middle, low, high = (figure(value / divisor) for value in (one.middle, one.low, one.high))
    return middle if low == high else f"{middle} ({low}..{high})"
