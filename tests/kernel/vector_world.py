"""A network with the very addresses of the scenario files (tests/scenarios), both families.

::

    c  192.0.2.50, 8.8.8.8                        clients outside the cluster, default route to n1
    |
    [lan]  192.168.0.254                          default route of n1; owns every Service address, so what
    |                                             no proxy captures is answered here, as "outside"
    n1 eth1 192.168.0.1, eth0 192.168.7.1 ------ n2 192.168.7.2
    |       |                                    |      |
    e1 .1.5 pod1 .1.9                            e2 .2.5 pod2 .2.9    10.244.x.y, as in lab/topology.py

n1 speaks to n2 by another address than its primary one, so a source that is merely "some address of the
node" is told from the one MASQUERADE chooses. All that e2 sends goes to n1 first: a pod of n2 that comes to
a node port of n1 unmasqueraded (vector 33) gets its answer through n1, where it is translated back.
"""

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit

from nfqproxy.kernel.netns import Namespace, NamespaceGroup, Veth
from nfqproxy.lab.addresses import POD_GATEWAY_MAC
from nfqproxy.lab.topology import NODE_SYSCTLS, Pod, set_up_pod
from nfqproxy.model import Family, FrontendKey, Protocol
from tests.kernel.probes import QUIET_S, SILENCE
from tests.kernel.responder import Responder
from tests.scenarios.twins import TWINS

NODE_MAC = "ee:ee:ee:00:00:01"
UPLINK = "eth1"
"""n1's device towards the clients; by eth0 it reaches n2, as vector 33 has it."""
PRIMARY = "192.168.0.1"
INNER4, INNER6 = "192.168.7.1", "2001:db8:7::1"
"""n1's addresses on its link to n2."""
_HOST4, _HOST6 = "192.168.0.254", "fd00:192:168::254"
_N2_4, _N2_6 = "192.168.7.2", "2001:db8:7::2"

PODS = (
    ("e1", "n1", "10.244.1.5"),
    ("pod1", "n1", "10.244.1.9"),
    ("e2", "n2", "10.244.2.5"),
    ("pod2", "n2", "10.244.2.9"),
)
"""Name, node and address."""
CLIENTS = ("192.0.2.50", "8.8.8.8")
OUTSIDE = (("198.51.100.7", 80), ("203.0.113.9", 80), ("10.96.0.10", 80), ("10.96.0.10", 81))
"""What lan answers as "outside"."""

NAMES = {address: name for name, _, four in PODS for address in (four, TWINS[four])}
"""Pod address -> the name that its server answers with."""

SEEN_BY = {
    "e1": {Family.IPV4: PRIMARY, Family.IPV6: TWINS[PRIMARY]},
    "e2": {Family.IPV4: INNER4, Family.IPV6: INNER6},
}
"""Which address of n1 an endpoint sees where the source is the node's."""

# Above the servers' ports and below those that the kernel takes by itself; no two probes share one.
_PORTS = itertools.count(10000)


@dataclass(frozen=True, kw_only=True)
class VectorWorld:
    """The namespaces, and the servers' thread."""

    group: NamespaceGroup
    responder: Responder

    @property
    def node(self) -> Namespace:
        """n1, where the proxy runs."""
        return self.group["n1"]

    def namespace_of(self, source: str) -> Namespace:
        """Where a packet from this address (of either family) has its origin."""
        if source in NAMES:
            return self.group[NAMES[source]]
        clients = {address for four in CLIENTS for address in (four, TWINS[four])}
        return self.group["c"] if source in clients else self.node

    @contextmanager
    def node_addresses(self, addresses: tuple[str, ...]) -> Iterator[None]:
        """n1 has these addresses too; for IPv6 as one that nobody chooses as a source by itself."""
        for address in addresses:
            self.node.ip(f"addr add {_host(address)} dev {UPLINK}")
        try:
            yield
        finally:
            for address in addresses:
                self.node.ip(f"addr del {_host(address)} dev {UPLINK}")

    def probe_by_frame(self, source: str, key: FrontendKey) -> str:
        """Put a first packet straight on the client's wire, whatever its addresses, and tell what comes back.

        The beginning of the first answer to our port, or silence.
        """
        port = next_port()
        request = _packet(source, key, port)
        deadline = time.monotonic() + QUIET_S
        # ETH_P_ALL: whatever answers, by whichever address.
        with self.group["c"].socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
            wire.bind(("eth0", 3))
            frame = Ether(dst=NODE_MAC, src=wire.getsockname()[4]) / request
            wire.send(bytes(frame))
            while (left_s := deadline - time.monotonic()) > 0:
                wire.settimeout(left_s)
                try:
                    data, sender = wire.recvfrom(2048)
                except TimeoutError:
                    break
                answer = Ether(data)
                # PACKET_OUTGOING: our own.
                if sender[2] != 4 and port.to_bytes(2) in data[34:] and answer.type != 0x0806:
                    return str(answer.summary())
        return SILENCE


def next_port() -> int:
    """A source port that no other probe has had."""
    return next(_PORTS)


def _packet(source: str, key: FrontendKey, port: int) -> IP | IPv6:
    network = IPv6 if key.family is Family.IPV6 else IP
    transport = {
        Protocol.TCP: lambda: TCP(sport=port, dport=key.port, flags="S"),
        Protocol.UDP: lambda: UDP(sport=port, dport=key.port) / b"?",
        Protocol.SCTP: lambda: (
            SCTP(sport=port, dport=key.port, tag=0) / SCTPChunkInit(init_tag=7, a_rwnd=65535)
        ),
    }[key.protocol]()
    return network(src=source, dst=key.address) / transport


