"""Processes that this program started: known beyond doubt, and ended.

Each is started as the leader of a session of its own. A process counts as ours when it is that
leader (same pid *and* same start time) or belongs to its session. The kernel does not hand out a
pid again while a session still bears it, so a stranger cannot be hit (proc(5), setsid(2)).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from msgspec import Struct

__all__ = ["ProcessRef", "interrupts", "stop_processes", "uninterrupted"]

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.01
"""How soon a lost KeyboardInterrupt comes again, seconds."""


@contextmanager
def interrupts() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the block with KeyboardInterrupt (main thread).

    Python drops what a signal handler raises inside a finalizer or the callback of a weak reference, such as
    runs at the end of every ``threading.Thread`` (sys.unraisablehook): then it is raised once more, outside of it.
    Inside a lock of ``threading`` it comes out as a RuntimeError; after a signal every exception is the signal's.
    """
    is_asked = False

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        nonlocal is_asked
        is_asked = True
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    held = {s: signal.signal(s, interrupt) for s in (*_ENDS, signal.SIGALRM)}
    try:
        yield
        if is_asked:
            raise KeyboardInterrupt
    except Exception as error:
        if is_asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in held.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a clean-up finish: what would interrupt it is ignored meanwhile (main thread; else no-op)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {s: signal.signal(s, signal.SIG_IGN) for s in (*_ENDS, signal.SIGALRM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """Let a short step finish; what would interrupt it comes right after (main thread; else no-op).

    Programs started meanwhile hear signals as always: a handler, unlike SIG_IGN, does not pass to them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    held = {s: signal.signal(s, lambda number, _frame: noted.append(number)) for s in _ENDS}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])


class ProcessRef(Struct, frozen=True):
    """A process of ours, told apart from a later one with the same pid."""

    pid: int
    start_ticks: int
    """Start time after boot in clock ticks: field 22 of /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int) -> "ProcessRef":
        """The process that bears this pid now; start_ticks is 0 when there is none."""
        stat = _stat(pid)
        return cls(pid, stat[1] if stat else 0)

    def is_alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.start_ticks and stat[2] != "Z"


def _stat(pid: int) -> tuple[int, int, str] | None:
    """Session, start time and state of a process from /proc/PID/stat; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name (field 2) is in parentheses and may hold anything, ')' included.
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[3]), int(fields[19]), fields[0]


def _session_members(leaders: Iterable[ProcessRef]) -> list[int]:
    """Living pids that are one of the leaders or belong to a leader's session."""
    start = {ref.pid: ref.start_ticks for ref in leaders}
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        stat = _stat(pid)
        if stat is None or stat[2] == "Z" or stat[0] not in start:
            continue
        # A leader's own start time is checked; members are ours by the session that bears its pid.
        leader = _stat(stat[0])
        if leader is None or leader[1] == start[stat[0]]:
            found.append(pid)
    return found


def stop_processes(leaders: Sequence[ProcessRef], *, grace_s: float = 3.0) -> None:
    """Terminate the leaders, wait ``grace_s`` seconds at most, kill the rest of their sessions.

    Idempotent; returns when none is left. Zombies are the parent's to reap.
    """
    for ref in leaders:
        if ref.is_alive():
            _signal(ref.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while leaders and any(ref.is_alive() for ref in leaders) and time.monotonic() < deadline:
        time.sleep(0.005)
    for attempt in range(50):
        members = _session_members(leaders) if leaders else []
        if not members:
            return
        for pid in members:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.002 * (attempt + 1))


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself
