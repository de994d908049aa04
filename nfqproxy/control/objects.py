"""Kubernetes objects as values, with the fields a node proxy uses and nothing else.

A decoder in ``sources`` makes them, already checked: addresses are in canonical form, ports in
range, absent fields replaced by the defaults of the Kubernetes API. They compare by value.
"""

from collections.abc import Mapping

from msgspec import Struct

from nfqproxy.model import Family, Protocol, TrafficPolicy

DEFAULT_AFFINITY_TIMEOUT_S = 10_800
"""The time-out of ClientIP affinity where sessionAffinityConfig gives none."""


class ServicePortSpec(Struct, frozen=True, kw_only=True, gc=False):
    """One entry of a Service's spec.ports."""

    name: str = ""
    protocol: Protocol = Protocol.TCP
    port: int
    """1..65535."""
    node_port: int = 0
    """0: none."""


class Service(Struct, frozen=True, kw_only=True, gc=False):
    """v1 Service."""

    namespace: str
    name: str
    origin: str = ""
    """Where it was read, for messages: a file name or the API server."""
    type: str = "ClusterIP"
    """ClusterIP, NodePort, LoadBalancer or ExternalName."""
    cluster_ips: tuple[str, ...] = ()
    """At most one of each family; empty: headless or not assigned."""
    ports: tuple[ServicePortSpec, ...] = ()
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    """status.loadBalancer.ingress entries with an ip and ipMode VIP or none."""
    load_balancer_source_ranges: tuple[str, ...] = ()
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    affinity_timeout_s: int = 0
    """0: no session affinity."""
    health_check_node_port: int = 0
    """0: none."""
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}
    """Those that begin with ``nfqproxy.io/``."""
    weights: Mapping[str, int] = {}
    """Annotation nfqproxy.io/weights: IP, targetRef name, node name or ``zone:NAME`` -> weight."""


class SlicePort(Struct, frozen=True, kw_only=True, gc=False):
    """One entry of an EndpointSlice's ports; those without name or port are not kept."""

    name: str
    protocol: Protocol = Protocol.TCP
    port: int


class SliceEndpoint(Struct, frozen=True, kw_only=True, gc=False):
    """One entry of an EndpointSlice's endpoints; of its addresses the first counts."""

    address: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str | None = None
    zone: str | None = None
    target_name: str | None = None
    """targetRef.name, the pod's name as a rule."""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class EndpointSlice(Struct, frozen=True, kw_only=True, gc=False):
    """discovery.k8s.io/v1 EndpointSlice of addressType IPv4 or IPv6."""

    namespace: str
    name: str
    origin: str = ""
    service: str
    """Label kubernetes.io/service-name; empty: belongs to no Service."""
    family: Family
    ports: tuple[SlicePort, ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()
    weight: int | None = None
    """Annotation nfqproxy.io/weight."""
    labels: Mapping[str, str] = {}


class Node(Struct, frozen=True, kw_only=True, gc=False):
    """v1 Node."""

    name: str
    origin: str = ""
    labels: Mapping[str, str] = {}
    pod_cidrs: tuple[str, ...] = ()
    internal_ips: tuple[str, ...] = ()
    external_ips: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()
    """Their keys."""
    deleting: bool = False


class ServiceCidr(Struct, frozen=True, kw_only=True, gc=False):
    """networking.k8s.io/v1 ServiceCIDR."""

    name: str
    origin: str = ""
    cidrs: tuple[str, ...] = ()


KubernetesObject = Service | EndpointSlice | Node | ServiceCidr

ObjectKey = tuple[type[KubernetesObject], str, str]
"""Kind, namespace (empty: none) and name."""


def object_key(value: KubernetesObject) -> ObjectKey:
    """What tells an object from every other."""
    return type(value), getattr(value, "namespace", ""), value.name


class ObjectChange(Struct, frozen=True, kw_only=True, gc=False):
    """The way from one moment to a later one."""

    upserts: tuple[KubernetesObject, ...] = ()
    """Objects that are new or differ."""
    removes: tuple[ObjectKey, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.upserts or self.removes)


class Objects(Struct, frozen=True, kw_only=True, gc=False):
    """All objects of one moment."""

    services: tuple[Service, ...] = ()
    endpoint_slices: tuple[EndpointSlice, ...] = ()
    nodes: tuple[Node, ...] = ()
    service_cidrs: tuple[ServiceCidr, ...] = ()

    def __len__(self) -> int:
        return (
            len(self.services)
            + len(self.endpoint_slices)
            + len(self.nodes)
            + len(self.service_cidrs)
        )
