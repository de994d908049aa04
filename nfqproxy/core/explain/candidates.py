"""Why the candidates of a frontend are those and no others, in words (SEMANTICS 2.3)."""

from collections.abc import Iterable

from nfqproxy.control.topology import candidate_sets, is_pickable
from nfqproxy.model import Endpoint, NodeContext, ServicePort

SHOWN = 6
"""Backends that a sentence names before it says how many more there are."""


def listed(items: Iterable[str]) -> str:
    """The first few, comma separated, and the number of the others."""
    texts = list(items)
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def host_port(address: str, port: int) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def endpoints(count: int, adjective: str = "") -> str:
    """``1 ready endpoint``, ``2 endpoints``."""
    word = f"{adjective} endpoint" if adjective else "endpoint"
    return f"{count} {word}" + ("" if count == 1 else "s")


def cluster_set(port: ServicePort, node: NodeContext) -> str:
    """What the cluster set is made of."""
    found = candidate_sets(port, node.node_name, node.zone).cluster
    ready = [endpoint for endpoint in port.endpoints if endpoint.ready]
    if not any(endpoint.ready for endpoint in found):
        return (
            f"{_nobody_ready(ready, 'no endpoint')}, so {endpoints(len(found), 'terminating')} that still"
            f" {'serves' if len(found) == 1 else 'serve'}"
        )
    if len(found) == len(ready):
        return endpoints(len(found), "ready")
    by_node = all(endpoint.node_hints for endpoint in ready) and all(
        node.node_name in endpoint.node_hints for endpoint in found
    )
    where = f"node {node.node_name}" if by_node else f"zone {node.zone}"
    return f"{endpoints(len(found), 'ready')} with a topology hint for {where}, of {len(ready)}"


def _nobody_ready(ready: list[Endpoint], nobody: str) -> str:
    return f"{nobody} is ready" + (", but for drained ones (weight 0)" if ready else "")


def local_set(port: ServicePort, node: NodeContext) -> str:
    """What the local set is made of."""
    found = candidate_sets(port, node.node_name, node.zone).local
    if not found:
        return f"no endpoint on this node {node.node_name}"
    here = f"this node {node.node_name}"
    if not is_pickable(found):
        return f"no endpoint on {here} but drained ones (weight 0)"
    if any(endpoint.ready for endpoint in found):
        return f"{endpoints(len(found), 'ready')} on {here}"
    ready = [e for e in port.endpoints if e.ready and e.node == node.node_name]
    return (
        f"{_nobody_ready(ready, f'no endpoint of {here}')}, so"
        f" {endpoints(len(found), 'terminating')} of it that still"
        f" {'serves' if len(found) == 1 else 'serve'}"
    )


def left_out(port: ServicePort, chosen: frozenset[tuple[str, int]]) -> str:
    """The endpoints that are no candidates, each with its reason; empty when there are none."""
    others = [e for e in port.endpoints if (e.address, e.port) not in chosen]
    return listed(f"{host_port(e.address, e.port)} ({_why_not(e)})" for e in others)


def _why_not(endpoint: Endpoint) -> str:
    if endpoint.ready and endpoint.weight == 0:
        return "ready, drained (weight 0)"
    if endpoint.ready:
        where = f"on {endpoint.node}" if endpoint.node else "on no known node"
        hints = (*endpoint.zone_hints, *endpoint.node_hints)
        return f"ready, {where}" + (f", hinted to {', '.join(hints)}" if hints else "")
    if endpoint.serving and endpoint.terminating:
        return "terminating, and others are ready"
    if endpoint.terminating:
        return "terminating, no longer serving"
    return "not ready"
