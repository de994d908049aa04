"""The world of one contender: client, node and sink namespaces, and the counters to check it by.

::

    client namespace          node namespace                      sink namespace
    synflood --- veth --- uplink [what is measured] sink0 --- veth --- sink0  (one per backend)
                                                    sink1 --- veth --- sink1

A backend is a route to a device of its own that counts what is sent to it, so a packet can only
get there if its destination was really translated. It answers nothing and costs next to nothing:
without ARP the frame bears the sender's own address, and the other end's ip_rcv_core() throws away
what is addressed to another host before any hook runs (net/ipv4/ip_input.c).

Addresses follow the project's plan: clients 192.0.2.0/24, Services 10.96.0.0/16, the pods of node
n1 10.244.1.0/24; load comes from 198.18.0.0/15 (RFC 2544), routed back to the client.
"""

import contextlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nfqproxy.errors import HostError
from nfqproxy.kernel.netns import Namespace, NamespaceGroup, Veth

VIP = "10.96.0.10"
PORT = 80
BACKEND_PORT = 8080
NODE_NAME = "n1"
NODE_ADDRESS = "192.0.2.1"
POD_CIDR = "10.244.1.0/24"
CLIENT_ADDRESS = "192.0.2.2"
NODE_MAC = "02:00:00:00:02:01"
CLIENT_MAC = "02:00:00:00:02:02"
SOURCES = "198.18.0.0/15"
FIRST_SOURCE = "198.18.0.1"

# One line of `conntrack -L`: the original tuple, then the reply tuple.
_ENTRY = re.compile(
    r"src=(?P<source>\S+) dst=(?P<vip>\S+) sport=(?P<sport>\d+) dport=(?P<port>\d+) "
    r".*?src=(?P<backend>\S+) dst=\S+ sport=(?P<backend_port>\d+)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One backend of the measured Service."""

    address: str
    weight: int
    device: str
    """The node's link that leads to it; its sent packets are the backend's connections."""

    def __str__(self) -> str:
        return f"{self.address}:{BACKEND_PORT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What conntrack holds of connections to the Service."""

    clients: int
    """Distinct (source address, source port)."""
    translated: dict[str, int]
    """Entries by backend ``address:port``."""
    astray: int
    """Entries whose reply side is no backend: not translated, or to a wrong place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Counts of the node namespace since it was made."""

    queued: int
    """Packets that were given to a queue's listener."""
    dropped: int
    """Packets lost at a queue or by conntrack: queue full, socket full, table full, clash."""


@dataclass(frozen=True, slots=True)
class World:
    """The namespaces a contender works with, and the backends behind the node."""

    client: Namespace
    node: Namespace
    backends: tuple[Backend, ...]

    def sink_packets(self) -> dict[str, int]:
        """Packets that arrived at each backend, by ``address:port``, since the world was made."""
        links = json.loads(self._said("ip", "-j", "-s", "link", "show", "type", "veth"))
        sent = {link["ifname"]: int(link["stats64"]["tx"]["packets"]) for link in links}
        return {str(backend): sent[backend.device] for backend in self.backends}

    def entries(self) -> Entries:
        """The connections to the Service that conntrack holds now."""
        text = self._said("conntrack", "-L", "-p", "tcp", "--orig-dst", VIP)
        known = {str(backend) for backend in self.backends}
        clients: set[tuple[str, str]] = set()
        translated: Counter[str] = Counter()
        astray = 0
        for match in _ENTRY.finditer(text):
            clients.add((match["source"], match["sport"]))
            target = f"{match['backend']}:{match['backend_port']}"
            if target in known and match["vip"] == VIP and int(match["port"]) == PORT:
                translated[target] += 1
            else:
                astray += 1
        return Entries(clients=len(clients), translated=dict(translated), astray=astray)

    def counters(self) -> Counters:
        """The loss counters of the queues and of conntrack."""
        queues = self._said("cat", "/proc/net/netfilter/nfnetlink_queue")
        queued = dropped = 0
        for line in queues.splitlines():
            # queue, portid, waiting, copy mode, range, queue_dropped, user_dropped, id, 1
            fields = line.split()
            queued += int(fields[7])
            dropped += int(fields[5]) + int(fields[6])
        head, *cpus = self._said("cat", "/proc/net/stat/nf_conntrack").splitlines()
        names = head.split()
        for cpu in cpus:
            values = dict(zip(names, cpu.split(), strict=True))
            dropped += sum(
                int(values[name], 16) for name in ("insert_failed", "drop", "early_drop")
            )
        return Counters(queued=queued, dropped=dropped)

    def flush(self) -> None:
        """Empties the node's conntrack table."""
        self.node.run("conntrack", "-F")

    def _said(self, *command: str) -> str:
        return self.node.run(*command).stdout


@contextlib.contextmanager
def world(weights: tuple[int, ...]) -> Iterator[World]:
    """A new world with one backend per weight, removed at the end."""
    # The pid tells whose namespaces these are, the random part two worlds of one run.
    prefix = f"nfqb-{os.getpid()}-{secrets.token_hex(2)}-"
    with NamespaceGroup(prefix) as group:
        group.create(["client", "node", "sink"])
        client, node, sink = group
        backends = tuple(
            Backend(address=f"10.244.1.{10 + index}", weight=weight, device=f"sink{index}")
            for index, weight in enumerate(weights)
        )
        uplink = Veth(left="client", left_device="uplink", right="node", right_device="uplink")
        ends = [
            Veth(left="node", left_device=one.device, right="sink", right_device=one.device)
            for one in backends
        ]
        # No neighbour or router discovery: only the load's packets move the counters.
        for one in group:
            one.sysctl({f"net/ipv6/conf/{which}/disable_ipv6": 1 for which in ("all", "default")})
        node.sysctl({"net/ipv4/ip_forward": 1})
        group.connect([uplink, *ends])
        for one, address, mac in (
            (client, CLIENT_ADDRESS, CLIENT_MAC),
            (node, NODE_ADDRESS, NODE_MAC),
        ):
            one.ip(f"link set uplink address {mac} up", f"address add {address}/24 dev uplink")
        node.ip(
            f"neigh add {CLIENT_ADDRESS} lladdr {CLIENT_MAC} dev uplink",
            f"route add default via {CLIENT_ADDRESS}",
            f"route add {SOURCES} via {CLIENT_ADDRESS}",
        )
        for backend in backends:
            sink.ip(f"link set {backend.device} up")
            node.ip(
                f"link set {backend.device} arp off up",
                f"route add {backend.address} dev {backend.device}",
            )
        yield World(client, node, backends)


def check_table_room(connections: int) -> None:
    """Refuses a load that conntrack cannot hold (``nf_conntrack_max``, one setting per machine)."""
    limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    if connections > limit * 0.9:
        raise HostError(
            f"{connections} connections do not fit conntrack's table of {limit}: use fewer, or "
            f"sysctl -w net.netfilter.nf_conntrack_max={connections * 5 // 4}"
        )
