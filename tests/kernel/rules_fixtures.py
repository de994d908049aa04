"""Network namespaces for the tests of rules and sets: random names, removed by the test."""

import ctypes
import errno
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    Protocol,
    TrafficPolicy,
    Verdict,
)

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


def ask(protocol: Protocol, address: str, port: int, source: tuple[str, int] | None = None) -> str:
    """Connect from the calling thread's namespace; return the reply or the name of the errno."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        if source:
            sock.bind(source)
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


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Build a Cluster and remove it."""
    with namespaces("client", "node", *Cluster.PODS) as names:
        built = Cluster(names)
        try:
            yield built
        finally:
            built.servers.close()


def plan(
    key: FrontendKey,
    backends: list[Backend],
    *,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    masquerade: tuple[bool, bool, bool] = (False, False, False),
) -> FrontendPlan:
    """Return a plan that serves every class from ``backends``."""
    pod, node, external = (Action(verdict=Verdict.BACKEND, masquerade=m) for m in masquerade)
    return FrontendPlan(
        key=key,
        kind=kind,
        namespace="default",
        service="web",
        port_name="http",
        policy=TrafficPolicy.CLUSTER,
        candidate_sets=(CandidateSet(backends=tuple(backends)),),
        actions=(pod, node, external),
    )


def by_key(*plans: FrontendPlan) -> dict[FrontendKey, FrontendPlan]:
    return {each.key: each for each in plans}
