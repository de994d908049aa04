"""The commands about results: ``run``, ``report``, ``compare``, ``baseline``, ``check``, ``micro``."""

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench import baseline as baselines
from bench import compare as comparison
from bench import result as results
from bench import runner
from bench.bars import described
from bench.experiments import EXPERIMENTS, experiments
from bench.profiles import PROFILES
from bench.reports import charts, content, markdown, page
from bench.reports.figures import figure, interval, scale
from bench.result import Result
from nfqproxy.errors import HostError, InputError, NfqproxyError

_FILE = click.Path(path_type=Path, dir_okay=False)
# Of pyperf: one process for each function, three values of at least 10 ms.
_FAST = ("--quiet", "--processes", "1", "--values", "3", "--warmups", "1", "--min-time", "0.01")
_ALL_PROFILES = click.Choice(list(PROFILES))


@click.command("run")
@click.option(
    "--profile",
    type=_ALL_PROFILES,
    default="short",
    show_default=True,
    help="How much: smoke sees that all works, short is for work in progress, full is published.",
)
@click.option(
    "--experiments",
    "names",
    default=",".join(EXPERIMENTS),
    show_default=True,
    help="Which, in this order.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order in each round.")
@click.option("-o", "--output", type=_FILE, required=True, help="Where the result goes.")
@click.option(
    "--report",
    "report_directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.md, report.html and the plots into this directory too.",
)
def run_command(
    profile: str, names: str, seed: int, output: Path, report_directory: Path | None
) -> None:
    """Run experiments and write one JSON result.

    The result is written after every experiment: Ctrl-C loses the one under way, leaves nothing on the
    machine and keeps the others. An experiment in which a connection went wrong gives no values; the
    others run all the same, and the exit status is 1.

    \b
    Example:
      python -m bench run --profile short --experiments connections,memory -o result.json
    """
    chosen = experiments(name.strip() for name in names.split(","))
    _check_writable(output)
    _check_root()
    if report_directory is not None:
        _make_directory(report_directory)
    kept: list[Result] = []

    def keep(so_far: Result) -> None:
        results.save(so_far, output)
        kept.append(so_far)

    try:
        with _progress() as progress:
            result = runner.run(chosen, replace(PROFILES[profile], seed=seed), progress, keep)
    except KeyboardInterrupt:
        if kept:
            click.echo(f"{output} holds {len(kept)} of {len(chosen)} experiments", err=True)
        raise
    if report_directory is not None:
        _write_report(result, report_directory)
    for doubt in content.doubts(result):
        click.echo(doubt, err=True)
    if not result.is_complete:
        failed = ", ".join(one.name for one in result.ran if one.failure)
        raise NfqproxyError(f"not all values of {failed}; {output} holds the rest and the reasons")


@click.command("report")
@click.argument("result_files", metavar="RESULT...", type=_FILE, nargs=-1, required=True)
@click.option("--markdown", "markdown_file", type=_FILE, help="Write Markdown here.")
@click.option("--html", "html_file", type=_FILE, help="Write one self-contained page here.")
@click.option(
    "--plots",
    "plots_directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write each plot as an SVG file into this directory.",
)
@click.option(
    "--into",
    "document",
    type=_FILE,
    help="Fill the places <!-- bench:NAME --> ... <!-- /bench:NAME --> of this Markdown document; with"
    " --plots it shows them too.",
)
def report_command(
    result_files: tuple[Path, ...],
    markdown_file: Path | None,
    html_file: Path | None,
    plots_directory: Path | None,
    document: Path | None,
) -> None:
    """Tables and plots of a result; Markdown on stdout if no file is asked for.

    Of several results of one machine and profile, an experiment is taken from the last that has it.

    \b
    Example:
      python -m bench report result.json --html result.html
      python -m bench report result.json --into docs/performance.md --plots docs/performance
    """
    result = functools.reduce(results.combined, map(results.load, result_files))
    sections = content.sections(result)
    wanted: list[tuple[Path, str]] = []
    if markdown_file is not None:
        wanted.append((markdown_file, markdown.render(sections)))
    if html_file is not None:
        wanted.append((html_file, page.render(sections, _title(result))))
    if document is not None:
        try:
            text = document.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{document} cannot be read: {error}; give a document") from None
        plots = "" if plots_directory is None else os.path.relpath(plots_directory, document.parent)
        wanted.append((document, markdown.insert(sections, text, document, plots)))
    if plots_directory is not None:
        _make_directory(plots_directory)
        wanted += _plots(sections, plots_directory)
    if not wanted and plots_directory is None:
        click.echo(markdown.render(sections))
    for path, text in wanted:
        results.write_text(path, text)
        click.echo(f"wrote {path}", err=True)


