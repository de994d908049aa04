"""What the proxy knows of the node it runs on, from the Node object and the configuration."""

import re
from collections.abc import Iterable
from enum import StrEnum
from ipaddress import ip_address, ip_network

from msgspec import Struct

from nfqproxy.control.address import canonical_ip, family_of
from nfqproxy.control.objects import Objects
from nfqproxy.model import Family, MarkMask, NodeContext

ZONE_LABEL = "topology.kubernetes.io/zone"
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"
"""A node with this taint no longer takes new load-balancer traffic (SEMANTICS 2.17)."""

INTERFACE_NAME = re.compile(r"[\w.:@+=-]{1,15}", re.ASCII)
"""What dev_valid_name() of net/core/dev.c allows, less what an nft string cannot hold as it is."""

_LOOPBACK = ip_address("127.0.0.1")


class Detector(StrEnum):
    """What tells the connections of local pods from others (SEMANTICS 2.4; detectLocalMode)."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class NonPodBackends(StrEnum):
    """When a pod's connection to a backend that is no pod is masqueraded (KERNEL 2.4)."""

    AUTO = "auto"
    """Where clusterCIDR says which addresses are pods."""
    ALWAYS = "always"
    """There too, and without clusterCIDR the pod CIDRs of all Node objects say it."""
    NEVER = "never"


class NodeSettings(Struct, frozen=True, kw_only=True):
    """The part of the configuration that decisions depend on."""

    node_name: str
    addresses: tuple[str, ...] = ()
    """Addresses of the node beside those of its Node object."""
    detector: Detector = Detector.CLUSTER_CIDR
    cluster_cidrs: tuple[str, ...] = ()
    """Networks of all pods; what the detector ClusterCIDR looks at."""
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    node_port_networks: tuple[str, ...] | None = None
    """Node ports are served on the node's addresses inside these networks; None: the primary ones."""
    localhost_node_ports: bool = False
    masquerade_all: bool = False
    non_pod_backends: NonPodBackends = NonPodBackends.AUTO
    is_overlay: bool = False
    """Beside a running kube-proxy, which serves what is not steered."""
    steer_all: bool = False
    """Overlay: every Service is steered, not only the marked ones."""
    marks: MarkMask | None = None
    """Data path ``mark``: our bits of packet marks; None: data path ``ctnetlink``."""


class NodeFacts(Struct, frozen=True, kw_only=True):
    """One node."""

    node_name: str
    exists: bool = False
    """Whether there is a Node object of this name."""
    zone: str | None = None
    primary_addresses: tuple[str, ...] = ()
    """At most one of each family, IPv4 first: where node ports are served unless configured."""
    addresses: tuple[str, ...] = ()
    """All known addresses of the node: those of the Node object, then the extra ones."""
    pod_cidrs: tuple[str, ...] = ()
    eligible: bool = True
    """False: being deleted, or tainted by the cluster autoscaler."""


def node_facts(objects: Objects, node_name: str, extra_addresses: Iterable[str] = ()) -> NodeFacts:
    """The facts of the node of this name; without a Node object only the extra addresses are known.

    The primary address of a family is the first InternalIP, else the first ExternalIP (kube-proxy's
    GetNodeHostIPs), else the first extra address. Extra addresses that are no IP raise ValueError.
    """
    extra = tuple(canonical_ip(address) for address in extra_addresses)
    node = next((node for node in objects.nodes if node.name == node_name), None)
    own = () if node is None else (*node.internal_ips, *node.external_ips)
    addresses = tuple(dict.fromkeys((*own, *extra)))
    primary = tuple(
        first
        for family in Family
        if (first := next((a for a in addresses if family_of(a) is family), None)) is not None
    )
    if node is None:
        return NodeFacts(node_name=node_name, primary_addresses=primary, addresses=addresses)
    return NodeFacts(
        node_name=node_name,
        exists=True,
        zone=node.labels.get(ZONE_LABEL) or None,
        primary_addresses=primary,
        addresses=addresses,
        pod_cidrs=node.pod_cidrs,
        eligible=not node.deleting and AUTOSCALER_TAINT not in node.taints,
    )


