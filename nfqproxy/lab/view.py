"""How a run looks on a terminal: progress on standard error, the result on standard output."""

import time
from collections.abc import Callable
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as ProgressBar,
)
from rich.table import Table
from rich.text import Text

from nfqproxy.lab.jobs import Progress, TargetReport
from nfqproxy.lab.result import LabResult
from nfqproxy.model import DataPath

__all__ = ["Screen", "new_table", "show_commands", "show_result", "verdict_word"]


class Screen:
    """The lines and bars of a run in progress; nothing at all when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar = ProgressBar(
            TextColumn("  {task.description:<36}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[failed]}"),
            console=self._console,
        )
        self._start = time.monotonic()
        self._task: TaskID | None = None

    def __enter__(self) -> "Screen":
        return self  # the bars start with the first phase: an error before it is alone on its line

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()
        if self._bar.live.is_started:
            self._bar.stop()

    def step(self, text: str) -> None:
        """A step of building or removing."""
        elapsed = time.monotonic() - self._start
        self._console.print(f"[dim]{elapsed:5.1f} s[/dim]  {text}")

    def note(self, text: str) -> None:
        """Something worth a line."""
        self.step(f"[bold yellow]{text}[/bold yellow]")

    def phase(self, title: str, total: int) -> Callable[[Progress], None]:
        """A new bar; the one before is full."""
        self._finish()
        if not self._bar.live.is_started:
            self._bar.start()
        task = self._task = self._bar.add_task(title, total=total, failed="")

        def advance(so_far: Progress) -> None:
            failed = f"[red]{so_far.failed} failed[/red]" if so_far.failed else ""
            self._bar.update(task, completed=so_far.done, failed=failed)

        return advance

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bar.tasks[self._task].total
            self._bar.update(self._task, completed=total)
            self._task = None


def show_result(result: LabResult, console: Console) -> None:
    """The tables and the verdict."""
    workers = "worker" if result.workers == 1 else "workers"
    is_default = result.data_path == DataPath.CTNETLINK
    data_path = "" if is_default else f", data path {result.data_path}"
    console.print()
    console.print(
        f"client -> node (nfqproxy: {result.workers} {workers}, reader {result.reader})"
        f" -> {len(result.weights)} backends\nLinux {result.kernel}, {result.cpus} cpus,"
        f" weights {':'.join(map(str, result.weights))}, seed {result.seed}{data_path}",
        soft_wrap=True,
    )
    console.print()
    console.print(_spread_table(result))
    console.print()
    console.print(_latency_table(result))
    console.print()
    console.print(_kill_table(result))
    console.print()
    console.print(
        "[bold]What the kernel holds[/bold] (conntrack -L: client to Service, then reply)"
    )
    for line in result.conntrack:
        console.print(Text(line), soft_wrap=True)
    console.print()
    for check in result.checks:
        if not check.ok:
            console.print(f"[red]failed[/red]  {check.name}: {check.detail}")
    console.print(verdict(result), soft_wrap=True)


def verdict(result: LabResult) -> str:
    """One line."""
    flows = sum(spread.flows for spread in result.spreads)
    queued = sum(spread.queued for spread in result.spreads)
    lost = result.kill.tcp.failed + result.kill.dns.failed + result.kill.held.failed
    return (
        f"{verdict_word(result.ok)}  {flows:,} connections spread {':'.join(map(str, result.weights))};"
        f" {queued / flows:.3f} packets queued each; kill lost {lost}"
    )


def verdict_word(ok: bool) -> str:
    """PASS or FAIL, with rich's markup."""
    return "[bold green]PASS[/bold green]" if ok else "[bold red]FAIL[/bold red]"


def new_table(title: str) -> Table:
    """A table in the lab's manner."""
    # Narrow gaps and no frame: everything fits a terminal of 80 columns.
    return Table(
        title=f"[bold]{title}[/bold]",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def _spread_table(result: LabResult) -> Table:
    table = new_table("Where new connections went")
    table.add_column("frontend", no_wrap=True)
    table.add_column("new", justify="right")
    for part in result.spreads[0].backends:
        table.add_column(part.backend, justify="right", no_wrap=True)
    table.add_column("chi²\np", justify="right")
    table.add_column("packets\nqueued", justify="right")
    expected = [f"{part.expected_share:.1%}" for part in result.spreads[0].backends]
    table.add_row("expected, by weight", "", *expected, "", "1.000", style="dim")
    for spread in result.spreads:
        table.add_row(
            Text(spread.frontend),  # no markup: an IPv6 address is in brackets
            f"{spread.flows:,}",
            *(f"{part.share:.1%}" for part in spread.backends),
            f"{spread.chi_square.p_value:.3f}",
            f"{spread.per_flow:.3f}",
        )
    return table


def _latency_table(result: LabResult) -> Table:
    table = new_table("What connect() takes, three paths in turn, microseconds")
    table.add_column("path", min_width=12)
    table.add_column("to", min_width=18)
    for title in ("p50", "p90", "p99"):
        table.add_column(title, justify="right", min_width=7)
    table.add_column("connects", justify="right", min_width=9)
    for latency in result.latencies:
        times = latency.connect_us
        table.add_row(
            latency.path,
            latency.address,
            f"{times.p50:.0f}",
            f"{times.p90:.0f}",
            f"{times.p99:.0f}",
            f"{times.samples:,}",
        )
    return table


def _kill_table(result: LabResult) -> Table:
    kill = result.kill
    table = new_table(
        f"Worker killed after {kill.after_s:.1f} s of load; the kernel's fallback served for"
        f" {kill.fallback_s:.2f} s"
    )
    table.add_column("load", min_width=34)
    for title in ("begun", "failed", "sent\nagain", "slowest\nms", "decided by\nfallback"):
        table.add_column(title, justify="right", min_width=6)

    def row(name: str, part: TargetReport, again: str, fallback: str) -> None:
        failed = f"[red]{part.failed}[/red]" if part.failed else "[green]0[/green]"
        slowest = f"{part.connect_us.max / 1000:.1f}"
        table.add_row(name, f"{part.attempts:,}", failed, again, slowest, fallback)

    row("new TCP connections", kill.tcp, "-", f"{kill.fallback_tcp:,}")
    row("DNS queries", kill.dns, str(kill.dns.retries), f"{kill.fallback_udp:,}")
    row(f"TCP held open ({kill.held.retries:,} requests)", kill.held, "-", "-")
    return table


def show_commands(commands: list[tuple[str, str]], console: Console) -> None:
    """Lines to copy, one per thing to try."""
    for what, command in commands:
        console.print(Text(f"  {what + ':':<17} {command}"), soft_wrap=True)
