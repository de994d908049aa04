"""What ``explain`` answers: the verdict on one packet, its reason, and the way there."""

from msgspec import Struct

from nfqproxy.model import FrontendKind, TrafficPolicy, Verdict


class MatchedFrontend(Struct, frozen=True, kw_only=True):
    """The frontend the destination belongs to."""

    kind: FrontendKind
    namespace: str
    service: str
    port_name: str

    def __str__(self) -> str:
        port = f":{self.port_name}" if self.port_name else ""
        return f"{self.namespace}/{self.service}{port}"


class Candidate(Struct, frozen=True, kw_only=True):
    """A backend that the connection may come to."""

    address: str
    port: int
    weight: int
    probability: float
    """Chance at the next pick; the balancer's own word."""
    masquerade: bool
    """Whether this backend sees an address of the node instead of the client's."""
    node: str | None

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


class Explanation(Struct, frozen=True, kw_only=True):
    """The answer; its fields are the JSON document that the command line prints."""

    verdict: Verdict
    frontend: MatchedFrontend | None
    """None: no frontend matches."""
    client: str
    """pod, node or external."""
    policy: TrafficPolicy | None
    """The traffic policy that binds the frontend."""
    backends: tuple[Candidate, ...]
    reason: str
    """One sentence naming the rule that decided."""
    steps: tuple[str, ...]
    """The packet's way, ``HOOK: what happens there``."""
