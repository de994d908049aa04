"""Which health-check node ports to serve, and what each of them knows (SEMANTICS 2.17).

A Service of type LoadBalancer with externalTrafficPolicy Local has a healthCheckNodePort, on which its
load balancer asks every node whether it has local endpoints. Counted are the distinct addresses of
*ready* endpoints on this node, over all ports of the Service in one family. Terminating endpoints do not
count though they still receive traffic: so the load balancer drains the node while they last. Endpoints of
weight 0 do not count either: nobody is sent to them, and a node with no others drops what comes.
"""

from collections.abc import Iterable

from msgspec import Struct

from nfqproxy.model import Family, NodeContext, ServicePort

__all__ = ["ANY_ADDRESS", "HealthPort", "health_ports"]

ANY_ADDRESS = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}
"""Where to listen in a family for which the node has no node-port address."""


class HealthPort(Struct, frozen=True, kw_only=True):
    """One health-check node port in one family."""

    namespace: str
    service: str
    family: Family
    port: int
    addresses: tuple[str, ...]
    """Where to listen."""
    local_endpoints: int
    """Addresses of ready local endpoints that may be picked."""


def health_ports(ports: Iterable[ServicePort], node: NodeContext) -> tuple[HealthPort, ...]:
    """The health-check node ports of these service ports, sorted by Service and family."""
    found: dict[tuple[str, str, Family], tuple[int, set[str]]] = {}
    for port in ports:
        if not port.health_check_node_port:
            continue
        key = (port.name.namespace, port.name.service, port.name.family)
        _, ready = found.setdefault(key, (port.health_check_node_port, set()))
        ready.update(
            endpoint.address
            for endpoint in port.endpoints
            if endpoint.ready and endpoint.weight > 0 and endpoint.node == node.node_name
        )
    return tuple(
        HealthPort(
            namespace=namespace,
            service=service,
            family=family,
            port=number,
            addresses=_addresses(node, family),
            local_endpoints=len(ready),
        )
        for (namespace, service, family), (number, ready) in sorted(found.items())
    )


def _addresses(node: NodeContext, family: Family) -> tuple[str, ...]:
    own = tuple(
        dict.fromkeys(
            address
            for address in node.node_port_addresses
            if (":" in address) == (family is Family.IPV6)
        )
    )
    return own or (ANY_ADDRESS[family],)
