"""Network namespaces for the tests of rules and sets: random names, removed by the test."""

import ctypes
import errno
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.counters import refusal_counters
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
    TrafficPolicy,
    Verdict,
)

from .probes import probe

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


class Servers:
    """Answers on sockets of several namespaces: each reply is "name peer-address"."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def add(self, namespace: str, name: str, address: str, port: int) -> None:
        """Serve TCP and UDP on ``address`` of ``namespace``."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sock = inside(namespace, lambda kind=kind: socket.socket(family, kind))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            target = self._stream if kind == socket.SOCK_STREAM else self._datagram
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
            self._sockets.append(sock)
            thread = threading.Thread(target=target, args=(sock, name), daemon=True)
            thread.start()
            self._threads.append(thread)

    @staticmethod
    def _stream(sock: socket.socket, name: str) -> None:
        while True:
            try:
                connection, peer = sock.accept()
            except OSError:
                return
            with connection:
                connection.sendall(f"{name} {peer[0]}".encode())

    @staticmethod
    def _datagram(sock: socket.socket, name: str) -> None:
        while True:
            try:
                data, peer = sock.recvfrom(2048)
                if not data:  # shut down by close()
                    return
                sock.sendto(f"{name} {peer[0]}".encode(), peer)
            except OSError:
                return

    def close(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()
        for thread in self._threads:
            thread.join(timeout=5)


_udp_ports = itertools.count()


def ask(protocol: Protocol, address: str, port: int, source: tuple[str, int] | None = None) -> str:
    """Connect from the calling thread's namespace; return the reply or the name of the errno."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        if source:
            sock.bind(source)
        elif kind == socket.SOCK_DGRAM:
            # A random port may come back within the life of a flow, and a known flow is not queued.
            sock.bind(("", 20000 + next(_udp_ports) % 40000))
        try:
            sock.connect((address, port))
            if kind == socket.SOCK_DGRAM:
                sock.send(b"?")
            return sock.recv(200).decode()
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return errno.errorcode[error.errno or 0]


class Cluster:
    """A client, a node that forwards, and three pods behind it; addresses of the test plan.

    Pod i has 10.244.i.2 and fd00:10:244:i::2, the client 192.0.2.2 and 2001:db8:2::2.
    """

    PODS = ("b1", "b2", "b3")
    CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.node = names["node"]
        node = self.node
        for name in names.values():  # no second of waiting until link-local addresses are valid
            sh(name, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        sh(node, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        # The kernel limits the ICMP errors it sends, per address and in all; tests cause more.
        sh(node, "sysctl", "-qw", "net.ipv4.icmp_ratemask=0", "net.ipv6.icmp.ratemask=2")
        self._link("client", "192.0.2.2", "192.0.2.1", 24, "2001:db8:2::2", "2001:db8:2::1")
        for i, pod in enumerate(self.PODS, start=1):
            self._link(
                pod, f"10.244.{i}.2", f"10.244.{i}.1", 24,
                f"fd00:10:244:{i}::2", f"fd00:10:244:{i}::1",
            )  # fmt: skip
        # A node reaches Service addresses through some route (rules/README.md).
        sh(node, "ip", "route", "add", "default", "via", "192.0.2.2")
        sh(node, "ip", "-6", "route", "add", "default", "via", "2001:db8:2::2")
        self.servers = Servers()
        for i, pod in enumerate(self.PODS, start=1):
            for address in (f"10.244.{i}.2", f"fd00:10:244:{i}::2"):
                self.servers.add(names[pod], pod, address, 8080)
        for address in ("192.0.2.2", "2001:db8:2::2"):
            self.servers.add(names["client"], "client", address, 8080)

    def _link(self, role: str, v4: str, gw4: str, length: int, v6: str, gw6: str) -> None:
        peer = self.names[role]
        add = ("ip", "link", "add", "eth0", "netns", peer, "type", "veth", "peer", "name", role)
        sh(self.node, *add)
        sh(self.node, "ip", "addr", "add", f"{gw4}/{length}", "dev", role)
        sh(self.node, "ip", "addr", "add", f"{gw6}/64", "dev", role, "nodad")
        sh(peer, "ip", "addr", "add", f"{v4}/{length}", "dev", "eth0")
        sh(peer, "ip", "addr", "add", f"{v6}/64", "dev", "eth0", "nodad")
        sh(self.node, "ip", "link", "set", role, "up")
        sh(peer, "ip", "link", "set", "eth0", "up")
        sh(peer, "ip", "route", "add", "default", "via", gw4)
        sh(peer, "ip", "-6", "route", "add", "default", "via", gw6)

    def ask(self, role: str, protocol: Protocol, address: str, port: int) -> str:
        return inside(self.names[role], lambda: ask(protocol, address, port))

    def probe(self, role: str, key: FrontendKey, source: tuple[str, int] | None = None) -> str:
        """See ``probe``."""
        return inside(self.names[role], lambda: probe(key, source))

    def probes(self, roles: Sequence[str], *keys: FrontendKey) -> dict[tuple[str, str], str]:
        """Probe each key from each role at once; what came back, by (role, key as text)."""
        pairs = [(role, key) for role in roles for key in keys]
        with ThreadPoolExecutor(len(pairs)) as pool:
            found = pool.map(lambda pair: self.probe(*pair), pairs)
            return {
                (role, str(key)): outcome for (role, key), outcome in zip(pairs, found, strict=True)
            }


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Build a Cluster and remove it."""
    with namespaces("client", "node", *Cluster.PODS) as names:
        built = Cluster(names)
        try:
            yield built
        finally:
            built.servers.close()


@contextmanager
def borrowed(lab: Cluster) -> Iterator[Cluster]:
    """Yield a cluster that others use too, and take everything off its node afterwards."""
    try:
        yield lab
    finally:
        inside(lab.node, node_rules.cleanup)
        for tool in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
            for table in ("filter", "nat"):
                sh(lab.node, tool, "-t", table, "-F")
        sh(lab.node, "conntrack", "-F")


BACKEND, DROP, REJECT = (
    Action(verdict=verdict) for verdict in (Verdict.BACKEND, Verdict.DROP, Verdict.REJECT)
)
MASQUERADED = Action(verdict=Verdict.BACKEND, masquerade=True)


def plan(
    key: FrontendKey,
    backends: Sequence[Backend],
    *,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    masquerade: tuple[bool, bool, bool] = (False, False, False),
    local: Sequence[Backend] = (),
    actions: tuple[Action, Action, Action] | None = None,
    affinity_s: int = 0,
    ranges: tuple[str, ...] | None = None,
) -> FrontendPlan:
    """Return a plan that serves every class from ``backends``, or does as ``actions`` say.

    Candidate set 0 is ``backends``, 1 is ``local``.
    """
    pod, node, external = (Action(verdict=Verdict.BACKEND, masquerade=m) for m in masquerade)
    return FrontendPlan(
        key=key,
        kind=kind,
        namespace="default",
        service="web",
        port_name="http",
        policy=TrafficPolicy.CLUSTER,
        affinity_timeout_s=affinity_s,
        allowed_sources=ranges,
        candidate_sets=(
            CandidateSet(backends=tuple(backends)),
            CandidateSet(backends=tuple(local)),
        ),
        actions=actions or (pod, node, external),
    )


def empty(key: FrontendKey, kind: FrontendKind = FrontendKind.CLUSTER_IP) -> FrontendPlan:
    """Return the plan of a frontend without endpoints."""
    return plan(key, [], kind=kind, actions=(REJECT, REJECT, REJECT))


def by_key(*plans: FrontendPlan) -> dict[FrontendKey, FrontendPlan]:
    return {each.key: each for each in plans}


VIP = {Family.IPV4: "10.96.0.10", Family.IPV6: "fd00:10:96::10"}
EXTERNAL_IP = {Family.IPV4: "203.0.113.9", Family.IPV6: "2001:db8:113::9"}
LB_IP = {Family.IPV4: "198.51.100.7", Family.IPV6: "2001:db8:100::7"}
NODE_IP = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:2::1"}
CLIENT_IP = {Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:2::2"}
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
NODE = NodeContext(node_name="n1", cluster_cidrs=Cluster.CIDRS, service_cidrs=SERVICE_CIDRS)


def pod_address(family: Family, number: int) -> str:
    return f"10.244.{number}.2" if family is Family.IPV4 else f"fd00:10:244:{number}::2"


def gateway(family: Family, number: int) -> str:
    """Return the node's address on the link of a pod: what MASQUERADE takes towards it."""
    return pod_address(family, number).removesuffix("2") + "1"


def backends(family: Family, *weights: int) -> list[Backend]:
    """Return pods b1, b2, ... with these weights."""
    return [
        Backend(address=pod_address(family, i), port=8080, weight=weight)
        for i, weight in enumerate(weights, start=1)
    ]


def serve(
    lab: Cluster,
    *plans: FrontendPlan,
    settings: RuleSettings | None = None,
    node: NodeContext = NODE,
) -> KernelTable:
    """Put rules and plans on the node of ``lab``."""
    used = settings or RuleSettings(iptables=IptablesBackend.NFT)

    def work() -> KernelTable:
        node_rules.apply(used)
        table = KernelTable(used)
        table.sync(by_key(*plans), node)
        return table

    return inside(lab.node, work)


def counted(lab: Cluster) -> dict[str, int]:
    """Return the counters of refusals that are not zero, both families together."""
    totals: dict[str, int] = {}
    for (_, name), packets in inside(lab.node, refusal_counters).items():
        if packets:
            totals[name] = totals.get(name, 0) + packets
    return totals
