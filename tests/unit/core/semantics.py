"""What a packet must experience, written down once more, slowly and from the objects alone.

An independent reading of the contract: frontends, candidate sets, classes of source, decisions, source
ranges, hairpin, refusals. It shares with the program the plain objects and nothing that decides, computes
everything anew for every packet, and is held equal to ``explain`` (and so to the plans of the workers) by
``test_semantics.py``.
"""

from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address, ip_network

from nfqproxy.control.node import Detector, NodeSettings, NonPodBackends
from nfqproxy.control.objects import Node, Objects, Service, ServicePortSpec, SliceEndpoint
from nfqproxy.core.explain import Packet
from nfqproxy.model import TrafficPolicy

LOCAL = TrafficPolicy.LOCAL


@dataclass
class Outcome:
    verdict: str
    client: str
    frontend: tuple[str, str, str, str] | None = None
    """Kind, namespace, Service, port name."""
    backends: dict[tuple[str, int], tuple[int, bool]] = field(default_factory=dict)
    """(address, port) -> (weight, masqueraded)."""


@dataclass
class Endpoint:
    address: str
    port: int
    weight: int
    item: SliceEndpoint


@cache
def within(address: str, cidr: str) -> bool:
    one, network = ip_address(address), ip_network(cidr)
    return one.version == network.version and one in network


@cache
def version(address: str) -> int:
    return ip_address(address.split("/")[0]).version


