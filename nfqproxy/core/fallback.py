"""The kernel's own state as a function of the plans: set members, fallback maps, refusals.

The kernel fallback serves when no worker answers. It knows no weights, only *slots*: a frontend
with K slots is found in a map whose verdict leads to the chain that draws one of the K slots, evenly
or, with ClientIP affinity, by a hash of the source; the map of that slot holds the backend. A
frontend is therefore elements of maps, never a rule (``rules/README.md`` draws it).

Where all classes of client draw from the same backends, one entry in ``slot-count`` says it for all.
Else the frontend is a member of ``by-class``, and each class has its own map; a class that is refused is
in none. A packet that no map translates meets ``refusals`` behind the NAT hook, so what is refused is
refused by the kernel, whether a worker lives or not.

Everything here is pure: plans in, elements out, and the difference between two states. ``kernel``
carries differences out.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from msgspec import Struct, field

from nfqproxy.core.slots import MAX_SLOTS, slots
from nfqproxy.model import (
    Backend,
    ClientClass,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Verdict,
)

__all__ = [
    "CLASS_MAPS",
    "MASQUERADE_CHAINS",
    "MAX_SLOTS",
    "NETWORK_SETS",
    "VIEWS",
    "FamilyChanges",
    "FamilyElements",
    "FrontendElements",
    "KernelState",
    "Place",
    "family_elements",
    "frontend_elements",
    "slots",
]

Place = tuple[str, str]
"""(nft map or set, key of an element)."""

VIEWS = ("", "local-")
"""Prefixes of the two slot tables: a frontend draws from at most two sets of candidates, usually C for
clients of the cluster and L for those from outside (SEMANTICS 2.7)."""

CLASS_MAPS: dict[ClientClass, str] = {
    ClientClass.POD: "slot-count-pod",
    ClientClass.NODE: "slot-count-node",
    ClientClass.EXTERNAL: "slot-count-external",
}
"""Map that holds the slot count of a frontend in ``by-class``."""

NETWORK_SETS = ("pod-cidrs", "service-cidrs")
"""Sets of networks that come from the node's context, not from a plan."""

MASQUERADE_CHAINS: dict[tuple[bool, bool, bool], str] = {
    (pod, node, external): "masquerade-"
    + ("".join(c for c, on in zip("pnx", (pod, node, external), strict=True) if on) or "none")
    for pod in (False, True)
    for node in (False, True)
    for external in (False, True)
}
"""Chain that answers "masquerade?" for a frontend, by what it does to (POD, NODE, EXTERNAL)."""

_GUARDED = "guarded"
_ALLOWED = "allowed-sources"


class FrontendElements(Struct, frozen=True, kw_only=True):
    """What one frontend puts into the kernel."""

    member: str | None
    """Entry of the ipset of frontends, e.g. ``10.96.0.10,tcp:80``; None: packets are never queued."""
    elements: dict[Place, str]
    """Place -> value; the value of a set's element is empty."""
    shared: tuple[Place, ...]
    """Elements of sets that other frontends may ask for as well."""
    is_guarded: bool = False
    """Only some sources may connect."""


_NOTHING = FrontendElements(member=None, elements={}, shared=())


