"""What the proxy knows of the node it runs on, from the Node object and the command line."""

from collections.abc import Iterable

from msgspec import Struct

from nfqproxy.control.address import canonical_ip, family_of
from nfqproxy.control.objects import Objects
from nfqproxy.model import Family, NodeContext

ZONE_LABEL = "topology.kubernetes.io/zone"
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"
"""A node with this taint no longer takes new load-balancer traffic (SEMANTICS 2.17)."""


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
    facts: NodeFacts, *, cluster_cidrs: Iterable[str] = (), masquerade_all: bool = False
) -> NodeContext:
    """The context of decisions on this node, with node ports on its primary addresses."""
    return NodeContext(
        node_name=facts.node_name,
        zone=facts.zone,
        addresses=facts.addresses,
        primary_addresses=facts.primary_addresses,
        node_port_addresses=facts.primary_addresses,
        cluster_cidrs=tuple(cluster_cidrs),
        masquerade_all=masquerade_all,
    )
