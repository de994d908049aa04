"""Processes that the bench starts: placed on a CPU, heard, ended by their own pid."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nfqproxy.kernel.netns import Namespace

_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """A running program and what it has said."""

    place: Namespace
    popen: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    def said(self) -> str:
        """Its standard output so far."""
        return Path(self.output.name).read_text()

    def complained(self) -> str:
        """The last lines of its standard error."""
        return "\n".join(Path(self.errors.name).read_text().splitlines()[-15:])

    def stop(self) -> int:
        """Ends it with SIGTERM, after a grace with SIGKILL; its exit status."""
        return self.place.stop(self.popen, grace_s=_GRACE_S)


@contextlib.contextmanager
def service(place: Namespace, *command: str, cpu: int) -> Iterator[Service]:
    """Starts a program in a namespace on one CPU, ended with the context.

    It leads a session of its own, so that Ctrl-C reaches only the bench.
    """
    with (
        tempfile.NamedTemporaryFile(prefix="nfqb-out-") as output,
        tempfile.NamedTemporaryFile(prefix="nfqb-err-") as errors,
    ):
        # taskset becomes the program: the pid is the program's.
        words = ("taskset", "-c", str(cpu), *command)
        popen = place.popen(*words, stdout=output, stderr=errors)
        running = Service(place, popen, output, errors)
        try:
            yield running
        finally:
            running.stop()


def pin(pid: int, cpu: int) -> None:
    """Binds all threads of a process to one CPU."""
    for thread in (Path("/proc") / str(pid) / "task").iterdir():
        os.sched_setaffinity(int(thread.name), {cpu})


def descendants(pid: int) -> set[int]:
    """A process and all its living descendants, by the parent in ``/proc/PID/stat`` (proc(5))."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = (entry / "stat").read_text()
            # The command's name, in parentheses, may hold anything; the parent is the 2nd after it.
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    open_ends = [pid]
    while open_ends:
        one = open_ends.pop()
        found.add(one)
        open_ends += children.get(one, [])
    return found


def memory(pid: int, field: str) -> int:
    """A field of ``/proc/PID/status`` in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/{pid}/status has no {field}")