def frontend_elements(plan: FrontendPlan) -> FrontendElements:
    """Return what ``plan`` puts into the kernel's sets and maps.

    A class of client whose backends all have weight 0 is refused like one without backends. A plan
    that draws from more than two different sets raises ValueError; none is made.
    """
    if all(action.verdict is Verdict.PASS for action in plan.actions):
        return _NOTHING
    key = plan.key
    protocol = key.protocol.name.lower()
    match = f"{protocol} . {key.address} . {key.port}"
    elements: dict[Place, str] = {}
    shared: set[Place] = set()
    rows: list[tuple[Backend, ...]] = []
    dealt: list[tuple[int, ...]] = []
    view_of: dict[ClientClass, int] = {}
    for candidates in sorted({a.candidates for a in plan.actions if a.verdict is Verdict.BACKEND}):
        backends = plan.candidate_sets[candidates].backends
        classes = [
            each
            for each in ClientClass
            if plan.actions[each].verdict is Verdict.BACKEND
            and plan.actions[each].candidates == candidates
        ]
        if backends in rows:
            view = rows.index(backends)
        else:
            own_slots = slots(backends)
            if not own_slots:
                continue
            view = len(rows)
            rows.append(backends)
            dealt.append(own_slots)
        view_of.update(dict.fromkeys(classes, view))
    if len(rows) > len(VIEWS):
        raise ValueError(f"{key}: more than {len(VIEWS)} different sets of candidates")

    for prefix, backends, own_slots in zip(VIEWS, rows, dealt, strict=False):
        for slot, index in enumerate(own_slots):
            backend = backends[index]
            elements[f"{prefix}backends-{slot}", match] = f"{backend.address} . {backend.port}"
        for index in set(own_slots):
            address = backends[index].address
            shared.add(("hairpin", f"{address} . {address}"))
            if not backends[index].in_pod_network:
                shared.add(("non-pod-backends", address))
    if rows:
        by = "by-source-" if plan.affinity_timeout_s else ""
        goto = [
            f"goto {prefix}pick-{by}{len(own_slots)}"
            for prefix, own_slots in zip(VIEWS, dealt, strict=False)
        ]
        if len(rows) == 1 and len(view_of) == len(ClientClass):
            elements["slot-count", match] = goto[0]
        else:
            elements["by-class", match] = ""
            for each, view in view_of.items():
                elements[CLASS_MAPS[each], match] = goto[view]
        pod, node, external = (action.masquerade for action in plan.actions)
        elements["sources", match] = f"goto {MASQUERADE_CHAINS[pod, node, external]}"

    refused = {
        each: plan.actions[each].verdict
        for each in ClientClass
        if each not in view_of and plan.actions[each].verdict is not Verdict.PASS
    }
    if refused:
        if refused == {ClientClass.EXTERNAL: Verdict.DROP}:
            # The others may have a backend that is the frontend itself: untranslated, and theirs.
            goto_chain = "drop-outsiders"
        else:
            goto_chain = "drop-frontend" if Verdict.DROP in refused.values() else "reject-frontend"
        elements["refusals", match] = f"goto {goto_chain}"
    if plan.allowed_sources is not None:
        elements[_GUARDED, match] = ""
        for network in _collapsed(key.family, plan.allowed_sources):
            elements[_ALLOWED, f"{match} . {network}"] = ""
    if plan.kind is FrontendKind.CLUSTER_IP:
        shared.add(("cluster-ips", key.address))
    return FrontendElements(
        member=f"{key.address},{protocol}:{key.port}" if rows else None,
        elements=elements,
        shared=tuple(sorted(shared)),
        is_guarded=plan.allowed_sources is not None,
    )


def _collapsed(family: Family, networks: Iterable[str]) -> tuple[str, ...]:
    """The same addresses in networks that do not overlap: the kernel refuses overlapping elements."""
    if family is Family.IPV6:
        return tuple(map(str, collapse_addresses([IPv6Network(text) for text in networks])))
    return tuple(map(str, collapse_addresses([IPv4Network(text) for text in networks])))


class FamilyElements(Struct, frozen=True, kw_only=True):
    """Everything the kernel must hold for one address family."""

    members: frozenset[str]
    """Entries of the ipset of frontends."""
    elements: Mapping[Place, str]
    """Place -> value; the value of a set's element is empty."""
    networks: Mapping[str, tuple[str, ...]]
    """Content of each of NETWORK_SETS."""


