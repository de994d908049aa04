"""CPU time, of single processes and of the whole machine.

A process's total is ``sum_exec_runtime`` in nanoseconds (``/proc/PID/task/*/schedstat``,
Documentation/scheduler/sched-stats.rst). Its division into user and system time comes from
``/proc/PID/stat``, where a kernel with tick accounting samples it at CONFIG_HZ: coarse for one
round, sound over several. Softirq work (a forwarded packet's way to the device) is charged to the
process it interrupts or that triggered it, except on kernels with CONFIG_IRQ_TIME_ACCOUNTING.

The machine's busy time is wall time less idle, iowait and steal of ``/proc/stat``, in steps of one
USER_HZ tick (10 ms): with 20,000 connections, 0.5 us each. Everything else that runs on the
machine is in it.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nfqproxy.errors import NfqproxyError

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessTime:
    """CPU time that a set of processes has used."""

    run_ns: int = 0
    wait_ns: int = 0
    """Time it was ready to run while another process had its CPU."""
    user_ticks: int = 0
    system_ticks: int = 0

    def __add__(self, other: "ProcessTime") -> "ProcessTime":
        return ProcessTime(
            run_ns=self.run_ns + other.run_ns,
            wait_ns=self.wait_ns + other.wait_ns,
            user_ticks=self.user_ticks + other.user_ticks,
            system_ticks=self.system_ticks + other.system_ticks,
        )

    def __sub__(self, other: "ProcessTime") -> "ProcessTime":
        return ProcessTime(
            run_ns=self.run_ns - other.run_ns,
            wait_ns=self.wait_ns - other.wait_ns,
            user_ticks=self.user_ticks - other.user_ticks,
            system_ticks=self.system_ticks - other.system_ticks,
        )


def process_time(pids: Iterable[int]) -> ProcessTime:
    """What the processes have used so far, all their threads; NfqproxyError if one is gone."""
    total = ProcessTime()
    for pid in pids:
        try:
            total += _process_time(Path("/proc") / str(pid))
        except (FileNotFoundError, ProcessLookupError):
            raise NfqproxyError(f"process {pid}, which is measured, has ended") from None
    return total


def _process_time(process: Path) -> ProcessTime:
    run = wait = 0
    for thread in (process / "task").iterdir():
        fields = (thread / "schedstat").read_text().split()
        run += int(fields[0])
        wait += int(fields[1])
    # After the command's closing parenthesis field 3 (state) comes first; utime is field 14.
    stat = (process / "stat").read_text().rpartition(")")[2].split()
    return ProcessTime(
        run_ns=run, wait_ns=wait, user_ticks=int(stat[11]), system_ticks=int(stat[12])
    )


def kernel_thread_times() -> dict[int, int]:
    """CPU ns of the kernel's workers and softirq threads by pid: work that a packet causes later.

    On Linux 6.18 the hash of queued packets is resized by a kworker whenever the queue's depth
    swings (rht_deferred_worker); a worker process that seems cheap may have left work there.
    """
    times: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if (process / "comm").read_text().startswith(("kworker/", "ksoftirqd/")):
                times[int(process.name)] = int((process / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return times


def since(before: dict[int, int], after: dict[int, int]) -> int:
    """Sum of what each thread used between two readings; threads that ended are left out."""
    return sum(time_ns - before.get(pid, 0) for pid, time_ns in after.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTime:
    """An instant, and the time that all CPUs have not worked for us until then."""

    at_ns: int
    unused_ns: int


def machine_time() -> MachineTime:
    """The machine's clock and idle time now."""
    # cpu user nice system idle iowait irq softirq steal guest guest_nice (proc_stat(5))
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    unused = int(fields[4]) + int(fields[5]) + int(fields[8])
    return MachineTime(at_ns=time.monotonic_ns(), unused_ns=unused * _TICK_NS)


def busy_ns(before: MachineTime, after: MachineTime) -> int:
    """CPU time that the whole machine spent between two instants."""
    cpus = os.cpu_count() or 1
    return max(0, (after.at_ns - before.at_ns) * cpus - (after.unused_ns - before.unused_ns))
