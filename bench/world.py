"""The world of one contender: namespaces for client, node and backends, and counters to check it by.

::

    client namespace          node namespace                      sink namespace
    flood ------ veth --- uplink [what is measured] sink0 --- veth --- sink0  (one per backend)
                                                    sink1 --- veth --- sink1

A backend is a route to a device of its own that counts what is sent to it, so a packet can only
get there if its destination was really translated. As a *sink* it answers nothing and costs next to
nothing: without ARP the frame bears the sender's own address, and the other end's ip_rcv_core()
throws away what is addressed to another host before any hook runs (net/ipv4/ip_input.c). As a *pod*
it is a namespace of its own with a real address, where a server can run; packets of the load are
dropped there on arrival, so a server may be measured beside it.

Addresses follow the project's plan: Services 10.96.0.0/16, the pods of node n1 10.244.1.0/24, the
client's link 192.0.2.0/24. What calls the Service comes from 198.18.0.0/15 (RFC 2544), routed back
to the client: the load from the lower half, real clients from one address of the upper. It is the
network of the pods' part of the cluster that lies elsewhere, so no proxy masquerades its calls.
"""

import contextlib
import json
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.services import BACKEND_PORT, PORT, VIP, Endpoint, ServicePort, table
from nfqproxy.errors import HostError, KernelError
from nfqproxy.kernel.conntrack_table import ConntrackTable
from nfqproxy.kernel.counters import parse_queue_statistics
from nfqproxy.kernel.netns import Namespace, NamespaceGroup, Veth
from nfqproxy.model import Family
from nfqproxy.wire import conntrack, ctnetlink, nlmsg

NODE_NAME = "n1"
NODE_ADDRESS = "192.0.2.1"
POD_CIDR = "10.244.1.0/24"
POD_NETWORK = "10.244.0.0/16"
CLIENT_ADDRESS = "192.0.2.2"
NODE_MAC = "02:00:00:00:02:01"
CLIENT_MAC = "02:00:00:00:02:02"
SOURCES = "198.18.0.0/15"
"""Whoever calls the Service; pods, as far as a proxy must know."""
LOAD_SOURCES = "198.18.0.0/16"
REAL_SOURCE = "198.19.0.1"
_GATEWAY = "169.254.1.1"
"""The node, as a pod sees it."""
_NETLINK_TIMEOUT_S = 5.0
_ANSWERED_S = 300
"""What an answered entry may live without a packet; the next one sets the kernel's own time-out."""

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

    queued: Mapping[int, int]
    """Packets that were given to a queue's listener, by queue."""
    dropped: int
    """Packets lost at a queue or by conntrack: queue full, socket full, table full, clash."""


@dataclass(frozen=True, slots=True)
class World:
    """The namespaces a contender works with, and the backends behind the node."""

    client: Namespace
    node: Namespace
    pods: tuple[Namespace, ...]
    """One per backend, where servers can run; empty: the backends are sinks."""
    backends: tuple[Backend, ...]
    services: tuple[ServicePort, ...]
    """What the contender must serve; one of them is ``measured``."""
    measured: ServicePort

    def sink_packets(self) -> dict[str, int]:
        """Packets that arrived at each backend, by ``address:port``, since the world was made."""
        links = json.loads(self._said("ip", "-j", "-s", "link", "show", "type", "veth"))
        sent = {link["ifname"]: int(link["stats64"]["tx"]["packets"]) for link in links}
        return {str(backend): sent[backend.device] for backend in self.backends}

    def entries(self) -> Entries:
        """The connections to the Service that conntrack holds now."""
        text = self._said("conntrack", "-L", "-p", self.measured.protocol, "--orig-dst", VIP)
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
        text = self._said("cat", "/proc/net/netfilter/nfnetlink_queue")
        queues = parse_queue_statistics(text).values()
        dropped = sum(queue.queue_dropped + queue.user_dropped for queue in queues)
        head, *cpus = self._said("cat", "/proc/net/stat/nf_conntrack").splitlines()
        names = head.split()
        for cpu in cpus:
            values = dict(zip(names, cpu.split(), strict=True))
            dropped += sum(
                int(values[name], 16) for name in ("insert_failed", "drop", "early_drop")
            )
        return Counters(queued={queue.queue: queue.sequence for queue in queues}, dropped=dropped)

    def answer(self) -> None:
        """Has conntrack take every TCP connection for answered, as it would after the backend's first packet.

        Sinks never answer, and a connection nobody has answered is new (``ctstate NEW``) with every packet.
        Raises :class:`NfqproxyError` if the kernel refuses.
        """
        with self.node.call(ConntrackTable) as table:
            entries = list(table.entries(Family.IPV4, socket.IPPROTO_TCP))
        netlink = self.node.socket(socket.AF_NETLINK, socket.SOCK_RAW, nlmsg.NETLINK_NETFILTER)
        with netlink:
            netlink.settimeout(_NETLINK_TIMEOUT_S)
            for entry in entries:
                request = ctnetlink.new_entry(
                    entry.original,
                    dnat=None,
                    snat=None,
                    timeout_s=_ANSWERED_S,
                    seq=1,
                    status=entry.status | conntrack.IPS_SEEN_REPLY | conntrack.IPS_ASSURED,
                    exclusive=False,
                    ack=True,
                )
                netlink.send(request)
                (reply,) = nlmsg.messages(netlink.recv(4096))
                if code := nlmsg.ack(reply).errno:
                    raise KernelError("mark a connection as answered", code)

    def flush(self) -> None:
        """Empties the node's conntrack table."""
        self.node.run("conntrack", "-F")

    def _said(self, *command: str) -> str:
        return self.node.run(*command).stdout