class FamilyChanges(Struct, frozen=True, kw_only=True):
    """The way from one state of a family to the next, in two transactions.

    First ``removed_first``, ``added`` and ``changed`` and the networks, then (when the queue's set has
    followed) ``removed``.
    """

    members_added: tuple[str, ...] = ()
    members_removed: tuple[str, ...] = ()
    removed_first: tuple[Place, ...] = ()
    """Elements that must go before others come, or before what is read behind them goes."""
    added: dict[Place, str] = field(default_factory=dict)
    changed: dict[Place, str] = field(default_factory=dict)
    """Elements that exist with another value."""
    removed: tuple[Place, ...] = ()
    networks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Sets of NETWORK_SETS that get another content."""

    @property
    def count(self) -> int:
        """Number of entries and elements touched."""
        return (
            len(self.members_added)
            + len(self.members_removed)
            + len(self.removed_first)
            + len(self.added)
            + len(self.changed)
            + len(self.removed)
            + sum(max(1, len(content)) for content in self.networks.values())
        )


def _networks(family: Family, node: NodeContext) -> dict[str, tuple[str, ...]]:
    cidrs = {"pod-cidrs": node.cluster_cidrs, "service-cidrs": node.service_cidrs}
    return {
        name: tuple(sorted(c for c in cidrs[name] if (":" in c) == (family is Family.IPV6)))
        for name in NETWORK_SETS
    }


def family_elements(
    family: Family, plans: Mapping[FrontendKey, FrontendPlan], node: NodeContext
) -> FamilyElements:
    """Return the complete desired state of ``family``: the reference KernelState is held to."""
    members: set[str] = set()
    elements: dict[Place, str] = {}
    for key, plan in plans.items():
        if key.family is not family:
            continue
        own = frontend_elements(plan)
        if own.member is not None:
            members.add(own.member)
        elements.update(own.elements)
        elements.update(dict.fromkeys(own.shared, ""))
    return FamilyElements(
        members=frozenset(members), elements=elements, networks=_networks(family, node)
    )


class KernelState:
    """What the kernel holds of one family, and the difference to what it should hold.

    ``advance`` returns the changes and takes them as done. Work is proportional to what changed: a
    plan equal to the one seen before is not looked into.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._plans: dict[FrontendKey, FrontendPlan] = {}
        self._own: dict[FrontendKey, FrontendElements] = {}
        self._shared: Counter[Place] = Counter()
        self._networks: dict[str, tuple[str, ...]] = dict.fromkeys(NETWORK_SETS, ())

    def advance(
        self,
        plans: Mapping[FrontendKey, FrontendPlan],
        node: NodeContext,
        among: Iterable[FrontendKey] | None = None,
    ) -> FamilyChanges:
        """Return how the kernel gets from the last state to that of ``plans``.

        Plans of the other family are ignored. ``among``: the only keys whose plans can have altered
        since the last call; the others are not even looked at.
        """
        members_added: list[str] = []
        members_removed: list[str] = []
        removed_first: list[Place] = []
        added: dict[Place, str] = {}
        changed: dict[Place, str] = {}
        removed: list[Place] = []
        touched: Counter[Place] = Counter()

        if among is None:
            among = {**self._plans, **plans}
        own = [key for key in among if key.family is self.family]
        gone = [key for key in own if key in self._plans and key not in plans]
        fresh = [
            (key, plan)
            for key in own
            if (plan := plans.get(key)) is not None and self._plans.get(key) != plan
        ]
        for key in gone:
            del self._plans[key]
            before = self._own.pop(key)
            if before.member is not None:
                members_removed.append(before.member)
            removed.extend(before.elements)
            touched.subtract(before.shared)
        for key, plan in fresh:
            before = self._own.get(key, _NOTHING)
            after = frontend_elements(plan)
            self._plans[key] = plan
            self._own[key] = after
            if before.member != after.member:
                if before.member is not None:
                    members_removed.append(before.member)
                if after.member is not None:
                    members_added.append(after.member)
            for place, value in after.elements.items():
                old = before.elements.get(place)
                if old is None:
                    added[place] = value
                elif old != value:
                    changed[place] = value
            early = _early_set(before, after)
            for place in before.elements:
                if place not in after.elements:
                    (removed_first if place[0] == early else removed).append(place)
            touched.subtract(before.shared)
            touched.update(after.shared)

        for place, change in touched.items():
            count = self._shared[place]
            if count == 0 and change > 0:
                added[place] = ""
            elif count > 0 and count + change == 0:
                removed.append(place)
            self._shared[place] = count + change
            if not self._shared[place]:
                del self._shared[place]

        wanted = _networks(self.family, node)
        networks = {
            name: content for name, content in wanted.items() if content != self._networks[name]
        }
        self._networks = wanted
        return FamilyChanges(
            members_added=tuple(members_added),
            members_removed=tuple(members_removed),
            removed_first=tuple(removed_first),
            added=added,
            changed=changed,
            removed=tuple(removed),
            networks=networks,
        )


def _early_set(before: FrontendElements, after: FrontendElements) -> str:
    """Name of the set whose elements of a frontend must be removed in the first transaction.

    While the frontend stays guarded, old ranges may overlap new ones, which the kernel refuses. When
    its guard falls, the guard goes before the ranges, or all would be turned away in between.
    """
    if not before.is_guarded:
        return ""
    return _ALLOWED if after.is_guarded else _GUARDED
