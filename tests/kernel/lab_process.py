"""``nfqproxy lab`` as a process: run to its end, or up to a moment of it."""

import signal
import subprocess
import sys
from typing import IO

import pytest

from nfqproxy.kernel.netns import NETNS_DIR

LAB = [sys.executable, "-m", "nfqproxy", "lab"]


def lab(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*LAB, *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def namespaces(prefix: str) -> list[str]:
    return [entry.name for entry in NETNS_DIR.iterdir() if entry.name.startswith(prefix)]


class Running:
    """A lab in progress, read up to a line of its standard error."""

    def __init__(
        self, until: str, *arguments: str, stdout: int | IO[str] = subprocess.DEVNULL
    ) -> None:
        self.child = subprocess.Popen(
            [*LAB, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        self.prefix = ""
        assert self.child.stderr is not None
        for line in self.child.stderr:
            if "namespaces nfqp-" in line:
                self.prefix = "nfqp-" + line.split("nfqp-")[1].split("*")[0]
            if until in line:
                return
        pytest.fail(f"the lab ended before it said {until!r}")

    def end(self, number: signal.Signals) -> int:
        self.child.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self.child.stderr is not None
        self.child.stderr.read()
        self.child.stderr.close()
        return self.child.wait(60)