def _host(address: str) -> str:
    return f"{address}/128 nodad preferred_lft 0" if ":" in address else f"{address}/32"


def _pod_lines(pods: list[Pod]) -> Iterator[str]:
    for pod in pods:
        yield f"link set {pod.host_device} up"
        yield f"addr add fe80::1/64 dev {pod.host_device} nodad"
        yield f"route add {pod.address4}/32 dev {pod.host_device} scope link"
        yield f"route add {pod.address6}/128 dev {pod.host_device}"


def _set_up(group: NamespaceGroup, pods: list[Pod]) -> None:
    six = TWINS
    for member in group:
        member.sysctl(NODE_SYSCTLS)
        # The kernel limits the ICMP errors it sends; the vectors cause more.
        member.sysctl({"net/ipv4/icmp_ratemask": 0, "net/ipv6/icmp/ratemask": "2"})
    links = [
        Veth(left="c", left_device="eth0", right="lan", right_device="c"),
        Veth(left="lan", left_device="n1", right="n1", right_device=UPLINK, right_mac=NODE_MAC),
        Veth(left="n2", left_device="eth0", right="n1", right_device="eth0"),
    ]
    for pod in pods:
        links.append(
            Veth(
                left=pod.name,
                left_device="eth0",
                right=pod.node,
                right_device=pod.host_device,
                right_mac=POD_GATEWAY_MAC,
            )
        )
    group.connect(links)
    group["lan"].ip(
        "link set lo up",
        "link add br0 type bridge mcast_snooping 0",
        *(f"link set {port} master br0 up" for port in ("c", "n1")),
        "link set br0 up",
        f"addr add {_HOST4}/24 dev br0",
        f"addr add {_HOST6}/64 dev br0 nodad",
        *(f"route add {a}/32 dev br0" for a in CLIENTS),
        *(f"route add {six[a]}/128 dev br0" for a in CLIENTS),
        f"route add 10.244.0.0/16 via {PRIMARY}",
        f"route add {six['10.244.0.0/16']} via {six[PRIMARY]}",
        *(f"addr add {a}/32 dev lo" for a in {a for a, _ in OUTSIDE}),
        *(f"addr add {six[a]}/128 dev lo nodad" for a in {a for a, _ in OUTSIDE}),
    )
    group["c"].ip(
        "link set lo up",
        "link set eth0 up",
        *(f"addr add {a}/32 dev eth0" for a in CLIENTS),
        *(f"addr add {six[a]}/128 dev eth0 nodad" for a in CLIENTS),
        f"route add default via {PRIMARY} dev eth0 onlink",
        f"route add ::/0 via {six[PRIMARY]} dev eth0 onlink",
    )
    group["n1"].ip(
        "link set lo up",
        "link set eth0 up",
        f"link set {UPLINK} up",
        f"addr add {PRIMARY}/24 dev {UPLINK}",
        f"addr add {six[PRIMARY]}/64 dev {UPLINK} nodad",
        f"addr add {INNER4}/24 dev eth0",
        f"addr add {INNER6}/64 dev eth0 nodad",
        f"route add default via {_HOST4}",
        f"route add ::/0 via {_HOST6}",
        *(f"route add {a}/32 dev {UPLINK}" for a in CLIENTS),
        *(f"route add {six[a]}/128 dev {UPLINK}" for a in CLIENTS),
        f"route add 10.244.2.0/24 via {_N2_4}",
        f"route add {six['10.244.2.0/24']} via {_N2_6}",
        *_pod_lines([pod for pod in pods if pod.node == "n1"]),
    )
    e2 = next(pod for pod in pods if pod.name == "e2")
    group["n2"].ip(
        "link set lo up",
        "link set eth0 up",
        f"addr add {_N2_4}/24 dev eth0",
        f"addr add {_N2_6}/64 dev eth0 nodad",
        f"route add default via {INNER4}",
        f"route add ::/0 via {INNER6}",
        *_pod_lines([pod for pod in pods if pod.node == "n2"]),
        f"route add default via {INNER4} table 100",
        f"route add ::/0 via {INNER6} table 100",
    )
    for family in ("-4", "-6"):
        group["n2"].run("ip", family, *f"rule add iif {e2.host_device} lookup 100".split())
    for pod in pods:
        set_up_pod(pod)
        group[pod.node].sysctl(
            {
                f"net/ipv4/conf/{pod.host_device}/proxy_arp": 1,
                f"net/ipv4/neigh/{pod.host_device}/proxy_delay": 0,
            }
        )


def _serve(group: NamespaceGroup, responder: Responder) -> None:
    places = [
        (name, name, port, four) for name, _, four in PODS if name in ("e1", "e2") for port in (8080, 5353)
    ]  # fmt: skip
    places += [("lan", "outside", port, address) for address, port in OUTSIDE]
    places.append(("n1", "n1", 30080, "127.0.0.1"))
    for namespace, name, port, four in places:
        addresses = (four, TWINS[four])
        responder.serve(group[namespace], name, port, *addresses)
        responder.serve_sctp(group[namespace], name, port, *addresses)


@contextmanager
def vector_world() -> Iterator[VectorWorld]:
    """Build it; remove every trace afterwards."""
    with NamespaceGroup() as group, Responder() as responder:
        group.create(["lan", "c", "n1", "n2", *(name for name, _, _ in PODS)])
        pods = [
            Pod(
                name=name,
                namespace=group[name],
                node=node,
                address4=four,
                address6=TWINS[four],
                # Named as vector 33 has it.
                host_device="vethab12" if name == "pod1" else f"veth-{name}",
            )
            for name, node, four in PODS
        ]
        _set_up(group, pods)
        _serve(group, responder)
        yield VectorWorld(group=group, responder=responder)
