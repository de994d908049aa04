"""The kernel's abilities, each tried for real in a network namespace that is thrown away.

What works there works here; the examined namespace is only read (to see which iptables back end its
rules use). On a modular kernel trying loads the modules, as starting the proxy would.
"""

import os
import re
from collections.abc import Callable
from ipaddress import ip_address

from msgspec.structs import replace

from nfqproxy.doctor.check import Finding, fail, ok, unknown
from nfqproxy.doctor.program import REQUIRED_TOOLS
from nfqproxy.errors import HostError, KernelError
from nfqproxy.kernel import commands, host_check, iptables
from nfqproxy.kernel.capabilities import Capability, lacking
from nfqproxy.kernel.netns import NamespaceGroup
from nfqproxy.kernel.queue_socket import QueueSocket
from nfqproxy.kernel.rule_settings import RuleSettings
from nfqproxy.wire import ctnetlink
from nfqproxy.worker.conntrack import ConntrackSocket

__all__ = ["conntrack_insert", "prerequisites", "queue_bind", "rules"]

_MODULES = re.compile(r"; try: modprobe -a ([\w ]+)")
_TRIAL_TIMEOUT_S = 30


def prerequisites(*tools: str) -> Finding | None:
    """Why nothing can be tried in a throw-away namespace; None when it can be."""
    if os.geteuid() != 0 or lacking(Capability.SYS_ADMIN):
        return unknown(
            "not tried: making a network namespace needs root with CAP_SYS_ADMIN",
            "nobody can say yet whether the proxy works here",
            "run it as root: sudo nfqproxy doctor",
        )
    missing = [name for name in ("ip", *tools) if commands.find(name) is None]
    if missing:
        return unknown(
            f"not tried: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            "nobody can say yet whether the proxy works here",
            "install what the checks of the tools name and run nfqproxy doctor again",
        )
    return None


def _in_throw_away_namespace(function: Callable[[], Finding], *tools: str) -> Finding:
    problem = prerequisites(*tools)
    if problem is not None:
        return problem
    with NamespaceGroup() as group:
        group.create(["probe"])
        return group["probe"].call(function)


def rules(settings: RuleSettings) -> Finding:
    """Load the very rules, sets and maps that ``run`` loads, in both families."""
    problem = prerequisites(*REQUIRED_TOOLS)
    if problem is not None:
        return problem
    # The choice depends on the rules that are here, so it is made here.
    backend = iptables.choose_backend(settings.iptables)

    def rehearse() -> Finding:
        try:
            host_check.check_host(replace(settings, iptables=backend))
        except HostError as error:
            text = " ".join(str(error).split())
            modules = dict.fromkeys(
                word for found in _MODULES.findall(text) for word in found.split()
            )
            return fail(
                _MODULES.sub("", text),
                "the bootstrap rules or the kernel fallback cannot be put in",
                f"modprobe -a {' '.join(modules)}; if that fails, use a kernel that has them"
                if modules
                else "mend what the message names and run nfqproxy doctor again",
            )
        return ok(f"they load in a throw-away namespace (iptables back end {backend})")

    return _in_throw_away_namespace(rehearse, *REQUIRED_TOOLS)


def queue_bind(settings: RuleSettings) -> Finding:
    """Bind an NFQUEUE that fails open."""

    def bind() -> Finding:
        try:
            bound = QueueSocket.bind(settings.first_queue, 128)
        except (HostError, KernelError) as error:
            return fail(
                str(error),
                "no packet can be handed to a worker",
                "modprobe -a nfnetlink_queue xt_NFQUEUE; if that fails, use a kernel that has them",
            )
        bound.release()
        return ok("a queue can be bound, with fail-open")

    return _in_throw_away_namespace(bind)


def conntrack_insert() -> Finding:
    """Insert a conntrack entry with destination NAT in both families, and read it back."""

    def insert() -> Finding:
        connections = ConntrackSocket()
        try:
            for client, vip, backend in (
                ("192.0.2.10", "10.96.0.1", "10.244.1.11"),
                ("2001:db8:2::10", "fd00:10:96::1", "fd00:10:244:1::11"),
            ):
                problem = _insert_one(connections, client, vip, backend)
                if problem:
                    return fail(
                        problem,
                        "the choice of a backend cannot be given to the kernel",
                        "modprobe -a nf_conntrack_netlink nf_nat; if that fails, use a kernel"
                        " that has them",
                    )
        finally:
            connections.close()
        return ok("entries with NAT can be inserted and read back, IPv4 and IPv6")

    return _in_throw_away_namespace(insert)


def _insert_one(connections: ConntrackSocket, client: str, vip: str, backend: str) -> str:
    """What is wrong, "" when the kernel holds the translation that was asked for."""
    original = ctnetlink.Tuple(
        ip_address(client).packed, ip_address(vip).packed, ctnetlink.IPPROTO_TCP, 40000, 443
    )
    wanted = ctnetlink.Nat(ip_address(backend).packed, 6443)
    request = ctnetlink.new_entry(
        original, dnat=wanted, snat=None, timeout_s=_TRIAL_TIMEOUT_S, seq=1
    )
    for _seq, code in connections.create([request]):
        return (
            f"the kernel refuses a conntrack entry with NAT for {vip}: {os.strerror(code)} ({code})"
        )
    entry = connections.find(original)
    if entry is None:
        return f"the conntrack entry for {vip} was accepted and is not there"
    if not entry.is_dnat or entry.destination != wanted:
        return f"the conntrack entry for {vip} was accepted without its NAT"
    return ""
