"""Keeping the sets and the fallback's maps equal to the plans, by difference.

The first ``sync`` replaces everything, so that nothing a former process left can stay; later ones
send what changed. If a command fails, what the kernel holds is unknown, and the next sync replaces
everything again.

Order within a sync: elements are added and changed in one nft transaction, then the set of
frontends follows, then elements are removed in a second transaction.

- A packet that has just read the old slot count still finds every slot it may draw.
- A frontend that comes alive is in the fallback before its packets are queued; its refusal stays until
  the end, but only untranslated packets meet refusals, and from the first transaction on there are none.
- A frontend that loses its last backend gets its refusal first, then leaves the queue's set, then the
  fallback. So it is never queued while neither serves, and never passes unrefused.
- Source ranges are changed within one transaction, so there is no instant with none or with both.
"""

from collections.abc import Iterable, Mapping

from msgspec import Struct

from nfqproxy.core.fallback import (
    CLASS_MAPS,
    MAX_SLOTS,
    NETWORK_SETS,
    VIEWS,
    FamilyChanges,
    KernelState,
    Place,
)
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel import commands, nft
from nfqproxy.kernel.rule_settings import RuleMode, RuleSettings
from nfqproxy.kernel.rule_text import create_set
from nfqproxy.model import Family, FrontendKey, FrontendPlan, NodeContext, Protocol

__all__ = ["FlowMember", "KernelTable", "SyncResult"]

_MAPS = (
    "slot-count",
    *CLASS_MAPS.values(),
    "sources",
    "refusals",
    *(f"{view}backends-{slot}" for view in VIEWS for slot in range(MAX_SLOTS)),
)
_SETS = (
    "by-class",
    "hairpin",
    "non-pod-backends",
    "guarded",
    "allowed-sources",
    "cluster-ips",
    *NETWORK_SETS,
)
_PER_LINE = 1000
"""Elements per nft statement: keeps the lines of an error message readable."""


class SyncResult(Struct, frozen=True, kw_only=True):
    """What one sync did."""

    members_added: int = 0
    """Entries added to the sets of frontends."""
    members_removed: int = 0
    elements_added: int = 0
    """Elements of the fallback's maps and sets."""
    elements_changed: int = 0
    elements_removed: int = 0
    full: bool = False
    """Everything was replaced."""

    @property
    def count(self) -> int:
        """Entries and elements touched."""
        return (
            self.members_added
            + self.members_removed
            + self.elements_added
            + self.elements_changed
            + self.elements_removed
        )


class FlowMember(Struct, frozen=True):
    """A known UDP flow, as the set of flows holds it: no destination port."""

    source: str
    source_port: int
    destination: str
    """The frontend address."""
    protocol: Protocol = Protocol.UDP


