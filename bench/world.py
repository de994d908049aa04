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
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.netns import Namespace, namespace
from nfqproxy.errors import HostError

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
        links = json.loads(self.node.ip("-j", "-s", "link", "show", "type", "veth"))
        sent = {link["ifname"]: int(link["stats64"]["tx"]["packets"]) for link in links}
        return {str(backend): sent[backend.device] for backend in self.backends}

    def entries(self) -> Entries:
        """The connections to the Service that conntrack holds now."""
        text = self.node.run("conntrack", "-L", "-p", "tcp", "--orig-dst", VIP)
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
        queues = self.node.run("cat", "/proc/net/netfilter/nfnetlink_queue")
        queued = dropped = 0
        for line in queues.splitlines():
            # queue, portid, waiting, copy mode, range, queue_dropped, user_dropped, id, 1
            fields = line.split()
            queued += int(fields[7])
            dropped += int(fields[5]) + int(fields[6])
        head, *cpus = self.node.run("cat", "/proc/net/stat/nf_conntrack").splitlines()
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


@contextlib.contextmanager
def world(weights: tuple[int, ...]) -> Iterator[World]:
    """A new world with one backend per weight, removed at the end."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(namespace("client"))
        node = stack.enter_context(namespace("node"))
        sink = stack.enter_context(namespace("sink"))
        backends = tuple(
            Backend(address=f"10.244.1.{10 + index}", weight=weight, device=f"sink{index}")
            for index, weight in enumerate(weights)
        )
        for one in (client, node, sink):
            # No neighbour or router discovery: only the load's packets move the counters.
            one.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
            one.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        peer = ["peer", "name", "uplink", "address", NODE_MAC, "netns", node.name]
        client.ip("link", "add", "uplink", "address", CLIENT_MAC, "type", "veth", *peer)
        for one, address in ((client, CLIENT_ADDRESS), (node, NODE_ADDRESS)):
            one.ip("address", "add", f"{address}/24", "dev", "uplink")
            one.ip("link", "set", "uplink", "up")
        node.ip("neigh", "add", CLIENT_ADDRESS, "lladdr", CLIENT_MAC, "dev", "uplink")
        node.ip("route", "add", "default", "via", CLIENT_ADDRESS)
        node.ip("route", "add", SOURCES, "via", CLIENT_ADDRESS)
        for backend in backends:
            peer = ["peer", "name", backend.device, "netns", sink.name]
            node.ip("link", "add", backend.device, "type", "veth", *peer)
            sink.ip("link", "set", backend.device, "up")
            node.ip("link", "set", backend.device, "arp", "off", "up")
            node.ip("route", "add", backend.address, "dev", backend.device)
        yield World(client, node, backends)


def check_table_room(connections: int) -> None:
    """Refuses a load that conntrack cannot hold (``nf_conntrack_max``, one setting per machine)."""
    limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    if connections > limit * 0.9:
        raise HostError(
            f"{connections} connections do not fit conntrack's table of {limit}: use fewer, or "
            f"sysctl -w net.netfilter.nf_conntrack_max={connections * 5 // 4}"
        )
