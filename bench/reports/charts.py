"""Plots as SVG, drawn by hand: three kinds are needed, and each is some lines of elements.

A plot is one ``<svg>`` element with its style inside: it stands alone as a file, and inside a page
follows the page's light or dark. Series are told apart by colour, dash and a label at their end. Every
mark has a ``<title>``, which browsers show under the pointer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from xml.etree.ElementTree import Element, SubElement, tostring

from bench.intervals import Interval
from bench.reports.figures import interval, scale

_WIDTH, _ROW = 760, 26
_PLOT_HEIGHT = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 46
_BAR_LEFT, _BAR_RIGHT = 230, 190
_LABEL_GAP = 15
_TOO_WIDE = 20
"""Values that differ by more than this factor are drawn on a logarithmic axis."""
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
# Okabe and Ito's colours, told apart by the colour-blind too; darker or lighter for the background.
_LIGHT = ("#0072b2", "#c04f00", "#00805d", "#a8487f", "#7a6000", "#3b7fb5", "#555555", "#8a2be2")
_DARK = ("#5db4f0", "#ff9a57", "#3fcf9f", "#eea3cd", "#e5c850", "#a5d8ff", "#b5b5b5", "#c7a0ff")

COLOURS = len(_LIGHT)


def _theme(ink: str, faint: str, grid: str, colours: Sequence[str]) -> str:
    """Plain rules and no custom properties, which viewers of SVG files beside browsers do not know."""
    rules = [
        f"svg.plot text {{ fill: {ink}; }}",
        f"svg.plot text.faint {{ fill: {faint}; }}",
        f"svg.plot .grid {{ stroke: {grid}; }}",
        f"svg.plot .spread {{ stroke: {ink}; }}",
    ]
    for index, colour in enumerate(colours):
        rules.append(f"svg.plot .s{index} {{ stroke: {colour}; }}")
        rules.append(f"svg.plot .f{index} {{ fill: {colour}; }}")
    return " ".join(rules)


STYLE = f"""
svg.plot {{ font: 12px system-ui, sans-serif; max-width: 100%; height: auto; }}
{_theme("#1b1b1b", "#767676", "#e2e2e2", _LIGHT)}
@media (prefers-color-scheme: dark) {{ {_theme("#ececec", "#a0a0a0", "#3a3a3a", _DARK)} }}
svg.plot text.head {{ font-weight: 600; font-size: 13px; }}
svg.plot .spread {{ stroke-width: 1.5; }} svg.plot .line {{ fill: none; stroke-width: 2; }}
"""


class Axis(Enum):
    """How a horizontal axis is divided."""

    LINEAR = "linear"
    LOG = "log"
    QUANTILE = "quantile"
    """By 1 / (1 - q): every step of ten has as much room, so that the tail can be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a plot: at each x a median with its interval."""

    label: str
    colour: int
    points: tuple[tuple[float, Interval], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar."""

    label: str
    colour: int
    value: Interval


def text_of(plot: Element) -> str:
    """The plot as a file of its own or inside a page."""
    return tostring(plot, encoding="unicode")


def bars(title: str, unit: str, items: Sequence[Bar]) -> Element:
    """Horizontal bars from 0, each with its interval and its value in words."""
    height = _TOP + _ROW * len(items) + 14
    plot = _plot(title, height)
    divisor, label = scale(unit, [bar.value.high for bar in items])
    _text(plot, 8, 22, f"{title} [{label}]" if label else title, "head")
    most = max((bar.value.high for bar in items), default=0.0) or 1.0
    room = _WIDTH - _BAR_LEFT - _BAR_RIGHT
    for row, bar in enumerate(items):
        y = _TOP + _ROW * row
        words = interval(bar.value, divisor)
        _text(plot, _BAR_LEFT - 8, y + 15, bar.label, anchor="end")
        width = room * bar.value.middle / most
        fill = f"f{bar.colour % COLOURS}"
        mark = _add(plot, "rect", fill, x=_BAR_LEFT, y=y + 3, width=width, height=_ROW - 8, rx=2)
        _add(mark, "title").text = f"{bar.label}: {words} {label}, {bar.value.count} rounds"
        if bar.value.low != bar.value.high:
            low, high = (_BAR_LEFT + room * end / most for end in (bar.value.low, bar.value.high))
            middle = y + _ROW / 2 - 1
            _add(plot, "line", "spread", x1=low, x2=high, y1=middle, y2=middle)
        _text(plot, _BAR_LEFT + room * bar.value.high / most + 8, y + 15, words)
    return plot


