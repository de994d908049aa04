"""Services as the proxy sees them: one record per service port and address family (SEMANTICS 2.1, 2.2).

Addresses are text in canonical form (``ipaddress``'s compressed form); ports are 0..65535.
"""

from enum import IntEnum, StrEnum

from msgspec import Struct


class Family(IntEnum):
    """Address family, by IP version number."""

    IPV4 = 4
    IPV6 = 6


class Protocol(IntEnum):
    """Transport protocol, by IANA number (the value in the IP header)."""

    TCP = 6
    UDP = 17
    SCTP = 132


class FrontendKind(StrEnum):
    """How a frontend address belongs to its Service; match order of SEMANTICS 2.5."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class TrafficPolicy(StrEnum):
    """internalTrafficPolicy / externalTrafficPolicy."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class ClientClass(IntEnum):
    """Where a packet's source stands (SEMANTICS 2.4); tested in this order, the value is an index."""

    POD = 0
    NODE = 1
    EXTERNAL = 2


class FrontendKey(Struct, frozen=True, order=True):
    """A virtual address that clients connect to."""

    protocol: Protocol
    address: str
    port: int

    @property
    def family(self) -> Family:
        """The family of the address."""
        return Family.IPV6 if ":" in self.address else Family.IPV4

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}/{self.protocol.name.lower()}"


class Endpoint(Struct, frozen=True, kw_only=True):
    """One serving address of one service port, merged from all its EndpointSlices."""

    address: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str | None = None
    """nodeName, None when the slice does not say."""
    zone: str | None = None
    weight: int = 1
    """Relative share, 0 drains; from nfqproxy.io/weights or nfqproxy.io/weight."""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class ServicePortName(Struct, frozen=True, order=True):
    """Identity of a service port within one family."""

    namespace: str
    service: str
    port_name: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        name = f":{self.port_name}" if self.port_name else ""
        return f"{self.namespace}/{self.service}{name}"


class ServicePort(Struct, frozen=True, kw_only=True):
    """Everything the proxy knows of one port of one Service in one family."""

    name: ServicePortName
    cluster_ip: str
    port: int
    node_port: int = 0
    """0: none."""
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    load_balancer_source_ranges: tuple[str, ...] = ()
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    affinity_timeout_s: int = 0
    """ClientIP affinity time-out in seconds, 0: no affinity."""
    health_check_node_port: int = 0
    balancer: str = "weighted-random"
    steered: bool = False
    """Label or annotation nfqproxy.io/steer is "true" (overlay mode)."""
    endpoints: tuple[Endpoint, ...] = ()
    """Sorted by "ip:port" text."""


class NodeContext(Struct, frozen=True, kw_only=True):
    """What a decision must know of the node it runs on."""

    node_name: str
    zone: str | None = None
    node_port_addresses: tuple[str, ...] = ()
    """Addresses (both families) on which node ports are served."""
    cluster_cidrs: tuple[str, ...] = ()
    """Pod CIDRs; empty: no local-traffic detector (SEMANTICS 2.4)."""
    masquerade_all: bool = False
