"""Reports: every observation is in them, every plot shows what the tables say, nothing from outside."""

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from bench import intervals
from bench.experiments import EXPERIMENTS
from bench.reports import charts, content, figures, markdown, page
from bench.reports.charts import Axis, Bar, Line
from bench.result import Ran, Result
from bench.series import Series, series
from nfqproxy.errors import InputError
from tests.unit.bench.samples import CONTENDERS, everything, observe, result

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def whole() -> Result:
    return result(everything())


def html(made: Result) -> tuple[str, Element]:
    text = page.render(content.sections(made), "Bench")
    assert text.startswith("<!DOCTYPE html>\n")
    return text, ElementTree.fromstring(text.partition("\n")[2])


def cells(table: Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_every_observation_is_in_the_page(whole: Result) -> None:
    _, tree = html(whole)
    found: set[tuple[str, ...]] = set()
    for block in tree.iter("section"):
        details = block.find("details")
        if details is None:
            continue
        head, *rows = cells(details)
        assert head[:4] == ["metric", "unit", "contender", "parameters"]
        found |= {
            (block.attrib["id"], *row[:4], name, value)
            for row in rows
            for name, value in zip(head[4:], row[4:], strict=True)
            if value != "-"
        }
    assert found == {
        (
            each.experiment,
            each.metric,
            each.unit,
            each.contender,
            ", ".join(f"{key} {value}" for key, value in sorted(each.parameters.items())),
            f"round {each.round}",
            f"{each.value:.6g}",
        )
        for each in whole.observations
    }


def test_every_median_is_in_the_tables_and_as_a_mark_in_a_plot(whole: Result) -> None:
    _, tree = html(whole)
    for ran in whole.ran:
        (block,) = (each for each in tree.iter("section") if each.attrib["id"] == ran.name)
        own = [one for one in series(whole.observations) if one.experiment == ran.name]
        words = [cell for table in block.iter("table") for row in cells(table) for cell in row]
        titles = [title.text or "" for title in block.iter(f"{SVG}title")]
        assert len(titles) == len(own)
        alone = {one.contender for one in own}
        for one in own:
            divisor, _ = figures.scale(one.unit, _of_metric(own, one))
            said = figures.interval(one.interval, divisor)
            assert said in words
            # A line of one contender alone is called by what is varied.
            label = f"source {dict(one.facets).get('source')}" if len(alone) == 1 else one.contender
            assert any(
                title.startswith((label, one.contender)) and said in title for title in titles
            ), one


def _of_metric(own: list[Series], one: Series) -> list[float]:
    return [each.interval.high for each in own if each.metric == one.metric]


def test_the_page_asks_for_nothing_from_outside(whole: Result) -> None:
    text, tree = html(whole)
    for element in tree.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "link", "img", "iframe", "image")
        for name, value in element.attrib.items():
            if name in ("href", "src") or name.endswith("}href"):
                assert value.startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text


def test_a_hostile_text_stays_text() -> None:
    ran = Ran(name="bulk", title="<b>&|</b>", seconds=1, failure="a|b <script>")
    made = result([], asked=("bulk",), ran=(ran,))
    _, tree = html(made)
    assert "bulk gave no values: a|b <script>" in "".join(tree.itertext())
    assert list(tree.iter("script")) == []
    table = content.Table(head=("a",), rows=(("1|2 <b>",),))
    section = content.Section(name="x", title="x", tables=(table,))
    assert markdown.body(section).splitlines()[-1] == r"| 1\|2 \<b\> |"


def test_two_contenders_in_markdown() -> None:
    made = result(
        [*observe([2, 20, 3], services=1), *observe([1, 10, 1], contender="c", services=1)]
    )
    (section,) = (each for each in content.sections(made) if each.name == "connections")
    assert markdown.body(section) == (
        "Median of 3 rounds, in parentheses an interval that holds it with 75% certainty.\n"
        "\n"
        "**worker_cpu [us]**\n"
        "\n"
        "| services | nfqproxy | c |\n"
        "| ---: | ---: | ---: |\n"
        "| 1 | 3.00 (2.00..20.0) | 1.00 (1.00..10.0) |\n"
        "\n"
        "**worker_cpu divided by that of c**\n"
        "\n"
        "| services | nfqproxy |\n"
        "| ---: | ---: |\n"
        "| 1 | 2.00 (2.00..3.00) |\n"
    )


def test_the_bars_say_met_missed_and_not_measured() -> None:
    made = result(
        [
            *observe(
                [4e3], experiment="programming", metric="first_sync", unit="ms", services=5000
            ),
            *observe([70e6], experiment="memory", metric="worker_rss", unit="bytes", services=5000),
        ]
    )
    (section,) = (each for each in content.sections(made) if each.name == "bars")
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    assert rows["first sync, 5,000 Services / 15,000 endpoints"] == (
        "≤ 3,000 ms",
        "1,000 ms",
        "4,000 ms",
        "no",
    )
    assert rows["resident memory of a worker, 5,000 / 15,000"] == (
        "≤ 80 MB",
        "45 MB",
        "70.0 MB",
        "yes",
    )
    assert {row[-1] for row in rows.values()} == {"yes", "no", "not measured"}


def test_what_varies_with_services_alone_makes_no_plot_of_its_own(whole: Result) -> None:
    names = {name: plot for each in content.sections(whole) for name, plot in each.plots}
    assert {name for name in names if name.startswith(("memory", "programming", "latency"))} == {
        "memory-supervisor_rss",
        "memory-worker_rss",
        "programming-first_sync",
        "latency-connect-idle",
        "latency-connect-half",
    }
    said = "".join(names["programming-first_sync"].itertext())
    assert "source directory" in said
    assert "source file" in said