def node_context(
    objects: Objects,
    settings: NodeSettings,
    *,
    interface_addresses: Iterable[str] = (),
    outward_addresses: Iterable[str] = (),
) -> NodeContext:
    """The context of decisions on this node, from its objects and its settings.

    ``interface_addresses``: those found on the node's interfaces, beside which node ports may be served
    if the settings' networks hold them. ``outward_addresses``: where neither a Node object nor the settings
    give an address, these are the primary ones.
    """
    facts = node_facts(objects, settings.node_name, settings.addresses)
    if not facts.primary_addresses:
        facts = node_facts(objects, settings.node_name, outward_addresses)
    detected = settings.cluster_cidrs
    if settings.detector is Detector.NODE_CIDR:
        detected = facts.pod_cidrs
    elif settings.detector is not Detector.CLUSTER_CIDR:
        detected = ()
    pod_networks = settings.cluster_cidrs
    if settings.non_pod_backends is NonPodBackends.ALWAYS and not pod_networks:
        pod_networks = tuple(sorted({cidr for node in objects.nodes for cidr in node.pod_cidrs}))
    by_bridge = settings.detector is Detector.BRIDGE_INTERFACE
    by_prefix = settings.detector is Detector.INTERFACE_NAME_PREFIX
    return NodeContext(
        node_name=facts.node_name,
        zone=facts.zone,
        addresses=facts.addresses,
        primary_addresses=facts.primary_addresses,
        node_port_addresses=_node_port_addresses(facts, settings, interface_addresses),
        cluster_cidrs=detected,
        bridge_interface=settings.bridge_interface if by_bridge else "",
        interface_name_prefix=settings.interface_name_prefix if by_prefix else "",
        pod_networks=pod_networks,
        service_cidrs=tuple(
            dict.fromkeys(cidr for item in objects.service_cidrs for cidr in item.cidrs)
        ),
        masquerade_all=settings.masquerade_all,
        # Without knowing which addresses are pods nothing can be said of a backend.
        masquerade_non_pod_backends=bool(pod_networks)
        and settings.non_pod_backends is not NonPodBackends.NEVER,
        localhost_node_ports=settings.localhost_node_ports and _accepts_loopback(settings),
    )


def detector_gap(node: NodeContext, settings: NodeSettings) -> str | None:
    """One sentence when the detector asked for has nothing to go by, else None."""
    if settings.detector is not Detector.NODE_CIDR or node.has_detector:
        return None
    return (
        f"Node {node.node_name} is not there or has no podCIDR, so nothing tells pods from other clients;"
        " give its Node object, or detectLocalMode: ClusterCIDR with clusterCIDR"
    )


def _node_port_addresses(
    facts: NodeFacts, settings: NodeSettings, interface_addresses: Iterable[str]
) -> tuple[str, ...]:
    """The addresses with node ports, never a loopback one (SEMANTICS 2.5.4)."""
    if settings.node_port_networks is None:
        return facts.primary_addresses
    networks = [ip_network(cidr) for cidr in settings.node_port_networks]
    accepted = []
    for text in dict.fromkeys((*facts.addresses, *interface_addresses)):
        address = ip_address(text)
        own = [network for network in networks if network.version == address.version]
        # A family for which no network is given means all its addresses, as for kube-proxy.
        is_inside = not own or any(address in network for network in own)
        if is_inside and not address.is_loopback:
            accepted.append(text)
    return tuple(accepted)


def _accepts_loopback(settings: NodeSettings) -> bool:
    """Whether the settings' IPv4 networks leave room for 127.0.0.1; with none given they do."""
    own = [
        network
        for network in map(ip_network, settings.node_port_networks or ())
        if network.version == 4
    ]
    return not own or any(_LOOPBACK in network for network in own)
