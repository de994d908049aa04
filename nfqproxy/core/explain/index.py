"""What is known of an address apart from its frontends: to say why nothing matches."""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from nfqproxy.model import Family, NodeContext, Protocol, ServicePort, ServicePortName


class Networks:
    """Some networks, asked for the one that holds an address."""

    def __init__(self, cidrs: Iterable[str]) -> None:
        self._networks = [
            (
                str(network),
                network.version,
                int(network.network_address),
                network.max_prefixlen - network.prefixlen,
            )
            for network in map(ip_network, cidrs)
        ]

    def holding(self, address: str) -> str | None:
        """The first network with this address in it."""
        if not self._networks:
            return None
        packed = ip_address(address)
        version, value = packed.version, int(packed)
        for text, of_version, first, host_bits in self._networks:
            if version == of_version and value >> host_bits == first >> host_bits:
                return text
        return None


class AddressIndex:
    """Services by the addresses and node ports they own, and what the node itself owns."""

    def __init__(
        self, ports: Iterable[ServicePort], node: NodeContext, local_addresses: Iterable[str]
    ) -> None:
        self.ports: dict[ServicePortName, ServicePort] = {}
        self.cluster_ips: dict[str, ServicePortName] = {}
        self.outer_ips: dict[str, ServicePortName] = {}
        """External and load-balancer IPs."""
        self.node_ports: dict[tuple[Protocol, int, Family], ServicePortName] = {}
        for port in sorted(ports, key=lambda port: port.name):
            name = port.name
            self.ports[name] = port
            self.cluster_ips.setdefault(port.cluster_ip, name)
            for address in (*port.external_ips, *port.load_balancer_ips):
                self.outer_ips.setdefault(address, name)
            if port.node_port:
                self.node_ports.setdefault((name.protocol, port.node_port, name.family), name)
        self.local = frozenset((*node.addresses, *local_addresses))
        self.service_networks = Networks(node.service_cidrs)
        self.pod_networks = Networks(node.cluster_cidrs)

    def is_local(self, address: str) -> bool:
        """Whether it is an address of this node, as far as is known, or a loopback one."""
        return address in self.local or is_loopback(address)


def is_loopback(address: str) -> bool:
    """127.0.0.0/8 or ::1."""
    return address.startswith("127.") or address == "::1"


def service_of(name: ServicePortName) -> str:
    """How messages call the Service of a port."""
    return f"{name.namespace}/{name.service}"
