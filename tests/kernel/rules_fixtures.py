"""Network namespaces for the tests of rules and sets: random names, removed by the test."""

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)

TOOLS = (
    "ip",
    "nft",
    "ipset",
    "iptables-nft",
    "iptables-legacy",
    "ip6tables-nft",
    "ip6tables-legacy",
)


def require_kernel() -> None:
    """Skip where the rules cannot be tried; in continuous integration fail instead."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    problem = "needs root" if os.geteuid() else f"needs {', '.join(missing)}" if missing else ""
    if problem:
        if os.environ.get("CI") == "true":
            pytest.fail(f"kernel tests must run here: {problem}")
        pytest.skip(problem)


@contextmanager
def namespaces(*roles: str) -> Iterator[dict[str, str]]:
    """Make one namespace for every role; yield role -> name."""
    prefix = f"nfqr{secrets.token_hex(3)}"
    names = {role: f"{prefix}-{role}" for role in roles}
    made = []
    try:
        for name in names.values():
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.append(name)
            sh(name, "ip", "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=True)


def sh(name: str, *argv: str, stdin: str = "", check: bool = True) -> str:
    """Run a command in a namespace and return its output."""
    done = subprocess.run(
        ["ip", "netns", "exec", name, *argv], input=stdin, capture_output=True, text=True
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


def inside(name: str, function: Callable[[], T]) -> T:
    """Call ``function`` in a namespace, in a thread of its own: only threads can be moved."""
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with Path("/run/netns", name).open() as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def state(name: str) -> dict[str, str]:
    """Return every rule, chain and set of a namespace as text, dates left out."""
    listings = {}
    for tool in ("iptables", "ip6tables"):
        for backend in ("nft", "legacy"):
            text = sh(name, f"{tool}-{backend}-save")
            listings[f"{tool}-{backend}"] = "".join(
                line + "\n" for line in text.splitlines() if not line.startswith("#")
            )
    listings["ipset"] = sh(name, "ipset", "list")
    listings["nft"] = sh(name, "nft", "list", "ruleset")
    return listings