@contextlib.contextmanager
def world(
    weights: tuple[int, ...],
    *,
    services: int = 1,
    protocol: str = "tcp",
    has_pods: bool = False,
) -> Iterator[World]:
    """A new world with one backend per weight, removed at the end.

    ``services``: how many Services the contender has to hold. ``protocol`` of the measured one.
    ``has_pods``: backends are namespaces for real servers, not sinks.
    """
    backends = tuple(
        Backend(address=f"10.244.1.{10 + index}", weight=weight, device=f"sink{index}")
        for index, weight in enumerate(weights)
    )
    measured = ServicePort(
        name="web",
        protocol=protocol,
        address=VIP,
        port=PORT,
        endpoints=tuple(
            Endpoint(address=backend.address, port=BACKEND_PORT, weight=backend.weight)
            for backend in backends
        ),
    )
    all_services = table(measured, services)
    # The pid tells whose namespaces these are, the random part two worlds of one run.
    prefix = f"nfqb-{os.getpid()}-{secrets.token_hex(2)}-"
    with NamespaceGroup(prefix) as group:
        hosts = [f"pod{index}" for index in range(len(backends))] if has_pods else ["sink"]
        group.create(["client", "node", *hosts])
        client, node, *others = group
        uplink = Veth(left="client", left_device="uplink", right="node", right_device="uplink")
        ends = [
            Veth(
                left="node",
                left_device=one.device,
                right=hosts[index] if has_pods else "sink",
                right_device=one.device,
                right_mac=_pod_mac(index),
            )
            for index, one in enumerate(backends)
        ]
        # No neighbour or router discovery: only the load's packets move the counters.
        for one in group:
            one.sysctl({f"net/ipv6/conf/{which}/disable_ipv6": 1 for which in ("all", "default")})
            one.ip("link set lo up")
        node.sysctl({"net/ipv4/ip_forward": 1})
        group.connect([uplink, *ends])
        for one, address, mac in (
            (client, CLIENT_ADDRESS, CLIENT_MAC),
            (node, NODE_ADDRESS, NODE_MAC),
        ):
            one.ip(f"link set uplink address {mac} up", f"address add {address}/24 dev uplink")
        client.ip(
            f"address add {REAL_SOURCE}/32 dev uplink",
            f"neigh add {NODE_ADDRESS} lladdr {NODE_MAC} dev uplink",
            f"route add {VIP} via {NODE_ADDRESS} src {REAL_SOURCE}",
        )
        node.ip(
            f"neigh add {CLIENT_ADDRESS} lladdr {CLIENT_MAC} dev uplink",
            f"route add default via {CLIENT_ADDRESS}",
            f"route add {SOURCES} via {CLIENT_ADDRESS}",
        )
        pods = tuple(others) if has_pods else ()
        # Without ARP a device keeps no neighbours, and frames bear its own address.
        arp = "on" if pods else "off"
        for index, backend in enumerate(backends):
            device = backend.device
            node.ip(
                f"link set {device} address {NODE_MAC} arp {arp} up",
                f"route add {backend.address} dev {device}",
            )
            if pods:
                node.ip(f"neigh add {backend.address} lladdr {_pod_mac(index)} dev {device}")
                _furnish(pods[index], backend)
            else:
                others[0].ip(f"link set {device} up")
        yield World(client, node, pods, backends, all_services, measured)


def _pod_mac(index: int) -> str:
    return f"02:00:00:00:10:{index:02x}"


def _furnish(pod: Namespace, backend: Backend) -> None:
    """Gives a pod its address, its way back through the node, and the rule that ends the load."""
    device = backend.device
    pod.ip(
        f"link set {device} up",
        f"address add {backend.address}/32 dev {device}",
        f"route add {_GATEWAY} dev {device}",
        f"neigh add {_GATEWAY} lladdr {NODE_MAC} dev {device}",
        f"route add default via {_GATEWAY}",
    )
    pod.run("iptables", "-w", "-t", "raw", "-A", "PREROUTING", "-s", LOAD_SOURCES, "-j", "DROP")


def table_room() -> int:
    """Connections that conntrack holds with room to spare (``nf_conntrack_max``)."""
    return _table_limit() * 9 // 10


def _table_limit() -> int:
    return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())


def check_table_room(connections: int) -> None:
    """Refuses a load that conntrack cannot hold (one setting per machine)."""
    if connections > table_room():
        raise HostError(
            f"{connections} connections do not fit conntrack's table of {_table_limit()}: use fewer, "
            f"or sysctl -w net.netfilter.nf_conntrack_max={connections * 5 // 4}"
        )
