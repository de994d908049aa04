"""Which packets the twins are asked about: destinations of ../shared/data/services.yaml x kinds of client.

The destinations are read off the manifests here, by a few lines of their own, so that a frontend which the
proxy overlooks is asked about all the same. ``default/kubernetes``, which the rules of kube-proxy also
serve, is left out: its Service (10.96.0.1, to 192.0.2.1:6443) is not among the manifests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from nfqproxy.control.address import family_of
from nfqproxy.core.explain import Packet, parse_packet
from nfqproxy.model import Family, FrontendKey, Protocol
from tests.kernel.manifests import Manifest

NODE = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:2::1"}
SECOND = {Family.IPV4: "192.0.2.101", Family.IPV6: "2001:db8:2::101"}
"""A further address of the node, none of its primary ones."""
BOUND_VIP = "198.51.100.7"
"""The load balancer's IP of Service lb, which the node has as an address for a while."""
HEALTH_PORT = 30999
STICKY_CLIENTS = 24
"""Addresses that ask a Service with affinity, beside one of each kind of client."""
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")


class Who(StrEnum):
    """Kinds of client; the values stand in the documentation."""

    POD = "pod"
    ITSELF = "the endpoint itself"
    FAR_POD = "pod of n2"
    FAR_ITSELF = "the endpoint itself, on n2"
    NODE = "node"
    VIP_OWNER = "node, from its load-balancer IP"
    CLIENT = "client"
    CLIENT_2 = "client in the second source range"
    OUTSIDER = "client in no source range"


SOURCES: dict[Who, dict[Family, str]] = {
    Who.POD: {Family.IPV4: "10.244.1.13", Family.IPV6: "fd00:10:244:1::13"},
    Who.FAR_POD: {Family.IPV4: "10.244.2.11", Family.IPV6: "fd00:10:244:2::11"},
    Who.VIP_OWNER: {Family.IPV4: BOUND_VIP},
    Who.CLIENT: {Family.IPV4: "192.0.2.10", Family.IPV6: "2001:db8:2::10"},
    Who.CLIENT_2: {Family.IPV4: "198.18.0.9"},
    Who.OUTSIDER: {Family.IPV4: "100.64.0.9", Family.IPV6: "2001:db8:64::9"},
}
"""Addresses of the clients that have one; an endpoint has its own, the node's is the kernel's choice."""


