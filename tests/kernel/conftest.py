"""Fixtures of the kernel tests, and the one address plan of all of them.

Topologies (nfqproxy/lab/topology.py draws them; names are random per run):

    uplink        192.0.2.0/24                 2001:db8:2::/64
    nodes         n1 192.0.2.1, n2 192.0.2.2   2001:db8:2::1, ::2
    clients       c1 192.0.2.10, c2 192.0.2.11 2001:db8:2::10, ::11
    gateway       192.0.2.254                  2001:db8:2::254
    pods of n1    10.244.1.11, .12, .13        fd00:10:244:1::11, ::12, ::13
    pods of n2    10.244.2.11, ...             fd00:10:244:2::11, ...
    Services      10.96.0.0/16                 fd00:10:96::/112
    load balancer 198.51.100.0/24              2001:db8:51::/64
    external      203.0.113.0/24

Service addresses in use (take a free one for a new test):

    10.96.0.80     fd00:10:96::80   web, TCP 80 -> 8080
    10.96.0.53     fd00:10:96::53   dns, UDP 53
    10.96.0.99     fd00:10:96::99   plain iptables DNAT, for comparison
"""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology, topology
from tests.kernel.responder import Responder

WEB_VIP4, WEB_VIP6 = "10.96.0.80", "fd00:10:96::80"
DNS_VIP4, DNS_VIP6 = "10.96.0.53", "fd00:10:96::53"
PLAIN_VIP4, PLAIN_VIP6 = "10.96.0.99", "fd00:10:96::99"

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder is a kernel test, marked or not."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    """Without root skip, unless CI=true: there a kernel test that cannot run is a failure."""
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("kernel tests need root (CI=true forbids skipping them)", pytrace=False)
    pytest.skip("kernel tests need root")


class MakeTopology(Protocol):
    """Signature of the ``make_topology`` fixture."""

    def __call__(self, *, clients: int = 1, pods: tuple[int, ...] = (3,)) -> Topology: ...


@pytest.fixture
def make_topology() -> Iterator[MakeTopology]:
    """Build topologies of any shape; all are removed after the test."""
    with ExitStack() as stack:

        def make(*, clients: int = 1, pods: tuple[int, ...] = (3,)) -> Topology:
            return stack.enter_context(topology(clients=clients, pods=pods))

        yield make


@pytest.fixture(name="topology")
def fresh_topology() -> Iterator[Topology]:
    """One client, node n1, three pods; fresh for every test (about 0.05 s to make)."""
    with topology() as built:
        yield built


@pytest.fixture
def cluster(topology: Topology) -> Iterator[Topology]:
    """The same, with an answer from every pod on TCP and UDP 8080."""
    with Responder() as responder:
        for pod in topology.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        yield topology


@pytest.fixture(scope="module")
def module_topology() -> Iterator[Topology]:
    """The same, shared by the tests of a module."""
    with topology() as built:
        yield built


@pytest.fixture(scope="session")
def session_topology() -> Iterator[Topology]:
    """The same, shared by all tests that change no rules and start no servers on fixed ports."""
    with topology() as built:
        yield built


Ping = Callable[[Namespace, str], bool]


@pytest.fixture(scope="session")
def ping() -> Ping:
    """``ping(namespace, address)``: does one ICMP echo request get its answer within 2 s?"""

    def send(namespace: Namespace, address: str) -> bool:
        six = ":" in address
        protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
        family = socket.AF_INET6 if six else socket.AF_INET
        identity = os.getpid() & 0xFFFF
        kind = 128 if six else 8
        body = struct.pack("!BBHHH", kind, 0, 0, identity, 1)
        # RFC 792 checksum; the kernel fills in that of ICMPv6 (RFC 3542 section 3.1).
        checksum = 0 if six else 0xFFFF - (sum(struct.unpack("!4H", body)) % 0xFFFF)
        packet = struct.pack("!BBHHH", kind, 0, checksum, identity, 1)
        with namespace.socket(family, socket.SOCK_RAW, protocol) as raw:
            raw.settimeout(2.0)
            try:
                raw.sendto(packet, (address, 0))
                while True:
                    data, sender = raw.recvfrom(1500)
                    offset = 0 if six else (data[0] & 0x0F) * 4
                    answer_kind = data[offset]
                    answer_identity = struct.unpack_from("!H", data, offset + 4)[0]
                    if (
                        answer_kind == (129 if six else 0)
                        and answer_identity == identity
                        and sender[0] == address
                    ):
                        return True
            except OSError:
                return False

    return send
