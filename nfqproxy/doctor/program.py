"""The program's own ground: privileges, tools, Python, the kernel's version."""

import errno
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable

from nfqproxy.doctor.check import Finding, fail, ok, warn
from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel import commands
from nfqproxy.kernel.capabilities import Capability, lacking

__all__ = [
    "REQUIRED_TOOLS",
    "TOOLS",
    "capabilities",
    "kernel_version",
    "netfilterqueue",
    "python",
    "tool",
]

_VERSION = re.compile(r"v?(\d+(?:\.\d+)+)")
_OLDEST_KERNEL_TRIED = (6, 1)

REQUIRED_TOOLS = ("iptables", "ip6tables", "ipset", "nft")
"""The proxy programs the kernel by these."""
TOOLS = {
    "iptables": ("iptables", "the IPv4 queue rules cannot be put in"),
    "ip6tables": ("iptables", "the IPv6 queue rules cannot be put in"),
    "ipset": ("ipset", "the sets of Service addresses cannot be made"),
    "nft": ("nftables", "the kernel fallback cannot be put in"),
    "conntrack": ("conntrack", "connections cannot be looked at by hand (conntrack -L)"),
    "ip": ("iproute2", "doctor and the lab cannot make network namespaces"),
}
"""Tool -> Debian package, and what its absence means."""


def capabilities() -> Finding:
    """Root, with the capabilities that programming the network takes."""
    if os.geteuid() != 0:
        return fail(
            f"running as user id {os.geteuid()}",
            "the proxy cannot program the kernel, and most checks below cannot be made",
            "run it as root: sudo nfqproxy doctor",
        )
    if lacking(Capability.NET_ADMIN):
        return fail(
            "root, but without CAP_NET_ADMIN",
            "rules, sets, queues and conntrack entries are refused by the kernel",
            "give the container CAP_NET_ADMIN (securityContext.capabilities.add: NET_ADMIN)",
        )
    if lacking(Capability.NET_RAW):
        return fail(
            "root with CAP_NET_ADMIN, but without CAP_NET_RAW",
            "iptables cannot look at ipsets or legacy tables, so that the queue rules cannot be put in",
            "give the container CAP_NET_RAW as well (securityContext.capabilities.add: NET_RAW)",
        )
    if lacking(Capability.SYS_ADMIN):
        return warn(
            "root with CAP_NET_ADMIN and CAP_NET_RAW, but without CAP_SYS_ADMIN",
            "the proxy runs, but doctor cannot make the network namespaces in which it tries things",
            "run nfqproxy doctor on the host itself to have everything tried",
        )
    return ok("root, with CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN")


def tool(name: str) -> Callable[[], Finding]:
    """The check of one tool: installed, and it tells its version."""
    package, effect = TOOLS[name]

    def ask() -> Finding:
        path = commands.find(name)
        if path is None:
            found = f"{name} is not installed (not in PATH)"
            fix = f"apt-get install {package}"
            is_required = name in REQUIRED_TOOLS
            return fail(found, effect, fix) if is_required else warn(found, effect, fix)
        try:
            said = commands.run([name, "-V" if name == "ip" else "--version"])
        except NfqproxyError as error:
            if isinstance(error, HostError) or getattr(error, "errno", 0) == errno.EPERM:
                # ipset asks the kernel even for its version; the privileges are told elsewhere.
                return ok(f"{path}; it tells its version to root alone")
            return fail(
                f"{path} does not run: {error}", effect, f"apt-get install --reinstall {package}"
            )
        first = said.splitlines()[0] if said else ""
        version = _VERSION.search(first)
        engine = (
            " (nf_tables)" if "nf_tables" in first else " (legacy)" if "legacy" in first else ""
        )
        return ok(f"{version[1] if version else first}{engine}, {path}")

    return ask


def python() -> Finding:
    """The interpreter and its event loop."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    try:
        importlib.import_module("uvloop")
    except ImportError as error:
        return fail(
            f"Python {version}; uvloop cannot be imported: {error}",
            "supervisor and workers do not start",
            "run ./task setup, or install nfqproxy with its dependencies again",
        )
    return ok(f"Python {version}, uvloop {importlib.metadata.version('uvloop')}")


def netfilterqueue() -> Finding:
    """The optional queue reader."""
    try:
        version = importlib.metadata.version("netfilterqueue")
    except importlib.metadata.PackageNotFoundError:
        return ok("not installed, not needed: only --reader netfilterqueue wants it")
    try:
        importlib.import_module("netfilterqueue")
    except ImportError as error:
        return warn(
            f"{version} is installed but cannot be imported: {error}",
            "--reader netfilterqueue does not start; the default reader does",
            "apt-get install libnetfilter-queue1, or install the package again",
        )
    return ok(f"{version} (optional, for --reader netfilterqueue)")


def kernel_version() -> Finding:
    """Linux's release against the oldest the proxy was run on."""
    release = os.uname().release
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if numbers < _OLDEST_KERNEL_TRIED:
        oldest = ".".join(str(part) for part in _OLDEST_KERNEL_TRIED)
        return warn(
            f"Linux {release}",
            f"the oldest kernel nfqproxy was tried on is {oldest}; only the self-test below tells",
            f"use Linux {oldest} or later where you can",
        )
    return ok(f"Linux {release}")
