"""What a report tells, the same in every form: sections with tables and plots."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import msgspec

from bench import bars
from bench.contenders import CONTENDERS
from bench.observation import Parameter
from bench.reports import charts, figures
from bench.result import Facets, Ran, Result
from bench.series import Series, reference, series

_MISSING = "-"
# Parameters that make a line when they vary, the most telling first.
_AXES = {
    "quantile": charts.Axis.QUANTILE,
    "services": charts.Axis.LOG,
    "workers": charts.Axis.LINEAR,
}
_WARM_LOAD = 0.25
"""Load average per CPU from which a run counts as disturbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    numbers_from: int = 1
    """From this column on cells are numbers, set to the right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report."""

    name: str
    """By which a document asks for it: ``machine``, ``bars`` or an experiment's name."""
    title: str
    text: tuple[str, ...] = ()
    """Paragraphs."""
    tables: tuple[Table, ...] = ()
    plots: tuple[tuple[str, Element], ...] = ()
    """File name without ending, and the plot."""
    rounds: Table | None = None
    """Every observation."""


def sections(result: Result) -> tuple[Section, ...]:
    """All sections of a result."""
    every = series(result.observations)
    colours = {name: index for index, name in enumerate(_contenders(every))}
    return (
        _machine(result),
        _bars(result),
        *(
            _experiment(ran, [one for one in every if one.experiment == ran.name], colours)
            for ran in result.ran
        ),
    )


def doubts(result: Result) -> tuple[str, ...]:
    """What speaks against the figures, one sentence each."""
    found = []
    ran = {one.name for one in result.ran}
    left = [name for name in result.asked if name not in ran]
    if left:
        found.append(f"The run was interrupted before these experiments: {', '.join(left)}.")
    valued = {each.experiment for each in result.observations}
    found += [
        f"{one.name} gave no values{' of some' if one.name in valued else ''}: {one.failure}"
        for one in result.ran
        if one.failure
    ]
    if result.is_modified:
        found.append("The working tree had changes beside the commit.")
    cpus = result.machine.get("cpus")
    if isinstance(cpus, int) and result.load_average > _WARM_LOAD * cpus:
        found.append(
            f"Other work was running: load average {result.load_average:.2f} at the beginning."
        )
    if result.scale.name == "smoke":
        found.append(
            "The profile smoke only shows that everything works; its figures mean nothing."
        )
    return tuple(found)


def _machine(result: Result) -> Section:
    scale = result.scale
    rows = [
        ("commit", result.commit or "unknown"),
        (
            "machine",
            f"{result.machine.get('cpu')}, {result.machine.get('cpus')} CPUs, "
            f"{result.machine.get('architecture')}",
        ),
        ("kernel", result.kernel),
        ("Python", result.python),
        (
            "versions",
            # What a program says of itself begins with its name as a rule.
            ", ".join(
                str(value) if str(value).lower().startswith(key) else f"{key} {value}"
                for key, value in result.versions.items()
                if value
            ),
        ),
        (
            "profile",
            f"{scale.name}: rounds {scale.rounds}, connections {scale.connections:,}, Services "
            f"{', '.join(f'{count:,}' for count in scale.services)}, workers "
            f"{', '.join(map(str, scale.workers))}, {scale.seconds:g} s per timed load",
        ),
        ("seed", str(scale.seed)),
        ("time", f"{result.started} to {result.ended}"),
        ("load average before", f"{result.load_average:.2f}"),
        *(
            (one.name, f"of another run: {one.run}")
            for one in result.ran
            if one.run is not msgspec.UNSET
        ),
    ]
    return Section(
        name="machine",
        title="Where and how",
        text=doubts(result),
        tables=(Table(head=("", "value"), rows=tuple(rows), numbers_from=2),),
    )


def _bars(result: Result) -> Section:
    rows = []
    standings = bars.standings(result.observations)
    for standing in standings:
        bar = standing.bar
        values = [bar.bar, bar.aim]
        if standing.measured is not None:
            values.append(standing.measured.high)
        divisor, label = figures.scale(bar.unit, values)
        sign = "≥" if bar.is_least else "≤"
        measured = _MISSING
        if standing.measured is not None:
            measured = f"{figures.interval(standing.measured, divisor)} {label}".strip()
        rows.append(
            (
                f"{bar.title} ({standing.of})" if standing.of else bar.title,
                f"{sign} {bar.bar / divisor:,g} {label}".strip(),
                f"{bar.aim / divisor:,g} {label}".strip(),
                measured,
                {True: "yes", False: "no", None: "not measured"}[standing.is_met],
            )
        )
    return Section(
        name="bars",
        title="Bars of the design",
        text=(
            "Median over the rounds; ratios are formed within each round. A median decides. Where a "
            "bar was measured under several parameters the worst stands here.",
            _missed(standings),
        ),
        tables=(Table(head=("measure", "bar", "aim", "measured", "met"), rows=tuple(rows)),),
    )


