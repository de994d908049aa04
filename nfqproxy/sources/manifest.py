"""The API types as they are written down: fields and types, nothing of their meaning.

Sources: k8s.io/api core/v1 (Service, Node), discovery/v1 (EndpointSlice), networking/v1
(ServiceCIDR), with the fields that older servers printed. Every field is listed, because a file
may hold nothing else; those the proxy does not read are of type Any. An explicit null is the same
as an absent field, as in the API.
"""

from typing import Any

from msgspec import Struct, field


def _api_name(name: str) -> str:
    """``cluster_ips`` -> ``clusterIPs``: camel case, with acronyms as the API spells them."""
    acronyms = {"ip": "IP", "ips": "IPs", "cidr": "CIDR", "cidrs": "CIDRs", "id": "ID"}
    first, *rest = name.split("_")
    return first + "".join(acronyms.get(part, part.capitalize()) for part in rest)


class Shape(Struct, frozen=True, rename=_api_name):
    """Base of all API types."""


class ObjectMeta(Shape, frozen=True):
    """metav1.ObjectMeta."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = None
    generate_name: Any = None
    self_link: Any = None
    uid: Any = None
    resource_version: Any = None
    generation: Any = None
    creation_timestamp: Any = None
    deletion_grace_period_seconds: Any = None
    owner_references: Any = None
    finalizers: Any = None
    managed_fields: Any = None
    cluster_name: Any = None


class PortOfService(Shape, frozen=True):
    """core/v1 ServicePort."""

    port: int | None = None
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None
    target_port: int | str | None = None
    app_protocol: str | None = None


class ClientIPConfig(Shape, frozen=True):
    """core/v1 ClientIPConfig."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(Shape, frozen=True):
    """core/v1 SessionAffinityConfig."""

    client_ip: ClientIPConfig | None = None


class ServiceSpec(Shape, frozen=True):
    """core/v1 ServiceSpec."""

    ports: list[PortOfService] | None = None
    cluster_ip: str | None = None
    cluster_ips: list[str] | None = None
    type: str | None = None
    external_ips: list[str] | None = None
    load_balancer_source_ranges: list[str] | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: int | None = None
    selector: dict[str, str] | None = None
    load_balancer_ip: Any = field(default=None, name="loadBalancerIP")
    external_name: str | None = None
    publish_not_ready_addresses: bool | None = None
    ip_families: list[str] | None = None
    ip_family_policy: str | None = None
    ip_family: Any = None
    allocate_load_balancer_node_ports: bool | None = None
    load_balancer_class: str | None = None
    traffic_distribution: str | None = None
    topology_keys: Any = None


class IngressPort(Shape, frozen=True):
    """core/v1 PortStatus."""

    port: int | None = None
    protocol: str | None = None
    error: str | None = None


class LoadBalancerIngress(Shape, frozen=True):
    """core/v1 LoadBalancerIngress."""

    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None
    ports: list[IngressPort] | None = None


class LoadBalancerStatus(Shape, frozen=True):
    """core/v1 LoadBalancerStatus."""

    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(Shape, frozen=True):
    """core/v1 ServiceStatus."""

    load_balancer: LoadBalancerStatus | None = None
    conditions: Any = None


class ServiceManifest(Shape, frozen=True):
    """core/v1 Service."""

    metadata: ObjectMeta | None = None
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None
    api_version: str | None = None
    kind: str | None = None


class EndpointConditions(Shape, frozen=True):
    """discovery/v1 EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ObjectReference(Shape, frozen=True):
    """core/v1 ObjectReference."""

    name: str | None = None
    kind: Any = None
    namespace: Any = None
    uid: Any = None
    api_version: Any = None
    resource_version: Any = None
    field_path: Any = None


class ForZone(Shape, frozen=True):
    """discovery/v1 ForZone and ForNode."""

    name: str | None = None


class EndpointHints(Shape, frozen=True):
    """discovery/v1 EndpointHints."""

    for_zones: list[ForZone] | None = None
    for_nodes: list[ForZone] | None = None


class EndpointOfSlice(Shape, frozen=True):
    """discovery/v1 Endpoint."""

    addresses: list[str] | None = None
    conditions: EndpointConditions | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: ObjectReference | None = None
    hints: EndpointHints | None = None
    hostname: str | None = None
    deprecated_topology: dict[str, str] | None = None


class EndpointPort(Shape, frozen=True):
    """discovery/v1 EndpointPort."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    app_protocol: str | None = None


class EndpointSliceManifest(Shape, frozen=True):
    """discovery/v1 EndpointSlice."""

    metadata: ObjectMeta | None = None
    address_type: str | None = None
    endpoints: list[EndpointOfSlice] | None = None
    ports: list[EndpointPort] | None = None
    api_version: str | None = None
    kind: str | None = None


class Taint(Shape, frozen=True):
    """core/v1 Taint."""

    key: str | None = None
    value: Any = None
    effect: Any = None
    time_added: Any = None


class NodeSpec(Shape, frozen=True):
    """core/v1 NodeSpec."""

    pod_cidr: str | None = None
    pod_cidrs: list[str] | None = None
    taints: list[Taint] | None = None
    provider_id: Any = None
    unschedulable: Any = None
    config_source: Any = None
    external_id: Any = None


class NodeAddress(Shape, frozen=True):
    """core/v1 NodeAddress."""

    type: str | None = None
    address: str | None = None


class NodeStatus(Shape, frozen=True):
    """core/v1 NodeStatus."""

    addresses: list[NodeAddress] | None = None
    capacity: Any = None
    allocatable: Any = None
    phase: Any = None
    conditions: Any = None
    daemon_endpoints: Any = None
    node_info: Any = None
    images: Any = None
    volumes_in_use: Any = None
    volumes_attached: Any = None
    config: Any = None
    runtime_handlers: Any = None
    features: Any = None
    declared_features: Any = None


class NodeManifest(Shape, frozen=True):
    """core/v1 Node."""

    metadata: ObjectMeta | None = None
    spec: NodeSpec | None = None
    status: NodeStatus | None = None
    api_version: str | None = None
    kind: str | None = None


class ServiceCidrSpec(Shape, frozen=True):
    """networking/v1 ServiceCIDRSpec."""

    cidrs: list[str] | None = None


class ServiceCidrManifest(Shape, frozen=True):
    """networking/v1 ServiceCIDR."""

    metadata: ObjectMeta | None = None
    spec: ServiceCidrSpec | None = None
    status: Any = None
    api_version: str | None = None
    kind: str | None = None
