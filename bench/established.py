"""Traffic over established connections: what the experiments ``requests`` and ``bulk`` have in common.

On a machine with two CPUs the clients have one and the servers the other, together with the
contender's own process. That is idle then where it is nfqproxy's worker, and works for its part where it
is a userspace proxy.

The table holds the least number of Services: no contender looks at it again for a packet of an
established connection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.contenders import (
    Contender,
    Haproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Nfqproxy,
    NginxStream,
)
from bench.stands import Stand, WrongResultError
from nfqproxy.errors import NfqproxyError

CONTENDERS: tuple[type[Contender], ...] = (
    Nfqproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Haproxy,
    NginxStream,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Carried(Generic[T]):
    """A load that was carried as it should be."""

    result: T
    userspace_packets: int
    """Packets beyond the first of each connection that were given to userspace."""


def whole_seconds(seconds: float) -> int:
    """wrk and iperf3 count in whole seconds."""
    return max(1, round(seconds))


def carried(stand: Stand, number: int, load: Callable[[], T]) -> Carried[T]:
    """Runs a load and proves that userspace saw the first packet of each connection and no other.

    Raises :class:`WrongResultError` if the load failed, a connection was not translated to a backend,
    a backend was left out or a queue saw more or fewer packets than there were connections.
    """
    place = stand.world
    before = place.counters()
    arrived = place.sink_packets()
    try:
        result = load()
    except NfqproxyError as error:
        raise WrongResultError(
            f"{stand}, round {number}: {error}\n{stand.serving.complaints()}".strip()
        ) from error
    after = place.counters()
    entries = place.entries()
    connections = 0 if stand.contender.is_relay else entries.clients
    queued = sum(after.queued.values()) - sum(before.queued.values())
    shares = stand.contender.shares(place.backends)
    findings = []
    for backend, packets in place.sink_packets().items():
        if (packets > arrived[backend]) != (backend in shares):
            findings.append(f"{backend} got {packets - arrived[backend]} packets")
    if not connections and not stand.contender.is_relay:
        findings.append("conntrack holds no connection")
    if entries.astray:
        findings.append(f"{entries.astray} entries are not translated to a backend")
    if after.dropped != before.dropped:
        findings.append(f"queues or conntrack dropped {after.dropped - before.dropped} packets")
    if queued != (connections if stand.contender.is_queued else 0):
        findings.append(f"{queued} packets passed the queue for {connections} connections")
    if findings:
        raise WrongResultError(f"{stand}, round {number}: {'; '.join(findings)}")
    place.flush()
    return Carried(result, queued - (connections if stand.contender.is_queued else 0))
