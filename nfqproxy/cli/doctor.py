"""``nfqproxy doctor``: can the proxy run on this host, and what to do if not."""

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nfqproxy.app import rule_settings
from nfqproxy.cli.data_path_options import data_path_options
from nfqproxy.control.address import canonical_cidr
from nfqproxy.doctor.check import Report, Result, Status, examine
from nfqproxy.doctor.checklist import checklist
from nfqproxy.errors import InputError
from nfqproxy.sources import config as configuration

_STYLES = {
    Status.OK: "green",
    Status.WARN: "yellow",
    Status.FAIL: "bold red",
    Status.UNKNOWN: "magenta",
}
_STATUS_WIDTH = max(len(status) for status in Status)
_TITLE_WIDTH = 19
_EFFECT = "effect"
_FIX = "what to do"


@click.command()
@click.option("-o", "output", type=click.Choice(["text", "json"]), default="text")
@click.option("--mode", type=click.Choice(configuration.MODES), default="replace")
@click.option("--workers", type=int, default=1, help="Worker processes that would run. Default: 1.")
@click.option(
    "--queue", "first_queue", type=int, default=100, help="Number of the first queue. Default: 100."
)
@click.option(
    "--iptables", type=click.Choice(configuration.IPTABLES), default="auto", help="Default: auto."
)
@data_path_options
@click.option(
    "--service-cidr",
    "service_cidrs",
    multiple=True,
    help="The cluster's Service network, to see that it is routable; repeatable.",
)
def doctor(
    output: str,
    mode: str,
    workers: int,
    first_queue: int,
    iptables: str,
    service_cidrs: tuple[str, ...],
    **data_path: Any,
) -> int:
    """Probe whether the proxy can run in this network namespace, and say what to do if not.

    Nothing is changed here: the kernel is tried, and one real connection is sent through the real proxy,
    in network namespaces that are removed afterwards. Exit status: 0 it can run, 3 it cannot.

    Example: sudo nfqproxy doctor
    """
    flags = {
        "mode": mode,
        "workers": workers,
        "first_queue": first_queue,
        "iptables": iptables,
        **data_path,
    }
    settings = rule_settings(configuration.from_file_and_flags(None, flags))
    checks = checklist(settings, _networks(service_cidrs))
    report = Report()
    # Ended from outside, the namespaces go as well. (SIGINT raises KeyboardInterrupt by itself.)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    results = examine(checks, report)
    if output == "json":
        for _result in results:
            pass
        document = {"ok": report.is_ok, "checks": [msgspec.to_builtins(r) for r in report.results]}
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
        return report.exit_code
    console = Console()
    with console.status("examining") as waiting:
        for index, result in enumerate(results, 1):
            if console.is_terminal:
                console.print(_paragraph(result))
            else:
                click.echo(_lines(result))
            if index < len(checks):
                waiting.update(checks[index].title)
    console.print(_summary(report), soft_wrap=True)
    return report.exit_code


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _networks(texts: tuple[str, ...]) -> list[str]:
    found = []
    for text in texts:
        try:
            found.append(canonical_cidr(text))
        except ValueError:
            raise InputError(
                f'--service-cidr: "{text}" is no network; write it like 10.96.0.0/12'
            ) from None
    return found


def _rows(result: Result) -> list[tuple[str, str, str]]:
    """Status, title and finding; effect and fix below when something is amiss."""
    rows = [(str(result.status), result.title, result.found)]
    if result.status is not Status.OK:
        rows += [("", _EFFECT, result.effect), ("", _FIX, result.fix)]
    return rows


def _lines(result: Result) -> str:
    """For a file or a pipe: each text on one line, so that it can be searched and copied."""
    return "\n".join(
        f"{first:<{_STATUS_WIDTH}}  {second:<{_TITLE_WIDTH}}  {third}"
        for first, second, third in _rows(result)
    )


def _paragraph(result: Result) -> Table:
    """For a terminal: the columns wrapped and coloured."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=_STATUS_WIDTH, style=_STYLES[result.status])
    table.add_column(width=_TITLE_WIDTH)
    table.add_column(overflow="fold")
    for first, second, third in _rows(result):
        style = "bold" if second == _FIX else ""
        table.add_row(Text(first), Text(second, style), Text(third, style))
    return table


def _summary(report: Report) -> Text:
    counts = dict.fromkeys(Status, 0)
    for result in report.results:
        counts[result.status] += 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if report.is_ok and report.has_crashed:
        return Text(f"\nThe proxy can run here, but a check itself failed ({told}).", "yellow")
    if report.is_ok:
        return Text(f"\nThe proxy can run here ({told}).", "green")
    return Text(
        f'\nThe proxy cannot run here yet ({told}): do what stands beside "what to do", from the'
        " top.",
        "bold red",
    )
