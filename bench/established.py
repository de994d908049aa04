"""Traffic over established connections: what the experiments ``requests`` and ``bulk`` have in common.

Every contender has the same one backend with the same server: what differs is the way of a packet. A load
lasts a second, and the contenders that are to be told apart by a percent are loaded often, each time next to the
others (``Scale.turns`` loads for each round); userspace proxies, which differ by half, once a round.

``cpu`` beside it is what all that take part used: client, server, the contender's processes and the
kernel's threads. It does not depend on who had to wait for whom, and scatters less than a rate.

On a machine with two CPUs the clients have one and the servers the other, together with the
contender's own process. That is idle then where it is nfqproxy's worker, and works for its part where it
is a userspace proxy.

The table holds the least number of Services: no contender looks at it again for a packet of an
established connection.
"""

import resource
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.clocks import kernel_thread_times, process_time, since
from bench.contenders import (
    Contender,
    Haproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Nfqproxy,
    NginxStream,
)
from bench.observation import Scale
from bench.process import descendants
from bench.stands import Setup, Stand, WrongResultError, checked
from bench.world import world
from nfqproxy.errors import NfqproxyError

CONTENDERS: tuple[type[Contender], ...] = (
    Nfqproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Haproxy,
    NginxStream,
)

SECONDS = 1
"""Of one load: wrk and iperf3 count in whole seconds."""

T = TypeVar("T")


def setups(scale: Scale) -> list[Setup]:
    """Every contender before one backend, with the least number of Services."""
    services = min(scale.services)
    return [
        Setup(
            contender,
            world((1,), services=services, has_pods=True),
            {"services": services},
            every=scale.turns if contender.is_relay else 1,
        )
        for contender in checked(contender() for contender in CONTENDERS)
    ]


@dataclass(frozen=True, slots=True)
class Carried(Generic[T]):
    """A load that was carried as it should be."""

    result: T
    userspace_packets: int
    """Packets beyond the first of each connection that were given to userspace."""
    cpu_ns: int
    """CPU time of all that took part."""


def carried(stand: Stand, number: int, load: Callable[[], T]) -> Carried[T]:
    """Runs a load and proves that userspace saw the first packet of each connection and no other.

    Raises :class:`WrongResultError` if the load failed, a connection was not translated to a backend,
    a backend was left out or a queue saw more or fewer packets than there were connections.
    """
    place = stand.world
    before = place.counters()
    arrived = place.sink_packets()
    taking_part = [each.pid for pod in place.pods for each in pod.processes()]
    for pid in [*taking_part, *stand.serving.workers, *stand.serving.others]:
        taking_part += descendants(pid) - set(taking_part)
    cpu_ns = _cpu_ns(taking_part)
    threads = kernel_thread_times()
    try:
        result = load()
    except NfqproxyError as error:
        raise WrongResultError(
            f"{stand}, round {number}: {error}\n{stand.serving.complaints()}".strip()
        ) from error
    cpu_ns = _cpu_ns(taking_part) - cpu_ns + since(threads, kernel_thread_times())
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
    return Carried(result, queued - (connections if stand.contender.is_queued else 0), cpu_ns)


def _cpu_ns(pids: Collection[int]) -> int:
    """What these have used until now, and the clients, which are children that have ended."""
    clients = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time(pids).run_ns + round((clients.ru_utime + clients.ru_stime) * 1e9)