def _missed(standings: Sequence[bars.Standing]) -> str:
    """Which bars are not met; for the reasons a document has its own words."""
    missed = [each.bar.title for each in standings if each.is_met is False]
    if missed:
        return f"Not met: {'; '.join(missed)}."
    return "Every bar that was measured is met."


def _experiment(ran: Ran, own: Sequence[Series], colours: dict[str, int]) -> Section:
    tables, plots = [], []
    alone: dict[tuple[Facets, ...], list[Series]] = {}
    for metric in dict.fromkeys(one.metric for one in own):
        of_metric = [one for one in own if one.metric == metric]
        plots += _plots(ran.name, metric, of_metric, colours)
        if len(_contenders(of_metric)) > 1:
            tables += _tables(metric, of_metric)
        else:
            alone.setdefault(tuple(one.facets for one in of_metric), []).extend(of_metric)
    tables += map(_metrics_table, alone.values())
    return Section(
        name=ran.name,
        title=f"{ran.name}: {ran.title}",
        text=_said_of(ran, own),
        tables=tuple(tables),
        plots=tuple(plots),
        rounds=_rounds(own) if own else None,
    )


def _said_of(ran: Ran, own: Sequence[Series]) -> tuple[str, ...]:
    """What stands above the tables of an experiment."""
    if not ran.failure:
        return (_certainty(own),)
    if not own:
        return (f"No values: {ran.failure}",)
    return (f"Not of all: {ran.failure}", _certainty(own))


def _certainty(own: Sequence[Series]) -> str:
    least = min((one.interval for one in own), key=lambda each: each.count, default=None)
    if least is None or least.count < 2:
        return "One round: no intervals."
    return (
        f"Median of {least.count} rounds, in parentheses an interval that holds it with "
        f"{least.coverage:.0%} certainty."
    )


def _tables(metric: str, own: Sequence[Series]) -> list[Table]:
    """Medians, parameters down and contenders across; then the same against the reference."""
    divisor, label = figures.scale(own[0].unit, [one.interval.high for one in own])
    title = f"{metric} [{label}]" if label else metric
    found = [_pivot(title, own, {id(one): figures.interval(one.interval, divisor) for one in own})]
    floor = reference(one.contender for one in own)
    others = [one for one in own if one.contender != floor]
    if floor and others:
        at = {one.facets: one for one in own if one.contender == floor}
        ratios = {
            id(one): figures.interval(ratio)
            for one in others
            if one.facets in at and (ratio := one.ratio_to(at[one.facets])) is not None
        }
        if ratios:
            found.append(_pivot(f"{metric} divided by that of {floor}", others, ratios))
    return found


def _metrics_table(own: Sequence[Series]) -> Table:
    """Several metrics of one contender, parameters down and metrics across."""
    metrics = list(dict.fromkeys(one.metric for one in own))
    of = {metric: [one for one in own if one.metric == metric] for metric in metrics}
    scales = {
        metric: figures.scale(them[0].unit, [one.interval.high for one in them])
        for metric, them in of.items()
    }
    heads = {metric: f"{metric} [{scales[metric][1]}]" for metric in metrics}
    cells = [
        (one.facets, heads[one.metric], figures.interval(one.interval, scales[one.metric][0]))
        for one in own
    ]
    return _grid(own[0].contender, list(heads.values()), cells)


def _pivot(title: str, own: Sequence[Series], cells: dict[int, str]) -> Table:
    return _grid(
        title,
        _contenders(own),
        [(one.facets, one.contender, cells.get(id(one), _MISSING)) for one in own],
    )


def _grid(title: str, names: Sequence[str], cells: Sequence[tuple[Facets, str, str]]) -> Table:
    """Parameters down, ``names`` across; each cell is (parameters, name, words)."""
    keys = list(dict.fromkeys(key for facets, _, _ in cells for key, _ in facets))
    by_facets: dict[Facets, dict[str, str]] = {}
    for facets, name, words in cells:
        by_facets.setdefault(facets, {})[name] = words
    rows = []
    for facets in sorted(by_facets, key=lambda each: [_order(dict(each).get(key)) for key in keys]):
        values = dict(facets)
        rows.append(
            (
                *(_said(values.get(key)) for key in keys),
                *(by_facets[facets].get(name, _MISSING) for name in names),
            )
        )
    return Table(title=title, head=(*keys, *names), rows=tuple(rows), numbers_from=0)


