"""What a report tells, the same in every form: sections with tables and plots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from bench import bars
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
    found += [f"{one.name} gave no values: {one.failure}" for one in result.ran if one.failure]
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
        ("machine", ", ".join(f"{value} {key}" for key, value in result.machine.items())),
        ("kernel", result.kernel),
        ("Python", result.python),
        (
            "versions",
            ", ".join(f"{key} {value}" for key, value in result.versions.items() if value),
        ),
        (
            "profile",
            f"{scale.name}: {scale.rounds} rounds, {scale.connections:,} connections, Services "
            f"{', '.join(f'{count:,}' for count in scale.services)}, workers "
            f"{', '.join(map(str, scale.workers))}, {scale.seconds:g} s per timed load",
        ),
        ("seed", str(scale.seed)),
        ("time", f"{result.started} to {result.ended}"),
        ("load average before", f"{result.load_average:.2f}"),
    ]
    return Section(
        name="machine",
        title="Where and how",
        text=doubts(result),
        tables=(Table(head=("", "value"), rows=tuple(rows), numbers_from=2),),
    )


def _bars(result: Result) -> Section:
    rows = []
    for standing in bars.standings(result.observations):
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
        ),
        tables=(Table(head=("measure", "bar", "aim", "measured", "met"), rows=tuple(rows)),),
    )


def _experiment(ran: Ran, own: Sequence[Series], colours: dict[str, int]) -> Section:
    tables, plots = [], []
    for metric in dict.fromkeys(one.metric for one in own):
        of_metric = [one for one in own if one.metric == metric]
        tables += _tables(metric, of_metric)
        plots += _plots(ran.name, metric, of_metric, colours)
    return Section(
        name=ran.name,
        title=f"{ran.name}: {ran.title}",
        text=(f"No values: {ran.failure}",) if ran.failure else (_certainty(own),),
        tables=tuple(tables),
        plots=tuple(plots),
        rounds=_rounds(own) if own else None,
    )


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


def _pivot(title: str, own: Sequence[Series], cells: dict[int, str]) -> Table:
    names = _contenders(own)
    keys = list(dict.fromkeys(key for one in own for key, _ in one.facets))
    by_facets: dict[Facets, dict[str, str]] = {}
    for one in own:
        by_facets.setdefault(one.facets, {})[one.contender] = cells.get(id(one), _MISSING)
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
            for one in own
        ]
        return [(f"{experiment}-{metric}", charts.bars(metric, own[0].unit, items))]
    found = []
    for rest in dict.fromkeys(_without(axis, one) for one in own if axis in dict(one.facets)):
        there = [one for one in own if axis in dict(one.facets) and _without(axis, one) == rest]
        words = [f"{key} {_said(value)}" for key, value in rest]
        lines = [
            charts.Line(
                label=name,
                colour=colours[name],
                points=tuple(
                    sorted(
                        (
                            (float(dict(one.facets)[axis]), one.interval)
                            for one in there
                            if one.contender == name
                        ),
                        key=lambda point: point[0],
                    )
                ),
            )
            for name in _contenders(there)
        ]
        plot = charts.lines(", ".join([metric, *words]), own[0].unit, axis, _AXES[axis], lines)
        name = "-".join([experiment, metric, *(_said(value) for _, value in rest)])
        found.append((name.replace(" ", "-").replace("/", "-"), plot))
    return found


def _numbers(key: str, own: Iterable[Series]) -> set[float]:
    values = (dict(one.facets).get(key) for one in own)
    return {float(value) for value in values if isinstance(value, int | float)}


def _without(axis: str, one: Series) -> Facets:
    return tuple((key, value) for key, value in one.facets if key != axis)


def _contenders(own: Iterable[Series]) -> list[str]:
    return list(dict.fromkeys(one.contender for one in own))


def _said(value: Parameter | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:,}" if isinstance(value, int) else str(value)


def _order(value: Parameter | None) -> tuple[int, float, str]:
    """Sorts numbers before words, and what is not there first."""
    if value is None:
        return 0, 0.0, ""
    return (2, 0.0, value) if isinstance(value, str) else (1, float(value), "")