def lines(
    title: str,
    unit: str,
    x_label: str,
    axis: Axis,
    series: Sequence[Line],
    *,
    from_zero: bool = True,
) -> Element:
    """Lines through medians, intervals as vertical strokes, labels at the right end.

    The vertical axis is logarithmic where the values differ by more than a factor of 20.
    """
    plot = _plot(title, _PLOT_HEIGHT + _TOP + _BOTTOM)
    values = [end for one in series for _, value in one.points for end in (value.low, value.high)]
    divisor, label = scale(unit, values)
    _text(plot, 8, 22, f"{title} [{label}]" if label else title, "head")
    least, most = min(values) / divisor, max(values) / divisor
    is_log = least > 0 and most / least > _TOO_WIDE
    if not is_log and from_zero:
        least = min(0.0, least)
    y_marks = _log_marks(least, most) if is_log else _linear_marks(least, most)
    as_y = _projection(
        math.log10 if is_log else float,
        y_marks[0],
        y_marks[-1],
        _TOP + _PLOT_HEIGHT,
        _TOP,
    )
    for mark in y_marks:
        y = as_y(mark)
        _add(plot, "line", "grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
        _text(plot, _LEFT - 8, y + 4, f"{mark:,g}", "faint", anchor="end")
    xs = sorted({x for one in series for x, _ in one.points})
    as_x = _projection(_SHAPES[axis], xs[0], xs[-1], _LEFT + 14, _WIDTH - _RIGHT - 14)
    for x in xs:
        words = f"p{x * 100:g}" if axis is Axis.QUANTILE else f"{x:,g}"
        _text(plot, as_x(x), _TOP + _PLOT_HEIGHT + 18, words, "faint", anchor="middle")
    _text(
        plot,
        (_LEFT + _WIDTH - _RIGHT) / 2,
        _TOP + _PLOT_HEIGHT + 38,
        x_label,
        "faint",
        anchor="middle",
    )
    ends: list[tuple[float, Line]] = []
    for one in series:
        points = [(as_x(x), as_y(value.middle / divisor), x, value) for x, value in one.points]
        stroke, fill = f"s{one.colour % COLOURS}", f"f{one.colour % COLOURS}"
        _add(
            plot,
            "polyline",
            f"line {stroke}",
            points=" ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points),
            style=f"stroke-dasharray: {_DASHES[one.colour % len(_DASHES)]}",
        )
        for x, y, at, value in points:
            low, high = as_y(value.low / divisor), as_y(value.high / divisor)
            _add(plot, "line", stroke, x1=x, x2=x, y1=low, y2=high)
            dot = _add(plot, "circle", fill, cx=x, cy=y, r=3.5)
            _add(
                dot, "title"
            ).text = f"{one.label}, {x_label} {at:g}: {interval(value, divisor)} {label}"
        ends.append((points[-1][1], one))
    _end_labels(plot, ends)
    return plot


def _end_labels(plot: Element, ends: Sequence[tuple[float, Line]]) -> None:
    """Beside each line's last point, moved down where two would touch."""
    free = float(_TOP - _LABEL_GAP)
    for y, one in sorted(ends, key=lambda each: each[0]):
        at = max(y, free + _LABEL_GAP)
        free = at
        x = _WIDTH - _RIGHT + 4
        _add(plot, "rect", f"f{one.colour % COLOURS}", x=x, y=at - 4, width=8, height=8)
        _text(plot, x + 13, at + 4, one.label)


def _quantile_shape(q: float) -> float:
    return -math.log10(max(1 - q, 1e-9))


_SHAPES: dict[Axis, Callable[[float], float]] = {
    Axis.LINEAR: float,
    Axis.LOG: math.log10,
    Axis.QUANTILE: _quantile_shape,
}


def _projection(
    shape: Callable[[float], float], first: float, last: float, start: float, end: float
) -> Callable[[float], float]:
    """From values to places: ``first`` comes to lie at ``start``, ``last`` at ``end``."""
    low, high = shape(first), shape(last)
    span = high - low

    def place(value: float) -> float:
        share = (shape(value) - low) / span if span else 0.5
        return start + (end - start) * share

    return place


def _linear_marks(least: float, most: float) -> list[float]:
    """Four to eight round numbers around the values."""
    span = (most - least) or abs(most) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if span / (step * factor) <= 6)
    first, last = math.floor(least / step), math.ceil(most / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _log_marks(least: float, most: float) -> list[float]:
    """1, 2 and 5 of every power of ten, from just below the values to just above."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    low = max(index for index, mark in enumerate(marks) if mark <= least * (1 + 1e-9))
    high = min(index for index, mark in enumerate(marks) if mark >= most * (1 - 1e-9))
    return marks[low : high + 1]


def _plot(title: str, height: float) -> Element:
    plot = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "plot",
            "viewBox": f"0 0 {_WIDTH} {height:g}",
            "width": str(_WIDTH),
            "height": f"{height:g}",
            "role": "img",
            "aria-label": title,
        },
    )
    _add(plot, "style").text = STYLE
    return plot


def _add(parent: Element, tag: str, kind: str = "", /, **attributes: float | str) -> Element:
    words = {
        name: f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    return SubElement(parent, tag, {"class": kind, **words} if kind else words)


def _text(
    plot: Element, x: float, y: float, words: str, kind: str = "", *, anchor: str = "start"
) -> None:
    mark = _add(plot, "text", kind, x=x, y=y)
    mark.set("text-anchor", anchor)
    mark.text = words