def _rounds(own: Sequence[Series]) -> Table:
    numbers = sorted({number for one in own for number in one.by_round})
    rows = []
    for one in own:
        values = (
            f"{one.by_round[number]:.6g}" if number in one.by_round else _MISSING
            for number in numbers
        )
        rows.append((one.metric, one.unit, one.contender, bars.described(one), *values))
    return Table(
        head=("metric", "unit", "contender", "parameters", *(f"round {n}" for n in numbers)),
        rows=tuple(rows),
        numbers_from=4,
    )


def _plots(
    experiment: str, metric: str, own: Sequence[Series], colours: dict[str, int]
) -> list[tuple[str, Element]]:
    """A line plot over the parameter that varies, one for each value of the others; else bars."""
    axis = next((key for key in _AXES if len(_numbers(key, own)) > 1), None)
    if axis is None:
        items = [
            charts.Bar(
                label=" ".join([one.contender, *(_said(value) for _, value in one.facets)]),
                colour=colours[one.contender],
                value=one.interval,
            )
            for one in sorted(own, key=lambda one: colours[one.contender])
        ]
        return [(f"{experiment}-{metric}", charts.bars(metric, own[0].unit, items))]
    there = [one for one in own if axis in dict(one.facets)]
    along = _along(axis, there)
    rests = list(dict.fromkeys(_without(along, one) for one in there))
    if len(_contenders(there)) == 1:
        # One contender: its lines are told apart by the parameters.
        drawn = [
            _line(", ".join(_words(rest)) or one.contender, index, axis, them)
            for index, rest in enumerate(rests)
            if (them := [one for one in there if _without(along, one) == rest])
            for one in them[:1]
        ]
        name = f"{experiment}-{metric}"
        return [(name, charts.lines(metric, own[0].unit, axis, _AXES[axis], drawn))]
    found = []
    for rest in rests:
        same = [one for one in there if _without(along, one) == rest]
        drawn = [
            _line(name, colours[name], axis, [one for one in same if one.contender == name])
            for name in _contenders(same)
        ]
        title = ", ".join([metric, *_words(rest)])
        name = "-".join([experiment, metric, *(_said(value) for _, value in rest)])
        plot = charts.lines(title, own[0].unit, axis, _AXES[axis], drawn)
        found.append((re.sub(r"[^\w.-]+", "-", name), plot))
    return found


def _line(label: str, colour: int, axis: str, own: Sequence[Series]) -> charts.Line:
    points = [(float(dict(one.facets)[axis]), one.interval) for one in own]
    points.sort(key=lambda point: point[0])
    return charts.Line(label=label, colour=colour, points=tuple(points))


def _along(axis: str, own: Sequence[Series]) -> set[str]:
    """The axis, and the parameters that vary with it alone (endpoints with Services)."""
    found = {axis}
    for key in {key for one in own for key, _ in one.facets} - found:
        pairs = {(dict(one.facets)[axis], dict(one.facets).get(key)) for one in own}
        if len({value for _, value in pairs}) > 1 and len({at for at, _ in pairs}) == len(pairs):
            found.add(key)
    return found


def _words(facets: Facets) -> list[str]:
    return [f"{key} {_said(value)}" for key, value in facets]


def _numbers(key: str, own: Iterable[Series]) -> set[float]:
    values = (dict(one.facets).get(key) for one in own)
    return {float(value) for value in values if isinstance(value, int | float)}


def _without(keys: set[str], one: Series) -> Facets:
    return tuple((key, value) for key, value in one.facets if key not in keys)


def _contenders(own: Iterable[Series]) -> list[str]:
    """In the order of the bench's list; others behind, as they come."""
    there = dict.fromkeys(one.contender for one in own)
    return [
        *(name for name in CONTENDERS if name in there),
        *(name for name in there if name not in CONTENDERS),
    ]


def _said(value: Parameter | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:,}" if isinstance(value, int) else str(value)


def _order(value: Parameter | None) -> tuple[int, float, str]:
    """Sorts numbers before words, and what is not there first."""
    if value is None:
        return 0, 0.0, ""
    return (2, 0.0, value) if isinstance(value, str) else (1, float(value), "")