def test_one_contender_alone_has_its_metrics_side_by_side(whole: Result) -> None:
    (section,) = (each for each in content.sections(whole) if each.name == "memory")
    (table,) = section.tables
    assert table.title == "nfqproxy"
    assert table.head == ("endpoints", "services", "supervisor_rss [MB]", "worker_rss [MB]")
    assert table.rows[0] == ("3", "1", "41.0 (40.0..42.0)", "81.0 (80.0..82.0)")


def test_contenders_come_in_the_order_of_the_bench_whatever_the_rounds_drew() -> None:
    names = ("kube-proxy-nftables", "mine", "c", "nfqproxy")
    made = result([each for name in names for each in observe([1.0], contender=name)])
    (section,) = (each for each in content.sections(made) if each.name == "connections")
    assert section.tables[0].head == ("nfqproxy", "c", "kube-proxy-nftables", "mine")


def test_doubts_are_told_first() -> None:
    failed = Ran(name="bulk", title="?", seconds=1, failure="2 of 3 connections were lost")
    made = result([], asked=("bulk", "memory"), ran=(failed,), is_modified=True, load_average=1.4)
    assert content.doubts(made) == (
        "The run was interrupted before these experiments: memory.",
        "bulk gave no values: 2 of 3 connections were lost",
        "The working tree had changes beside the commit.",
        "Other work was running: load average 1.40 at the beginning.",
    )
    assert content.doubts(result(everything())) == ()


@pytest.mark.parametrize("axis", [Axis.LINEAR, Axis.LOG, Axis.QUANTILE])
@pytest.mark.parametrize("factor", [2.0, 1e4])
def test_a_line_rises_with_its_values_and_stays_within_the_plot(axis: Axis, factor: float) -> None:
    xs = (0.5, 0.9, 0.999) if axis is Axis.QUANTILE else (1.0, 4.0, 5000.0)
    points = tuple(
        (x, intervals.of_median([factor**number, factor**number * 1.1]))
        for number, x in enumerate(xs)
    )
    plot = charts.lines("t", "us", "x", axis, [Line(label="one", colour=0, points=points)])
    width, height = map(float, plot.attrib["viewBox"].split()[2:])
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in plot.iter("circle")]
    assert len(dots) == 3
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    assert sorted(dots) == dots
    assert sorted((y for _, y in dots), reverse=True) == [y for _, y in dots]


def test_a_bar_is_as_long_as_its_value() -> None:
    items = [
        Bar(label=f"b{value}", colour=0, value=intervals.of_median([value]))
        for value in (1.0, 2.0, 4.0, 0.0)
    ]
    widths = [float(mark.attrib["width"]) for mark in charts.bars("t", "us", items).iter("rect")]
    assert widths == pytest.approx([widths[2] / 4, widths[2] / 2, widths[2], 0.0], abs=0.1)


def test_labels_at_the_ends_of_lines_do_not_touch(whole: Result) -> None:
    same = [
        Line(label=name, colour=index, points=((1.0, intervals.of_median([5.0])),))
        for index, name in enumerate(CONTENDERS)
    ]
    plot = charts.lines("t", "us", "x", Axis.LOG, same)
    places = sorted(
        float(text.attrib["y"]) for text in plot.iter("text") if text.text in CONTENDERS
    )
    assert len(places) == len(CONTENDERS)
    assert min(b - a for a, b in itertools.pairwise(places)) >= 14


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.01234, "0.0123"), (7.089, "7.09"), (118.4, "118"), (24310.2, "24,310")],
)
def test_figures_have_three_digits(value: float, said: str) -> None:
    assert figures.figure(value) == said


PLACES = """# Speed

Words stay.
<!-- bench:bars -->
old
<!-- /bench:bars -->
More words.
<!-- bench:bulk -->
<!-- /bench:bulk -->
"""


def test_marked_places_of_a_document_are_filled_and_filled_again(whole: Result) -> None:
    sections = content.sections(whole)
    once = markdown.insert(sections, PLACES, Path("doc.md"))
    assert "\nold\n" not in once
    assert "| measure | bar | aim | measured | met |" in once
    assert "throughput [Gbit/s]" in once
    assert "Words stay." in once
    assert "More words." in once
    assert markdown.insert(sections, once, Path("doc.md")) == once
    shown = markdown.insert(sections, once, Path("doc.md"), "plots")
    [bulk] = [section for section in sections if section.name == "bulk"]
    assert bulk.plots
    for name, _ in bulk.plots:
        assert f"![{name}](plots/{name}.svg)" in shown


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("# Nothing\n", "holds no place for a table"),
        (PLACES.replace("bulk", "weather"), "asks for bench:weather, which this result does not"),
        (PLACES.replace("<!-- /bench:bulk -->", ""), "the marks of bench:bulk are not a pair"),
    ],
)
def test_a_document_without_fitting_places_is_refused(
    whole: Result, document: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        markdown.insert(content.sections(whole), document, Path("doc.md"))


def test_the_document_has_a_place_for_every_section() -> None:
    document = (Path(__file__).parents[3] / "docs/performance.md").read_text()
    places = re.findall(r"^<!-- bench:(\w+) -->$", document, re.MULTILINE)
    assert sorted(places) == sorted({"machine", "bars", *EXPERIMENTS})
    assert all(f"<!-- /bench:{name} -->" in document for name in places)
