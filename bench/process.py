"""Processes that the bench starts: placed on a CPU, ended by their own pid."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_GRACE_S = 10


@dataclass(frozen=True, slots=True)
class Service:
    """A running program and what it has said."""

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
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                # The group is the program's own: it was started as the leader of a new session.
                os.killpg(self.pid, signal.SIGKILL)
        return self.popen.wait()


@contextlib.contextmanager
def service(command: Sequence[str], *, cpu: int) -> Iterator[Service]:
    """Starts a program on one CPU; its own session, so that Ctrl-C reaches only the bench."""
    with (
        tempfile.NamedTemporaryFile(prefix="nfqb-out-") as output,
        tempfile.NamedTemporaryFile(prefix="nfqb-err-") as errors,
    ):
        popen = subprocess.Popen(
            ["taskset", "-c", str(cpu), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        running = Service(popen, output, errors)
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