class Place(StrEnum):
    """Kinds of destination; the values stand in the documentation."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "external IP"
    LB_IP = "load-balancer IP"
    NODE_PORT = "node port"
    SECOND = "node port on a second address of the node"
    LOOPBACK = "node port on 127.0.0.1"
    LOOPBACK6 = "node port on ::1"
    ON_VIP = "node port on a load-balancer IP that the node has as an address"
    OFF_VIP = "node port on a load-balancer IP"
    HEALTH = "health-check node port"
    NO_PORT = "another port or protocol of a ClusterIP"
    PING = "ping to a ClusterIP"
    NO_OWNER = "unowned address of a ServiceCIDR"
    OTHER_PORT = "another port of an external or load-balancer IP"
    CLOSED_PORT = "a port of the node that is no node port"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A destination; without a protocol it is pinged."""

    place: Place
    address: str
    port: int = 0
    """0 for a ping."""
    protocol: Protocol | None = Protocol.TCP
    service: str = ""
    """Name of the Service; empty where none has it."""
    endpoints: tuple[tuple[str, str, int], ...] = ()
    """Node, address and port of each endpoint of the family, whatever its conditions."""
    is_sticky: bool = False

    @property
    def family(self) -> Family:
        return family_of(self.address)

    @property
    def key(self) -> FrontendKey:
        """What a probe is sent to; not for a ping."""
        assert self.protocol is not None
        return FrontendKey(self.protocol, self.address, self.port)

    def of(self, node: str) -> str:
        """The first endpoint on a node; empty without."""
        return next((address for name, address, _ in self.endpoints if name == node), "")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A first packet: who sends it from where, to what."""

    target: Target
    who: Who
    source: str
    is_vip_bound: bool = False
    """Asked while the node has BOUND_VIP as an address of its own."""

    @property
    def packet(self) -> Packet:
        """As explain reads and writes it."""
        to = self.target
        if to.protocol is None:
            text = f"{to.address}/{'icmp' if to.family is Family.IPV4 else 'icmpv6'}"
        else:
            text = f"[{to.address}]:{to.port}/{to.protocol.name.lower()}"
            if to.family is Family.IPV4:
                text = text.replace("[", "").replace("]", "")
        return parse_packet(self.source, text)

    @property
    def on_primary(self) -> "Case":
        """The same of the same Service's node port on the node's primary address."""
        address = NODE[self.target.family]
        return replace(
            self,
            target=replace(self.target, place=Place.NODE_PORT, address=address),
            source=address if self.who is Who.NODE else self.source,
        )

    def __str__(self) -> str:
        service = f" of {self.target.service}" if self.target.service else ""
        bound = f", {BOUND_VIP} being the node's" if self.is_vip_bound else ""
        return f"{self.who} {self.source} -> {self.target.place}{service} {self.packet}{bound}"


def targets(objects: Sequence[Manifest]) -> list[Target]:
    """Every frontend of the manifests, and the destinations beside them that could be mistaken for one."""
    found = [target for item in objects for target in _frontends(item, objects)]
    node_ports = [target for target in found if target.place is Place.NODE_PORT]
    for place, addresses in (
        (Place.SECOND, SECOND),
        (Place.LOOPBACK, {Family.IPV4: "127.0.0.1"}),
        (Place.LOOPBACK6, {Family.IPV6: "::1"}),
        (Place.OFF_VIP, {Family.IPV4: BOUND_VIP}),
    ):
        found += [
            _moved(target, place, addresses[target.family])
            for target in node_ports
            if target.family in addresses
        ]
    found += [
        Target(place=Place.HEALTH, address=NODE[Family.IPV4], port=HEALTH_PORT),
        Target(place=Place.CLOSED_PORT, address=NODE[Family.IPV4], port=30099),
        # shop has no address of this family, so its node port has none either.
        Target(place=Place.CLOSED_PORT, address=NODE[Family.IPV6], port=30080),
        Target(place=Place.OTHER_PORT, address=BOUND_VIP, port=81),
        Target(place=Place.OTHER_PORT, address="203.0.113.9", port=81),
    ]
    for address in ("10.96.0.10", "10.96.0.60", "10.96.0.61", "fd00:10:96::70"):
        found += [
            Target(place=Place.NO_PORT, address=address, port=81),
            Target(place=Place.NO_PORT, address=address, port=80, protocol=Protocol.UDP),
            Target(place=Place.PING, address=address, protocol=None),
        ]
    found += [
        Target(place=Place.NO_OWNER, address=address, port=port, protocol=protocol)
        for address in ("10.96.0.99", "fd00:10:96::99")
        for port, protocol in ((80, Protocol.TCP), (53, Protocol.UDP), (0, None))
    ]
    return found


def _frontends(item: Manifest, objects: Sequence[Manifest]) -> Iterator[Target]:
    if item["kind"] != "Service" or item["spec"]["clusterIP"] == "None":
        return
    name, spec = item["metadata"]["name"], item["spec"]
    ingress = item.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    for port in spec["ports"]:
        protocol = Protocol[port.get("protocol", "TCP")]
        cluster_ips = spec.get("clusterIPs", [spec["clusterIP"]])
        places = [(Place.CLUSTER_IP, address, port["port"]) for address in cluster_ips]
        places += [(Place.EXTERNAL_IP, a, port["port"]) for a in spec.get("externalIPs", ())]
        places += [(Place.LB_IP, entry["ip"], port["port"]) for entry in ingress]
        if "nodePort" in port:
            families = map(family_of, cluster_ips)
            places += [(Place.NODE_PORT, NODE[family], port["nodePort"]) for family in families]
        for place, address, number in places:
            endpoints = _endpoints(name, port["name"], family_of(address), objects)
            yield Target(
                place=place,
                address=address,
                port=number,
                protocol=protocol,
                service=name,
                endpoints=tuple(endpoints),
                is_sticky=spec.get("sessionAffinity") == "ClientIP",
            )


def _endpoints(
    service: str, port_name: str, family: Family, objects: Sequence[Manifest]
) -> Iterator[tuple[str, str, int]]:
    for item in objects:
        if item["kind"] != "EndpointSlice":
            continue
        is_ours = item["metadata"]["labels"]["kubernetes.io/service-name"] == service
        if is_ours and item["addressType"] == f"IPv{int(family)}":
            (number,) = (p["port"] for p in item["ports"] if p["name"] == port_name)
            for endpoint in item["endpoints"]:
                yield endpoint["nodeName"], endpoint["addresses"][0], number


def _moved(target: Target, place: Place, address: str) -> Target:
    return replace(target, place=place, address=address)


_OWN = (Place.SECOND, Place.LOOPBACK, Place.LOOPBACK6, Place.ON_VIP)
"""To an address of its own a process of the node sends from that very address."""
_CLIENTS = tuple(who for who in SOURCES if who is not Who.VIP_OWNER)


def cases(objects: Sequence[Manifest]) -> list[Case]:
    """Every destination, from every kind of client that can send there."""
    found: list[Case] = []
    for target in targets(objects):
        found += _cases(target, _CLIENTS)
        if target.is_sticky:
            found += [
                Case(target=target, who=Who.CLIENT_2, source=f"198.18.0.{number}")
                for number in range(10, 10 + STICKY_CLIENTS)
            ]
    return found + [replace(case, is_vip_bound=True) for case in _bound_vip_cases(objects)]


def _bound_vip_cases(objects: Sequence[Manifest]) -> Iterator[Case]:
    """What may change when the node has BOUND_VIP as an address."""
    for target in targets(objects):
        if target.place is Place.OFF_VIP:
            yield from _cases(_moved(target, Place.ON_VIP, BOUND_VIP), _CLIENTS)
        elif target.address == BOUND_VIP and target.place is Place.LB_IP:
            yield from (c for c in _cases(target, _CLIENTS) if c.who is not Who.NODE)
            yield Case(target=target, who=Who.NODE, source=BOUND_VIP)
        elif target.family is Family.IPV4 and target.place is Place.NODE_PORT:
            yield from _cases(target, tuple(SOURCES))
        elif target.family is Family.IPV4 and target.place in _OTHER_FRONTENDS:
            yield from _cases(target, (Who.VIP_OWNER, Who.CLIENT))


_OTHER_FRONTENDS = (Place.CLUSTER_IP, Place.EXTERNAL_IP, Place.LB_IP)


def _cases(target: Target, clients: Sequence[Who]) -> Iterator[Case]:
    family = target.family
    own = target.address if target.place in _OWN else NODE[family]
    yield Case(target=target, who=Who.NODE, source=own)
    if target.place in (Place.LOOPBACK, Place.LOOPBACK6):
        return  # never leaves the node
    for who in clients:
        if family in SOURCES[who]:
            yield Case(target=target, who=who, source=SOURCES[who][family])
    for who, node in ((Who.ITSELF, "n1"), (Who.FAR_ITSELF, "n2")):
        if target.of(node):
            yield Case(target=target, who=who, source=target.of(node))