class KernelTable:
    """Sets and maps of one node. Calls block; make them from one thread at a time."""

    def __init__(self, settings: RuleSettings) -> None:
        self._settings = settings
        self._state: dict[Family, KernelState] | None = None

    def sync(
        self,
        plans: Mapping[FrontendKey, FrontendPlan],
        node: NodeContext,
        among: Iterable[FrontendKey] | None = None,
    ) -> SyncResult:
        """Make the kernel's sets and maps follow ``plans``; return what changed.

        ``among``: the only keys whose plans can have altered since the last call that succeeded.
        Raises KernelError or HostError with what the tool said; the next call then starts over.
        """
        full = self._state is None
        among = None if full else among
        state = self._state or {family: KernelState(family) for family in self._settings.families}
        self._state = None
        changes = {family: known.advance(plans, node, among) for family, known in state.items()}
        self._send(changes, full=full)
        self._state = state
        every = changes.values()
        return SyncResult(
            members_added=sum(len(change.members_added) for change in every),
            members_removed=sum(len(change.members_removed) for change in every),
            elements_added=sum(len(change.added) for change in every),
            elements_changed=sum(len(change.changed) for change in every),
            elements_removed=sum(
                len(change.removed_first) + len(change.removed) for change in every
            ),
            full=full,
        )

    def forget(self) -> None:
        """Make the next sync replace everything, e.g. after somebody else flushed our objects."""
        self._state = None

    def forget_flows(self, flows: Iterable[FlowMember]) -> None:
        """Take flows out of the set of known ones, so that their next datagram is decided anew.

        To be called for every UDP entry of connection tracking that is deleted.
        """
        if self._settings.marks:
            return  # conntrack itself says what is known
        lines = [
            f"del nfqproxy-flows-{6 if ':' in flow.destination else 4} "
            f"{flow.source},{flow.protocol.name.lower()}:{flow.source_port},{flow.destination}"
            for flow in flows
        ]
        if lines:
            commands.run(["ipset", "-exist", "restore"], "\n".join(lines) + "\n")

    def _send(self, changes: Mapping[Family, FamilyChanges], *, full: bool) -> None:
        with_maps = self._settings.mode is RuleMode.REPLACE
        if with_maps:
            _transact(
                line
                for family, change in changes.items()
                for line in _additions(family, change, full=full)
            )
        members = [
            line
            for family, change in changes.items()
            for line in (
                self._replacement(family, change) if full else _member_lines(family, change)
            )
        ]
        if members:
            try:
                commands.run(["ipset", "-exist", "restore"], "\n".join(members) + "\n")
            except NfqproxyError:
                self._drop_spares(changes)
                raise
        if with_maps and not full:
            _transact(
                line for family, change in changes.items() for line in _removals(family, change)
            )

    def _replacement(self, family: Family, change: FamilyChanges) -> Iterable[str]:
        """Fill a new set beside the old one and exchange them: the swap is atomic."""
        spare, own = f"nfqproxy-next-{int(family)}", f"nfqproxy-frontends-{int(family)}"
        yield create_set("frontends", family, self._settings, name=spare)
        yield f"flush {spare}"
        for member in change.members_added:
            yield f"add {spare} {member}"
        yield f"swap {spare} {own}"
        yield f"destroy {spare}"

    @staticmethod
    def _drop_spares(families: Iterable[Family]) -> None:
        for family in families:
            try:
                commands.run(["ipset", "destroy", f"nfqproxy-next-{int(family)}"])
            except NfqproxyError:
                pass  # it was not made, or the swap was already through


def _member_lines(family: Family, change: FamilyChanges) -> Iterable[str]:
    own = f"nfqproxy-frontends-{int(family)}"
    for member in change.members_added:
        yield f"add {own} {member}"
    for member in change.members_removed:
        yield f"del {own} {member}"


def _transact(lines: Iterable[str]) -> None:
    nft.run_transaction("".join(line + "\n" for line in lines))


def _ip(family: Family) -> str:
    return "ip" if family is Family.IPV4 else "ip6"


def _statements(verb: str, family: Family, places: Iterable[tuple[Place, str]]) -> Iterable[str]:
    """Group elements by map into ``add element`` or ``delete element`` statements."""
    by_map: dict[str, list[str]] = {}
    for (name, key), value in places:
        by_map.setdefault(name, []).append(f"{key} : {value}" if value else key)
    for name, texts in by_map.items():
        for start in range(0, len(texts), _PER_LINE):
            part = ", ".join(texts[start : start + _PER_LINE])
            yield f"{verb} element {_ip(family)} nfqproxy {name} {{ {part} }}"


def _deletions(family: Family, places: Iterable[Place]) -> Iterable[str]:
    return _statements("delete", family, ((place, "") for place in places))


def _additions(family: Family, change: FamilyChanges, *, full: bool) -> Iterable[str]:
    ip = _ip(family)
    if full:
        yield from (f"flush map {ip} nfqproxy {name}" for name in _MAPS)
        yield from (f"flush set {ip} nfqproxy {name}" for name in _SETS)
    for name, networks in change.networks.items():
        if not full:
            yield f"flush set {ip} nfqproxy {name}"
        if networks:
            yield f"add element {ip} nfqproxy {name} {{ {', '.join(networks)} }}"
    # An element's value cannot be changed: out and in again, atomic within the transaction.
    yield from _deletions(family, (*change.removed_first, *change.changed))
    yield from _statements("add", family, (change.changed | change.added).items())


def _removals(family: Family, change: FamilyChanges) -> Iterable[str]:
    return _deletions(family, change.removed)