@click.command("compare")
@click.argument("before_file", metavar="BEFORE", type=_FILE)
@click.argument("after_file", metavar="AFTER", type=_FILE)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Only this metric, as in worker_cpu or connections.worker_cpu; repeatable.",
)
@click.option("--contender", "contenders", multiple=True, help="Only this contender; repeatable.")
@click.option(
    "--relative-to",
    help="Divide every value by that of this contender in the same round first (c, dnat).",
)
@click.option(
    "--fail-above",
    type=click.FloatRange(min=1.0),
    help="Exit 1 if a metric is worse by more than this factor, beyond noise.",
)
@click.option(
    "--different-machines", is_flag=True, help="Compare although CPU or kernel are not the same."
)
def compare_command(
    before_file: Path,
    after_file: Path,
    metrics: tuple[str, ...],
    contenders: tuple[str, ...],
    relative_to: str | None,
    fail_above: float | None,
    different_machines: bool,
) -> None:
    """AFTER divided by BEFORE, series by series, and what changed by more than the rounds scatter.

    A mark (better, worse) needs four rounds in both. It says nothing of what differs from run to run, such
    as a busy neighbour: --relative-to c takes most of that out.

    \b
    Example:
      python -m bench compare old.json new.json --relative-to c --metric worker_cpu --fail-above 1.1
    """
    found = comparison.compare(
        results.load(before_file),
        results.load(after_file),
        relative_to=relative_to,
        allow_different_machines=different_machines,
    )
    changes = [
        one
        for one in found.changes
        if (not contenders or one.after.contender in contenders)
        and (
            not metrics
            or one.after.metric in metrics
            or f"{one.after.experiment}.{one.after.metric}" in metrics
        )
    ]
    if not changes:
        raise InputError(
            "the two results have nothing of that in common: see what they hold with bench report"
        )
    _console().print(_changes_table(changes))
    for name, missing in (("BEFORE", found.only_before), ("AFTER", found.only_after)):
        if missing:
            click.echo(f"{len(missing)} series are only in {name}", err=True)
    if fail_above is None:
        return
    unsure = [one for one in changes if one.ratio is not None and not one.ratio.is_sure]
    if unsure:
        raise InputError(
            f"{len(unsure)} of {len(changes)} comparisons have too few rounds to judge: --fail-above "
            f"needs four in both results"
        )
    failed = [one for one in changes if one.is_worse_by(fail_above)]
    if failed:
        named = ", ".join(
            f"{one.after.experiment}.{one.after.metric} of {one.after.contender} "
            f"({described(one.after)})".removesuffix(" ()")
            for one in failed
        )
        raise NfqproxyError(f"worse by more than {fail_above:g} x: {named}")


@click.command("baseline")
@click.argument("result_file", metavar="RESULT", type=_FILE)
@click.option(
    "-o", "--output", type=_FILE, default=baselines.PATH, help="Default: bench/baseline.json."
)
def baseline_command(result_file: Path, output: Path) -> None:
    """Store a result's ratios to the C worker, for `check`. Take it on an idle machine.

    \b
    Example:
      python -m bench run --experiments connections --profile full -o result.json
      python -m bench baseline result.json
    """
    result = results.load(result_file)
    baselines.save(baselines.of(result), output)
    for doubt in content.doubts(result):
        click.echo(doubt, err=True)
    click.echo(f"wrote {output}", err=True)


@click.command("check")
@click.option(
    "--baseline",
    "baseline_file",
    type=_FILE,
    default=baselines.PATH,
    help="Default: bench/baseline.json.",
)
@click.option("--profile", type=_ALL_PROFILES, default="short", show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0),
    default=baselines.TOLERANCE,
    show_default=True,
    help="By how much the ratio may grow, as a share.",
)
def check_command(baseline_file: Path, profile: str, seed: int, tolerance: float) -> None:
    """Measure new connections and hold nfqproxy / C against the stored ratio; exit 1 if it grew.

    It grew if its whole interval lies above the stored ratio and the tolerance.

    \b
    Example:
      python -m bench check --tolerance 0.1
    """
    stored = baselines.load(baseline_file)
    chosen = experiments([stored.experiment])
    _check_root()
    with _progress() as progress:
        result = runner.run(
            chosen, replace(PROFILES[profile], seed=seed), progress, keep=lambda so_far: None
        )
    for one in result.ran:
        if one.failure:
            raise NfqproxyError(f"{one.name} gave no values: {one.failure}")
    checks = baselines.check(stored, result.observations, tolerance=tolerance)
    _console().print(_checks_table(checks))
    if (stored.machine, stored.kernel) != (result.machine, result.kernel):
        click.echo(
            f"The baseline is of another machine ({stored.machine.get('cpu')}, {stored.kernel}).",
            err=True,
        )
    for doubt in content.doubts(result):
        click.echo(doubt, err=True)
    if any(one.is_regression for one in checks):
        raise NfqproxyError(
            f"worker CPU to the C worker grew by more than {tolerance:.0%}: find the commit, or if it is "
            f"meant, write a new baseline"
        )


