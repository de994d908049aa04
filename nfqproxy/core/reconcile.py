"""Which conntrack entries hold a Service's client to a backend it must no longer talk to.

An entry lives as long as its client sends, so a UDP client that never stops is pinned for ever: to a
backend that has gone, or to nothing at all if it began before the Service had endpoints. Nobody tells
it; a TCP client notices by itself. So entries are held against the service table, and those that the
table contradicts are deleted: the next datagram is a first one again (SEMANTICS 2.16, newest rules).

Looked at are UDP and SCTP entries of conntrack zone 0 whose original destination is

- the cluster IP, an external IP or a load-balancer IP of a service port, and its port; or
- an address of this node, and a node port.

Such an entry stays when its replies come from an endpoint of that service port, address *and* port,
that is ready or serving. Traffic policies, topology and termination are ignored on purpose: a flow to a
draining backend is not cut. Else it goes, with the reason:

``backend-gone``
    It is translated to something that is no such endpoint.
``untranslated``
    It is translated to nothing: its first packet came before the Service had endpoints. At a node port
    only on the addresses that serve node ports: on another address of this node a program of the node may
    listen on that number, and its flows are not ours.

Left alone: everything of a service port that has no ready or serving endpoint (there is nobody to send
the client to), all of TCP, and SCTP associations in which a backend has spoken. Of SCTP only entries go
whose INIT was not answered, or which are closed: the client's next INIT is decided anew. An
established association is its two ends' own affair, as a TCP connection is.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from ipaddress import ip_address

from msgspec import Struct

from nfqproxy.model import Family, NodeContext, Protocol, ServicePort, ServicePortName
from nfqproxy.wire import ctnetlink

__all__ = ["Expectation", "Reason", "Stale", "Target", "expectation", "judge"]

RECONCILED = frozenset({Protocol.UDP, Protocol.SCTP})
"""Protocols whose entries are looked at."""

_LOOPBACK = ip_address("127.0.0.1").packed

# NONE: made by the worker, its INIT has not passed conntrack yet.
_SCTP_UNANSWERED = frozenset(
    {
        None,
        ctnetlink.SCTP_CONNTRACK_NONE,
        ctnetlink.SCTP_CONNTRACK_CLOSED,
        ctnetlink.SCTP_CONNTRACK_COOKIE_WAIT,
    }
)


class Reason(StrEnum):
    """Why an entry goes."""

    BACKEND_GONE = "backend-gone"
    UNTRANSLATED = "untranslated"


class Target(Struct, frozen=True, kw_only=True):
    """A service port as conntrack sees it."""

    name: ServicePortName
    serving: frozenset[tuple[bytes, int]]
    """Packed address and port of every endpoint that is ready or serving; never empty."""


class Expectation(Struct, frozen=True, kw_only=True):
    """What conntrack may say about Services. Two are equal when they judge every entry alike."""

    frontends: Mapping[tuple[int, bytes, int], Target | None]
    """(protocol, packed address, port) -> who serves it; None: nobody, so its entries are left alone."""
    node_ports: Mapping[tuple[int, int, int], Target | None]
    """(protocol, length of an address of the family in bytes, port) -> who serves it."""
    node_port_addresses: frozenset[bytes]
    """Packed addresses on which node ports are served."""

    @property
    def lookups(self) -> frozenset[tuple[Family, Protocol]]:
        """The parts of the table that can hold a stale entry."""
        found = set()
        for (protocol, address, _port), target in self.frontends.items():
            if target is not None:
                found.add((_family(len(address)), Protocol(protocol)))
        for (protocol, width, _port), target in self.node_ports.items():
            if target is not None:
                found.add((_family(width), Protocol(protocol)))
        return frozenset(found)


class Stale(Struct, frozen=True, kw_only=True):
    """An entry to delete."""

    entry: ctnetlink.Entry
    reason: Reason
    name: ServicePortName
    """The service port whose client it holds."""


def expectation(ports: Iterable[ServicePort], node: NodeContext) -> Expectation:
    """What these service ports, all that the proxy serves, expect of conntrack.

    Of two that claim one address and port the one counts that the plans choose (``core.plans``): cluster
    IP before external IP before load-balancer IP, then the first by name.
    """
    ordered = sorted(
        (port for port in ports if port.name.protocol in RECONCILED), key=lambda port: port.name
    )
    frontends: dict[tuple[int, bytes, int], Target | None] = {}
    node_ports: dict[tuple[int, int, int], Target | None] = {}
    targets = [_target(port) for port in ordered]
    for addresses_of in (_cluster_ip, _external_ips, _load_balancer_ips):
        for port, target in zip(ordered, targets, strict=True):
            for address in addresses_of(port):
                key = (int(port.name.protocol), ip_address(address).packed, port.port)
                frontends.setdefault(key, target)
    for port, target in zip(ordered, targets, strict=True):
        if port.node_port:
            width = 4 if port.name.family is Family.IPV4 else 16
            node_ports.setdefault((int(port.name.protocol), width, port.node_port), target)
    accepted = {ip_address(address).packed for address in node.node_port_addresses}
    if node.localhost_node_ports:
        accepted.add(_LOOPBACK)
    return Expectation(
        frontends=frontends, node_ports=node_ports, node_port_addresses=frozenset(accepted)
    )


def judge(
    entry: ctnetlink.Entry, expected: Expectation, local_addresses: frozenset[bytes]
) -> Stale | None:
    """Whether and why this entry has to go; None: it stays.

    ``local_addresses``: all addresses of this node, packed.
    """
    original = entry.original
    if entry.zone != 0 or original.protocol not in RECONCILED:
        return None
    protocol, address = original.protocol, original.dst
    key = (protocol, address, original.dst_port)
    is_accepted = True
    if key in expected.frontends:
        target = expected.frontends[key]
    else:
        target = expected.node_ports.get((protocol, len(address), original.dst_port))
        is_accepted = address in expected.node_port_addresses
        if not is_accepted and address not in local_addresses:
            return None
    if target is None or (entry.reply.src, entry.reply.src_port) in target.serving:
        return None
    if protocol == Protocol.SCTP and entry.sctp_state not in _SCTP_UNANSWERED:
        return None
    if entry.is_dnat:
        return Stale(entry=entry, reason=Reason.BACKEND_GONE, name=target.name)
    if is_accepted:
        return Stale(entry=entry, reason=Reason.UNTRANSLATED, name=target.name)
    return None


def _family(width: int) -> Family:
    return Family.IPV4 if width == 4 else Family.IPV6


def _target(port: ServicePort) -> Target | None:
    # A ready endpoint need not be serving: with publishNotReadyAddresses it is given traffic all the same.
    serving = frozenset(
        (ip_address(endpoint.address).packed, endpoint.port)
        for endpoint in port.endpoints
        if endpoint.ready or endpoint.serving
    )
    return Target(name=port.name, serving=serving) if serving else None


def _cluster_ip(port: ServicePort) -> tuple[str, ...]:
    return (port.cluster_ip,)


def _external_ips(port: ServicePort) -> tuple[str, ...]:
    return port.external_ips


def _load_balancer_ips(port: ServicePort) -> tuple[str, ...]:
    return port.load_balancer_ips
