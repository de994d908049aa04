"""Where a result comes from: everything somebody needs to repeat it or to doubt it."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from bench import native

_PACKAGES = ("uvloop", "netfilterqueue", "msgspec", "pyroute2")
_PROGRAMS = {
    "iptables": ("iptables", "--version"),
    "nft": ("nft", "--version"),
    "haproxy": ("haproxy", "-v"),
    "iperf": ("iperf3", "--version"),
}

Facts = dict[str, str | int | bool | None]


def provenance() -> dict[str, Facts | str | bool | None]:
    """Commit, machine, kernel and versions of what takes part."""
    return {
        "commit": _said("git", "rev-parse", "HEAD"),
        "is_modified": bool(_said("git", "status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
        },
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {
            **{name: _version(name) for name in _PACKAGES},
            **{name: _first_line(*command) for name, command in _PROGRAMS.items()},
            "cc": _first_line(native.compiler(), "--version"),
        },
    }


def _first_line(*command: str) -> str | None:
    said = _said(*command)
    return said and said.split("\n", 1)[0]


def _said(*command: str) -> str | None:
    """The command's output, None if it fails or is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
