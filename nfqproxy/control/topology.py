"""The two candidate sets of a service port (SEMANTICS 2.3; kube-proxy's CategorizeEndpoints)."""

from msgspec import Struct

from nfqproxy.model import Endpoint, ServicePort


class CandidateEndpoints(Struct, frozen=True, kw_only=True):
    """What the policies choose from."""

    cluster: tuple[Endpoint, ...] = ()
    """C: for policy Cluster."""
    local: tuple[Endpoint, ...] = ()
    """L: for policy Local."""
    has_any: bool = False
    """Whether anything in the cluster could serve at all; without it the answer is a refusal."""


def candidate_sets(
    service_port: ServicePort, node_name: str, zone: str | None
) -> CandidateEndpoints:
    """C, L and has_any for a proxy on this node, whose Node object names this zone (or none)."""
    endpoints = service_port.endpoints
    ready = tuple(endpoint for endpoint in endpoints if endpoint.ready)
    local = tuple(endpoint for endpoint in ready if endpoint.node == node_name)
    # Terminating endpoints are the fallback, for C and L each by itself.
    draining: tuple[Endpoint, ...] = ()
    if not ready or not local:
        draining = tuple(
            endpoint for endpoint in endpoints if endpoint.serving and endpoint.terminating
        )
    if not local and draining:
        local = tuple(endpoint for endpoint in draining if endpoint.node == node_name)
    return CandidateEndpoints(
        cluster=_by_hints(ready, node_name, zone) if ready else draining,
        local=local,
        has_any=bool(ready or draining),
    )


def _by_hints(
    ready: tuple[Endpoint, ...], node_name: str, zone: str | None
) -> tuple[Endpoint, ...]:
    """The ready endpoints hinted to this node, else to this zone, else all.

    One endpoint without hints turns a mode off; a mode that would leave nothing is not used.
    """
    if all(endpoint.node_hints for endpoint in ready):
        matching = tuple(endpoint for endpoint in ready if node_name in endpoint.node_hints)
        if matching:
            return matching
    if zone and all(endpoint.zone_hints for endpoint in ready):
        matching = tuple(endpoint for endpoint in ready if zone in endpoint.zone_hints)
        if matching:
            return matching
    return ready
