"""Signals that end a block: in a process of its own, for pytest has handlers and a timer too."""

import subprocess
import sys

import pytest

START = """
import signal, sys, time, weakref
from nfqproxy.kernel.processes import interrupts, postponed, uninterrupted

class Gone:
    pass

def ask(*_):
    signal.raise_signal(signal.{name})

def step():
    with postponed():
        ask()
        print(1)
    print(2)

try:
    with interrupts():
        {block}
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
"""
AFTER = "; time.sleep(20); print('slept')"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    "block",
    [
        "ask()" + AFTER,
        # Python drops what is raised in there.
        "gone = Gone(); ref = weakref.ref(gone, ask); del gone" + AFTER,
        "Gone.__del__ = ask; Gone()" + AFTER,
        "Gone.__del__ = ask; Gone()",
        # What threading's locks make of it.
        "exec('try: ask()\\nfinally: raise RuntimeError')",
    ],
)
def test_a_signal_ends_the_block_wherever_it_comes(name: str, block: str) -> None:
    assert outcome(block, name) == ("interrupted\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGALRM"])
def test_a_clean_up_is_not_interrupted(name: str) -> None:
    assert outcome("exec('with uninterrupted(): ask()')", name) == ("went on\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_step_is_finished_before_a_signal_ends_the_block(name: str) -> None:
    assert outcome("step()", name) == ("1\ninterrupted\n", "")


def test_what_else_is_dropped_is_told_as_ever() -> None:
    said, told = outcome("Gone.__del__ = lambda _: 1 / 0; Gone()", "SIGINT")
    assert said == "went on\n"
    assert "ZeroDivisionError" in told


def outcome(block: str, name: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", START.format(name=name, block=block)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout, done.stderr