@click.command(
    "micro", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--fast", is_flag=True, help="A few seconds, rough figures.")
@click.option("-o", "--output", type=_FILE, help="Write pyperf's JSON here.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def micro_command(fast: bool, output: Path | None, arguments: tuple[str, ...]) -> None:
    """Time single functions of the packet path and of the control plane with pyperf. Needs no root.

    Further arguments are pyperf's own (after --). Two files are compared by `python -m pyperf compare_to`.

    \b
    Example:
      python -m bench micro --fast
      python -m bench micro -o micro.json -- --only assemble
    """
    if importlib.util.find_spec("pyperf") is None:
        raise HostError(
            "the package pyperf is not installed: ./task setup installs it, or pip install pyperf"
        )
    words = [sys.executable, "-m", "bench.micro", *(_FAST if fast else ())]
    if output is not None:
        if output.exists():
            raise InputError(f"{output} is there already, and pyperf keeps it: give another file")
        _check_writable(output)
        words += ["-o", str(output)]
    status = subprocess.run(
        [*words, *arguments], check=False, cwd=Path(__file__).parents[1]
    ).returncode
    if status:
        raise NfqproxyError(f"bench.micro ended with status {status}; see above")


def _title(result: Result) -> str:
    return f"nfqproxy bench, {(result.commit or 'no commit')[:12]}, {result.started[:10]}"


def _plots(sections: Sequence[content.Section], directory: Path) -> list[tuple[Path, str]]:
    return [
        (directory / f"{name}.svg", charts.text_of(plot) + "\n")
        for section in sections
        for name, plot in section.plots
    ]


def _write_report(result: Result, directory: Path) -> None:
    sections = content.sections(result)
    results.write_text(directory / "report.md", markdown.render(sections))
    results.write_text(directory / "report.html", page.render(sections, _title(result)))
    for path, text in _plots(sections, directory):
        results.write_text(path, text)


def _changes_table(changes: Sequence[comparison.Change]) -> Table:
    table = Table(
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
        title="After / before, with an interval of 95 %",
        caption=(
            f"{len(changes)} comparisons: about {len(changes) / 20:.0f} would be marked by chance alone. "
            "better, worse: the interval leaves 1 out. ?: too few rounds to tell."
        ),
    )
    for column in ("experiment", "metric", "contender", "parameters"):
        table.add_column(column)
    for column in ("before", "after", "after / before", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for one in changes:
        middles = [each.interval.middle for each in (one.before, one.after)]
        divisor, label = scale(one.after.unit, middles)
        table.add_row(
            one.after.experiment,
            one.after.metric,
            one.after.contender,
            ", ".join(f"{key} {value}" for key, value in one.after.facets),
            *(f"{figure(middle / divisor)} {label}" for middle in middles),
            interval(one.ratio) if one.ratio is not None else "-",
            _mark(one),
        )
    return table


def _mark(change: comparison.Change) -> str:
    if change.ratio is not None and not change.ratio.is_sure:
        return "?"
    if not change.is_beyond_noise:
        return ""
    return "worse" if change.is_worse else "better"


def _checks_table(checks: Sequence[baselines.Check]) -> Table:
    table = Table(
        box=box.SIMPLE, title="Worker CPU of nfqproxy / C, in the same round", title_justify="left"
    )
    for column in ("parameters", "stored", "measured", "limit", ""):
        table.add_column(column, justify="left" if column == "parameters" else "right")
    for one in checks:
        mark = "REGRESSION" if one.is_regression else "better" if one.is_better else "ok"
        table.add_row(
            one.parameters or "-",
            figure(one.stored),
            interval(one.measured),
            figure(one.limit),
            mark,
        )
    return table


def _console() -> Console:
    # Without a terminal rich would assume 80 columns and break the figures.
    return Console(width=None if sys.stdout.isatty() else 140)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Lines of progress on stderr with the time since the beginning; on a terminal one moving line."""
    start = time.monotonic()
    if not sys.stderr.isatty():
        yield lambda line: click.echo(f"{time.monotonic() - start:7.1f} s  {line}", err=True)
        return
    with Console(stderr=True).status("") as status:
        yield lambda line: status.update(f"{time.monotonic() - start:.0f} s  {line}")


def _check_root() -> None:
    if os.geteuid() != 0:
        raise HostError("the bench makes network namespaces and rules in them: run it as root")


def _check_writable(path: Path) -> None:
    """Before half an hour of measuring, not after it."""
    directory = path.resolve().parent
    if path.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise InputError(f"{path} cannot be written there: give a file in a directory that exists")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror}; give another") from None
