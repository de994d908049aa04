"""Frontend plans: the compiled answer to "what happens to a packet for this frontend".

A plan is pure data. ``core`` computes it, the supervisor sends it to the workers and derives the
kernel's sets and fallback maps from it, ``explain`` prints it.
"""

from enum import StrEnum

from msgspec import Struct

from nfqproxy.model.service import FrontendKey, FrontendKind, TrafficPolicy


class Verdict(StrEnum):
    """What becomes of a new connection."""

    BACKEND = "backend"
    DROP = "drop"
    REJECT = "reject"
    PASS = "pass"


class Backend(Struct, frozen=True, kw_only=True, gc=False):
    """An address that serves a frontend."""

    address: str
    port: int
    weight: int = 1
    """0: never picked (drains)."""
    node: str | None = None
    in_pod_network: bool = True
    """False: outside every pod CIDR, so a pod's connection is masqueraded too (KERNEL 2.4)."""


class CandidateSet(Struct, frozen=True, kw_only=True, gc=False):
    """Backends a pick draws from: the cluster set C or the local set L (SEMANTICS 2.3)."""

    backends: tuple[Backend, ...]


class Action(Struct, frozen=True, kw_only=True, gc=False):
    """What happens to one class of client."""

    verdict: Verdict
    candidates: int = 0
    """Index into FrontendPlan.candidate_sets; meaningful with verdict BACKEND."""
    masquerade: bool = False
    """Masquerade whatever backend is picked (hairpin and non-pod backends come on top)."""


class FrontendPlan(Struct, frozen=True, kw_only=True, gc=False):
    """The decision table of one frontend."""

    key: FrontendKey
    kind: FrontendKind
    namespace: str
    service: str
    port_name: str
    policy: TrafficPolicy
    balancer: str = "weighted-random"
    affinity_timeout_s: int = 0
    """ClientIP affinity: seconds a client stays with its backend after its last new connection, 0: none.
    The state belongs to (namespace, service, port_name, protocol), shared by all its frontends."""
    allowed_sources: tuple[str, ...] | None = None
    """Networks that may connect (loadBalancerSourceRanges); None: everybody."""
    candidate_sets: tuple[CandidateSet, ...]
    actions: tuple[Action, Action, Action]
    """Indexed by ClientClass."""
