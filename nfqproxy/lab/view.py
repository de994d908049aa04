"""How a run looks on a terminal: progress on standard error, the result on standard output."""

import time
from collections.abc import Callable
from types import TracebackType

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

__all__ = ["Screen", "show_commands", "show_result"]


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
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()
        self._bar.stop()

    def step(self, text: str) -> None:
        """A step of building or removing."""
        elapsed = time.monotonic() - self._start
        self._bar.console.print(f"[dim]{elapsed:5.1f} s[/dim]  {text}")

    def note(self, text: str) -> None:
        """Something worth a line."""
        self.step(f"[bold yellow]{text}[/bold yellow]")

    def phase(self, title: str, total: int) -> Callable[[Progress], None]:
        """A new bar; the one before is full."""
        self._finish()
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
    console.print()
    console.print(_spread_table(result))
    console.print(_latency_table(result))
    console.print(_kill_table(result))
    console.print(
        "[bold]What the kernel holds[/bold] (conntrack -L: client to Service, then reply)"
    )
    for line in result.conntrack:
        console.print(Text("  " + line), soft_wrap=True)
    console.print()
    for check in result.checks:
        if not check.ok:
            console.print(f"[red]failed[/red]  {check.name}: {check.detail}")
    console.print(verdict(result))


def verdict(result: LabResult) -> str:
    """One line."""
    flows = sum(spread.flows for spread in result.spreads)
    queued = sum(spread.queued for spread in result.spreads)
    lost = result.kill.tcp.failed + result.kill.dns.failed + result.kill.held.failed
    word = "[bold green]PASS[/bold green]" if result.ok else "[bold red]FAIL[/bold red]"
    return (
        f"{word}  {flows:,} connections spread {':'.join(map(str, result.weights))} by Python,"
        f" {queued / flows:.3f} packets each through userspace,"
        f" {lost} failed while the worker was killed"
    )


def _table(title: str) -> Table:
    return Table(title=f"[bold]{title}[/bold]", title_justify="left", title_style="")


def _spread_table(result: LabResult) -> Table:
    table = _table("Where new connections went, and how often userspace was asked")
    table.add_column("frontend")
    table.add_column("backend")
    for title in ("weight", "expected", "got", "answers", "chi-square p", "queued", "per conn."):
        table.add_column(title, justify="right")
    for spread in result.spreads:
        for index, part in enumerate(spread.backends):
            first = index == 0
            table.add_row(
                spread.frontend if first else "",
                part.backend,
                str(part.weight),
                f"{part.expected_share:.1%}",
                f"{part.share:.1%}",
                f"{part.answers:,}",
                f"{spread.chi_square.p_value:.3f}" if first else "",
                f"{spread.queued:,}" if first else "",
                f"{spread.per_flow:.3f}" if first else "",
                end_section=index == len(spread.backends) - 1,
            )
    return table


def _latency_table(result: LabResult) -> Table:
    table = _table("connect() one at a time, three paths in turn, microseconds")
    table.add_column("path")
    table.add_column("to")
    for title in ("p50", "p90", "p99", "connects"):
        table.add_column(title, justify="right")
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
    pids = ", ".join(map(str, kill.killed)) or "none"
    after = "not seen" if kill.recovered_s is None else f"{kill.recovered_s:.2f} s later"
    table = _table(
        f"Worker killed in mid-traffic (SIGKILL to {pids} after {kill.after_s:.1f} s;"
        f" a new one decides: {after})"
    )
    table.add_column("load")
    for title in ("begun", "failed", "sent again", "slowest ms", "by the fallback"):
        table.add_column(title, justify="right")

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
