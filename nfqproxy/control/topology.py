"""The two candidate sets of a service port (SEMANTICS 2.3; kube-proxy's CategorizeEndpoints)."""

from collections.abc import Iterable

from msgspec import Struct

from nfqproxy.model import Endpoint, ServicePort


class CandidateEndpoints(Struct, frozen=True, kw_only=True):
    """What the policies choose from."""

    cluster: tuple[Endpoint, ...] = ()
    """C: for policy Cluster."""
    local: tuple[Endpoint, ...] = ()
    """L: for policy Local."""
    has_any: bool = False
    """Whether anything in the cluster can be picked at all; without it the answer is a refusal."""


def candidate_sets(
    service_port: ServicePort, node_name: str, zone: str | None
) -> CandidateEndpoints:
    """C, L and has_any for a proxy on this node, whose Node object names this zone (or none)."""
    endpoints = service_port.endpoints
    ready = tuple(endpoint for endpoint in endpoints if endpoint.ready)
    local = tuple(endpoint for endpoint in ready if endpoint.node == node_name)
    # Terminating endpoints are the fallback, for C and L each by itself.
    draining: tuple[Endpoint, ...] = ()
    if not is_pickable(ready) or not is_pickable(local):
        draining = tuple(
            endpoint for endpoint in endpoints if endpoint.serving and endpoint.terminating
        )
    cluster = _by_hints(ready, node_name, zone)
    cluster = _first_pickable(cluster, draining)
    local_draining = tuple(endpoint for endpoint in draining if endpoint.node == node_name)
    return CandidateEndpoints(
        cluster=cluster,
        local=_first_pickable(local, local_draining),
        has_any=is_pickable(cluster),
    )


def is_pickable(endpoints: Iterable[Endpoint]) -> bool:
    """Whether a connection can be given any of these: a set of weight 0 alone is as good as empty."""
    return any(endpoint.weight > 0 for endpoint in endpoints)


def _first_pickable(
    first: tuple[Endpoint, ...], second: tuple[Endpoint, ...]
) -> tuple[Endpoint, ...]:
    return second if is_pickable(second) and not is_pickable(first) else first or second


def _by_hints(
    ready: tuple[Endpoint, ...], node_name: str, zone: str | None
) -> tuple[Endpoint, ...]:
    """The ready endpoints hinted to this node, else to this zone, else all.

    One endpoint without hints turns a mode off; a mode that would leave nothing to pick is not used.
    """
    if all(endpoint.node_hints for endpoint in ready):
        matching = tuple(endpoint for endpoint in ready if node_name in endpoint.node_hints)
        if is_pickable(matching):
            return matching
    if zone and all(endpoint.zone_hints for endpoint in ready):
        matching = tuple(endpoint for endpoint in ready if zone in endpoint.zone_hints)
        if is_pickable(matching):
            return matching
    return ready
