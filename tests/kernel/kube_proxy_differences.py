"""Every difference between nfqproxy and kube-proxy's modes that is meant: the one table of them.

``test_kube_proxy.py`` holds it to live connections: a difference that is not listed fails there, and so does a
listed one that no longer occurs. docs/semantics.md shows the table as ``markdown()`` writes it, which
``tests/unit/test_semantics_page.py`` checks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.kernel.twin_cases import Case, Place, Who
from tests.kernel.twins import Kind


class Mode(StrEnum):
    """kube-proxy's modes, of which there are dumps."""

    IPTABLES = "iptables"
    NFTABLES = "nftables"


AS_PRIMARY = "as on the primary address"
"""In all respects: endpoints, the client they see, refusal or silence."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """To this destination kube-proxy and nfqproxy answer differently, whatever the Service."""

    place: Place
    clients: Sequence[Who] = tuple(Who)
    iptables: str
    """Answer of kube-proxy's iptables mode: a Kind, or AS_PRIMARY."""
    nftables: str
    """The same of the nftables mode; nfqproxy's own answer where there is no difference."""
    nfqproxy: Kind
    reason: str
    switch: str = ""
    """What makes nfqproxy do as the iptables mode does; empty: nothing."""

    def answer(self, mode: Mode) -> str:
        """What kube-proxy answers."""
        return self.iptables if mode is Mode.IPTABLES else self.nftables

    def concerns(self, case: Case, mode: Mode) -> bool:
        """Whether this case differs from this mode."""
        differs = self.answer(mode) != self.nfqproxy
        return differs and case.target.place is self.place and case.who in self.clients


DIFFERENCES = (
    Difference(
        place=Place.SECOND,
        iptables=AS_PRIMARY,
        nftables=Kind.CLOSED,
        nfqproxy=Kind.CLOSED,
        reason="node ports stay off networks that nobody meant them for",
        switch='`nodePortAddresses: ["0.0.0.0/0", "::/0"]`',
    ),
    Difference(
        place=Place.ON_VIP,
        iptables=AS_PRIMARY,
        nftables=Kind.CLOSED,
        nfqproxy=Kind.CLOSED,
        reason="the same; such an address is shared by all Services of the load balancer",
        switch="the same",
    ),
    Difference(
        place=Place.LOOPBACK,
        clients=(Who.NODE,),
        iptables=AS_PRIMARY,
        nftables=Kind.CLOSED,
        nfqproxy=Kind.CLOSED,
        reason="it needs `route_localnet`, which opens 127.0.0.0/8 but for a guard",
        switch="`localhostNodePorts: true`",
    ),
    Difference(
        place=Place.NO_PORT,
        iptables=Kind.LEAVES,
        nftables=Kind.REFUSED,
        nfqproxy=Kind.REFUSED,
        reason="a wrong port fails at once, and does not go round in routing loops",
    ),
    Difference(
        place=Place.PING,
        iptables=Kind.LEAVES,
        nftables=Kind.REFUSED,
        nfqproxy=Kind.REFUSED,
        reason="the same",
    ),
    Difference(
        place=Place.NO_OWNER,
        iptables=Kind.LEAVES,
        nftables=Kind.LEAVES,
        nfqproxy=Kind.SILENCE,
        reason="a late packet to a Service that is gone, or not yet here, finds no stranger",
        switch="no `ServiceCIDR` object",
    ),
)


def markdown() -> str:
    """The table as docs/semantics.md shows it."""
    head = (
        "destination",
        "clients",
        "kube-proxy, iptables",
        "kube-proxy, nftables",
        "nfqproxy",
        "why",
        "to do as iptables does",
    )
    rows = [head, ("---",) * len(head)]
    for each in DIFFERENCES:
        clients = "all" if set(each.clients) == set(Who) else ", ".join(each.clients)
        answers = (each.iptables, each.nftables, each.nfqproxy)
        rows.append((each.place, clients, *answers, each.reason, each.switch or "-"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("| --- ", "|---")
