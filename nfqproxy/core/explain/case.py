"""One question with all that is found out about it, before it is told as a story."""

from collections.abc import Callable

from msgspec import Struct

from nfqproxy.core.explain.explanation import Candidate
from nfqproxy.core.explain.packet import Packet
from nfqproxy.model import ClientClass, FrontendPlan, MarkMask, NodeContext

CLIENT_WORDS = {
    ClientClass.POD: "pod",
    ClientClass.NODE: "node",
    ClientClass.EXTERNAL: "external",
}
"""How the answer calls a class of client."""

MasqueradeSource = Callable[[str], str | None]
"""From a backend's address to the node's address that it sees of masqueraded clients, None: no route."""


class Origin(Struct, frozen=True, kw_only=True):
    """Where the packet comes from."""

    client: ClientClass
    why: str
    """What made it that class."""
    is_sent_here: bool
    """By a process of this node: it passes OUTPUT. Else it arrives: PREROUTING."""
    marks: MarkMask | None = None
    """Data path ``mark``: our bits; None: data path ``ctnetlink``."""

    @property
    def hook(self) -> str:
        """The first hook it meets."""
        return "OUTPUT" if self.is_sent_here else "PREROUTING"


class Case(Struct, frozen=True, kw_only=True):
    """The packet has a frontend whose plan gives it backends."""

    packet: Packet
    origin: Origin
    plan: FrontendPlan
    backends: tuple[Candidate, ...]
    policy: str
    """The traffic policy and how it binds this client, in words."""
    candidates_are: str
    """What the set of candidates is made of."""
    left_out: str
    """The endpoints that are none, with reasons; empty: all are."""
    fallback: str
    """How the kernel's fallback picks, in words."""
    node: NodeContext
    is_overlay: bool
    is_local: Callable[[str], bool]
    """Whether an address is the node's own."""
    masquerade_source: MasqueradeSource | None
    """None: routes are not known here."""
