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


class FrontendKey(Struct, frozen=True, order=True, gc=False):
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


class Endpoint(Struct, frozen=True, kw_only=True, gc=False):
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


class ServicePortName(Struct, frozen=True, order=True, gc=False):
    """Identity of a service port within one family."""

    namespace: str
    service: str
    port_name: str
    protocol: Protocol
    family: Family

    def __str__(self) -> str:
        name = f":{self.port_name}" if self.port_name else ""
        return f"{self.namespace}/{self.service}{name}"


class ServicePort(Struct, frozen=True, kw_only=True, gc=False):
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


class PodDetector(Struct, frozen=True, kw_only=True, gc=False):
    """What tells pods from other clients (SEMANTICS 2.4); with nothing set nobody is a pod."""

    cluster_cidrs: tuple[str, ...] = ()
    """Networks whose addresses count as pods."""
    bridge_interface: str = ""
    """What arrives by this interface counts as a pod."""
    interface_name_prefix: str = ""
    """What arrives by an interface of such a name counts as a pod."""

    @property
    def is_by_interface(self) -> bool:
        """True when the interface that a packet came in by decides."""
        return bool(self.bridge_interface or self.interface_name_prefix)


class NodeContext(Struct, frozen=True, kw_only=True, gc=False):
    """What a decision must know of the node it runs on."""

    node_name: str
    zone: str | None = None
    addresses: tuple[str, ...] = ()
    """The node's own addresses that are known from its Node object and the configuration."""
    primary_addresses: tuple[str, ...] = ()
    """At most one of each family."""
    node_port_addresses: tuple[str, ...] = ()
    """Addresses (both families) on which node ports are served."""
    cluster_cidrs: tuple[str, ...] = ()
    """Networks whose addresses count as pods: the cluster's (detector ClusterCIDR) or this node's
    (NodeCIDR)."""
    bridge_interface: str = ""
    """Detector BridgeInterface: what arrives by this interface counts as a pod."""
    interface_name_prefix: str = ""
    """Detector InterfaceNamePrefix: what arrives by an interface of such a name counts as a pod."""
    pod_networks: tuple[str, ...] = ()
    """Networks of all pods of the cluster, whatever tells pods from other clients; empty: not known.
    A backend outside them is no pod."""
    service_cidrs: tuple[str, ...] = ()
    """Networks that Services get their addresses from."""
    masquerade_all: bool = False
    masquerade_non_pod_backends: bool = True
    """A pod's connection to a backend outside ``pod_networks`` is masqueraded, because no rule of the
    CNI's will see it (KERNEL 2.4)."""
    localhost_node_ports: bool = False
    """Serve IPv4 node ports on 127.0.0.1 too, for processes of this node."""

    @property
    def pod_detector(self) -> PodDetector:
        """What tells pods from other clients."""
        return PodDetector(
            cluster_cidrs=self.cluster_cidrs,
            bridge_interface=self.bridge_interface,
            interface_name_prefix=self.interface_name_prefix,
        )

    @property
    def has_detector(self) -> bool:
        """True when something tells pods from other clients (SEMANTICS 2.4)."""
        return bool(self.cluster_cidrs) or self.pod_detector.is_by_interface
