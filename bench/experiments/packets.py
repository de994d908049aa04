"""What a small packet of an established connection costs on its way through the node.

The smallest difference between data paths is seen here: bare ACKs of some hundred connections in turn,
each forwarded inside the sender's system call, so that its CPU time per packet is the whole way and nothing
else: no server, no wake-up, no waiting. ``bulk`` and ``requests`` say how much of that is left in real use, where
a packet carries up to 64 kB and a request has a server's work in it.

Conntrack picks the connections up with their first ACK (nf_conntrack_tcp_loose), which the kernel's own
rules translate: nfqproxy's fallback in its case. Conntrack is then told that they were answered, for until
then every packet counts as new to the rules. From then on all packets meet is the entry and the rules that
no verdict of NAT spares them.
"""

from collections.abc import Callable

from bench.contenders import (
    Contender,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Nfqproxy,
)
from bench.flows import arrivals
from bench.load import Load, send
from bench.native import program
from bench.observation import Observation, Scale
from bench.stands import Setup, Stand, WrongResultError, checked, observations
from bench.world import world
from nfqproxy.errors import NfqproxyError

_CONTENDERS: tuple[type[Contender], ...] = (
    Nfqproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
)
_CONNECTIONS = 512
_PACKETS_FOR_EACH = 100
_TURNS = 2
"""Of them for one of the scale's: they are over in a moment."""


class Packets:
    """Metric ``path_cpu`` in us per packet, the sending included, which is the same for all."""

    name = "packets"
    title = "What does a small packet of an established connection cost?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if a packet took a wrong way."""
        program("flood")
        services = min(scale.services)
        setups = [
            Setup(contender, world((1,), services=services), {"services": services})
            for contender in checked(contender() for contender in _CONTENDERS)
        ]
        return observations(setups, scale, progress, self._measured, turns=_TURNS * scale.turns)

    def _measured(self, stand: Stand, number: int) -> list[Observation]:
        place = stand.world
        packets = _CONNECTIONS * (_PACKETS_FOR_EACH if number else 1)
        load = Load(connections=packets, cpu=stand.placement.sender, established=_CONNECTIONS)
        before, arrived = place.counters(), place.sink_packets()
        try:
            sent = send(place, load)
        except NfqproxyError as error:
            raise WrongResultError(f"{stand}, round {number}: {error}") from error
        came = sum(arrivals(stand, arrived, packets).values())
        after, entries = place.counters(), place.entries()
        findings = []
        if came != packets:
            findings.append(f"{came} of {packets} packets arrived at the backend")
        if entries.astray or sum(entries.translated.values()) != _CONNECTIONS:
            findings.append(
                f"conntrack holds {sum(entries.translated.values())} right and {entries.astray} "
                f"wrong entries for {_CONNECTIONS} connections"
            )
        if queued := sum(after.queued.values()) - sum(before.queued.values()):
            findings.append(f"{queued} packets were given to userspace")
        if after.dropped != before.dropped:
            findings.append(f"queues or conntrack dropped {after.dropped - before.dropped} packets")
        if findings:
            raise WrongResultError(f"{stand}, round {number}: {'; '.join(findings)}")
        if not number:
            place.answer()
            return []
        cost = sent.cpu_ns / packets / 1000
        return [stand.observation(self.name, "path_cpu", "us", cost, number)]