class World:
    def __init__(self, objects: Objects, settings: NodeSettings) -> None:
        self.objects = objects
        self.settings = settings
        self.me = next((n for n in objects.nodes if n.name == settings.node_name), None)
        own = (*self.me.internal_ips, *self.me.external_ips) if self.me else ()
        self.own_addresses = [*own, *settings.addresses]

    # Who the client is.

    def is_own(self, address: str) -> bool:
        return address in self.own_addresses or ip_address(address).is_loopback

    def is_sent_here(self, packet: Packet) -> bool:
        return self.is_own(packet.source) and packet.interface in (None, "lo")

    def has_detector(self, family: int) -> bool:
        match self.settings.detector:
            case Detector.CLUSTER_CIDR:
                return any(version(cidr) == family for cidr in self.settings.cluster_cidrs)
            case Detector.NODE_CIDR:
                return any(
                    version(cidr) == family for cidr in (self.me.pod_cidrs if self.me else ())
                )
        return True

    def client(self, packet: Packet) -> str:
        interface = "" if self.is_sent_here(packet) else packet.interface or ""
        match self.settings.detector:
            case Detector.CLUSTER_CIDR:
                is_pod = any(within(packet.source, c) for c in self.settings.cluster_cidrs)
            case Detector.NODE_CIDR:
                is_pod = any(
                    within(packet.source, c) for c in (self.me.pod_cidrs if self.me else ())
                )
            case Detector.BRIDGE_INTERFACE:
                is_pod = interface == self.settings.bridge_interface
            case Detector.INTERFACE_NAME_PREFIX:
                is_pod = interface.startswith(self.settings.interface_name_prefix)
        if is_pod:
            return "pod"
        return "node" if self.is_own(packet.source) else "external"

    # Which frontend it asks for.

    def primary(self, family: int) -> list[str]:
        return [a for a in self.own_addresses if version(a) == family][:1]

    def node_port_addresses(self, family: int) -> list[str]:
        networks = self.settings.node_port_networks
        if networks is None:
            accepted = self.primary(family)
        else:
            networks = tuple(n for n in networks if version(n) == family)
            accepted = [
                a
                for a in self.own_addresses
                if version(a) == family and (not networks or any(within(a, n) for n in networks))
            ]
        if family == 4 and self.settings.localhost_node_ports:
            mine = [n for n in networks or () if version(n) == 4]
            if not mine or any(within("127.0.0.1", n) for n in mine):
                accepted = [*accepted, "127.0.0.1"]
        return accepted

    def services(self) -> list[Service]:
        excluded = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
        return [
            s
            for s in sorted(self.objects.services, key=lambda s: (s.namespace, s.name))
            if s.type != "ExternalName" and not any(label in s.labels for label in excluded)
        ]

    def frontend(self, packet: Packet) -> tuple[str, Service, ServicePortSpec] | None:
        family = packet.family
        for kind in ("ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"):
            for service in self.services():
                if not any(version(a) == family for a in service.cluster_ips):
                    continue
                for port in sorted(service.ports, key=lambda port: port.name):
                    addresses = {
                        "ClusterIP": service.cluster_ips,
                        "ExternalIP": service.external_ips,
                        "LoadBalancer": service.load_balancer_ips,
                        "NodePort": self.node_port_addresses(family) if port.node_port else (),
                    }[kind]
                    number = port.node_port if kind == "NodePort" else port.port
                    if (port.protocol, number) == (packet.protocol, packet.port) and (
                        packet.destination in addresses
                    ):
                        return kind, service, port
        return None

    # Who could answer.

    def endpoints(self, service: Service, port: ServicePortSpec, family: int) -> list[Endpoint]:
        found: dict[tuple[str, int], Endpoint] = {}
        for piece in sorted(self.objects.endpoint_slices, key=lambda s: s.name):
            if (piece.namespace, piece.service) != (service.namespace, service.name):
                continue
            if piece.family != family:
                continue
            for slice_port in piece.ports:
                if (slice_port.name, slice_port.protocol) != (port.name, port.protocol):
                    continue
                for item in piece.endpoints:
                    key = (item.address, slice_port.port)
                    mine = item.node == self.settings.node_name
                    if key in found and (
                        found[key].item.node == self.settings.node_name or not mine
                    ):
                        continue
                    weight = service.weights.get(item.address, piece.weight)
                    found[key] = Endpoint(*key, 1 if weight is None else weight, item)
        return list(found.values())

    def candidates(self, endpoints: list[Endpoint]) -> tuple[list[Endpoint], list[Endpoint]]:
        me: Node | None = self.me
        name = self.settings.node_name
        zone = me.labels.get("topology.kubernetes.io/zone") if me else None
        ready = [e for e in endpoints if e.item.ready]
        terminating = [e for e in endpoints if e.item.serving and e.item.terminating]

        # nfqproxy's own: who is drained to the last is as good as not there.
        def some(found: list[Endpoint]) -> bool:
            return any(e.weight for e in found)

        hinted = [e for e in ready if name in e.item.node_hints]
        near = [e for e in ready if zone and zone in e.item.zone_hints]
        if not some(ready):
            cluster = terminating
        elif all(e.item.node_hints for e in ready) and some(hinted):
            cluster = hinted
        elif all(e.item.zone_hints for e in ready) and some(near):
            cluster = near
        else:
            cluster = ready
        local = [e for e in ready if e.item.node == name]
        if not some(local):
            local = [e for e in terminating if e.item.node == name]
        return cluster if some(cluster) else [], local if some(local) else []

    # What is decided.

    def outcome(self, packet: Packet) -> Outcome:
        who = self.client(packet)
        here = self.is_sent_here(packet)
        if not here and any(ip_address(a).is_loopback for a in (packet.source, packet.destination)):
            return Outcome("drop", who)
        found = self.frontend(packet)
        if found is None:
            return self.stray(packet, who)
        kind, service, port = found
        named = (kind, service.namespace, service.name, port.name)
        family = packet.family
        if kind == "LoadBalancer" and not self.may_connect(service, packet):
            return Outcome("drop", who, named)
        cluster, local = self.candidates(self.endpoints(service, port, family))
        if not cluster:
            return Outcome("reject", who, named)
        if kind == "ClusterIP":
            use_local = service.internal_policy is LOCAL
            masquerade = self.settings.masquerade_all or (
                self.has_detector(family) and who != "pod"
            )
        else:
            use_local = service.external_policy is LOCAL and who == "external"
            masquerade = service.external_policy is not LOCAL or who == "node"
        chosen = local if use_local else cluster
        if not chosen:
            return Outcome("drop", who, named)
        return Outcome(
            "backend",
            who,
            named,
            {
                (e.address, e.port): (
                    e.weight,
                    # Delivered on the node, a packet never comes to where sources are masqueraded.
                    not self.is_own(e.address)
                    and (
                        masquerade
                        or e.address == packet.source
                        or (who == "pod" and self.is_foreign(e.address))
                    ),
                )
                for e in chosen
            },
        )

    def stray(self, packet: Packet, who: str) -> Outcome:
        if not self.is_sent_here(packet) and self.is_own(packet.destination):
            return Outcome("pass", who)
        if any(packet.destination in s.cluster_ips for s in self.services() if s.ports):
            return Outcome("reject", who)
        ranges = [c for item in self.objects.service_cidrs for c in item.cidrs]
        return Outcome(
            "drop" if any(within(packet.destination, c) for c in ranges) else "pass", who
        )

    def may_connect(self, service: Service, packet: Packet) -> bool:
        ranges = [r for r in service.load_balancer_source_ranges if version(r) == packet.family]
        if not ranges or any(within(packet.source, r) for r in ranges):
            return True
        node_is_in = any(within(a, r) for a in self.primary(packet.family) for r in ranges)
        return node_is_in and packet.source in service.load_balancer_ips

    def is_foreign(self, address: str) -> bool:
        """Whether a backend is known to be outside the pod network, and that matters."""
        networks = list(self.settings.cluster_cidrs)
        choice = self.settings.non_pod_backends
        if choice is NonPodBackends.ALWAYS and not networks:
            networks = [cidr for node in self.objects.nodes for cidr in node.pod_cidrs]
        networks = [n for n in networks if version(n) == version(address)]
        if choice is NonPodBackends.NEVER or not networks:
            return False
        return not any(within(address, network) for network in networks)
