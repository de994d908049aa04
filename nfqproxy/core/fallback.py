"""The kernel's own state as a function of the plans: set members and fallback map elements.

The kernel fallback serves when no worker answers. It knows no weights, only *slots*: a frontend
with K slots is found in the map ``slot-count``, whose verdict leads to the chain that draws one of
the K slots uniformly; the map of that slot holds the backend. A backend with weight 5 of 10 owns 5
of 10 slots. A frontend is therefore elements of maps, never a rule (``rules/README.md`` draws it).

Everything here is pure: plans in, elements out, and the difference between two states. ``kernel``
carries differences out.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct, field

from nfqproxy.model import (
    Action,
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
    "MASQUERADE_CHAINS",
    "MAX_SLOTS",
    "FamilyChanges",
    "FamilyElements",
    "FrontendElements",
    "KernelState",
    "family_elements",
    "frontend_elements",
    "slots",
]

MAX_SLOTS = 64
"""Slots a frontend can have at most; the fallback's table holds one chain per count up to it."""

SHARE_TOLERANCE = 0.05
"""A slot count is good enough when no backend's share is off by more than this part of itself."""

MASQUERADE_CHAINS: dict[tuple[bool, bool, bool], str] = {
    (pod, node, external): "masquerade-"
    + ("".join(c for c, on in zip("pnx", (pod, node, external), strict=True) if on) or "none")
    for pod in (False, True)
    for node in (False, True)
    for external in (False, True)
}
"""Chain that answers "masquerade?" for a frontend, by what it does to (POD, NODE, EXTERNAL)."""


def slots(backends: Sequence[Backend]) -> tuple[int, ...]:
    """Return the backend index of every slot, grouped by backend; empty without a positive weight.

    The count is the smallest that gives each backend its share to within ``SHARE_TOLERANCE`` of
    that share, else the best there is. Slots are dealt by largest remainder; every backend of
    positive weight gets at least one as long as there are no more than ``MAX_SLOTS`` of them.
    Beyond that the heaviest (of equal ones, the first) are served.
    """
    positive = [index for index, backend in enumerate(backends) if backend.weight > 0]
    if not positive:
        return ()
    if len(positive) > MAX_SLOTS:
        positive = sorted(positive, key=lambda index: (-backends[index].weight, index))[:MAX_SLOTS]
        positive.sort()
    weights = [backends[index].weight for index in positive]
    if min(weights) == max(weights):
        return tuple(positive)
    total = sum(weights)
    best: list[int] = []
    best_error = float("inf")
    for count in range(len(weights), MAX_SLOTS + 1):
        dealt = _deal(weights, total, count)
        error = max(
            abs(share * total - weight * count) / (weight * count)
            for share, weight in zip(dealt, weights, strict=True)
        )
        if error < best_error:
            best, best_error = dealt, error
            if error <= SHARE_TOLERANCE:
                break
    return tuple(index for index, share in zip(positive, best, strict=True) for _ in range(share))


def _deal(weights: Sequence[int], total: int, count: int) -> list[int]:
    """Deal ``count`` slots in proportion to ``weights``, at least one each, by largest remainder.

    Those that would get none are given one first; the rest share what is left in proportion.
    """
    dealt = [0] * len(weights)
    rest = list(range(len(weights)))
    while True:
        small = [index for index in rest if weights[index] * count < total]
        if not small:
            break
        for index in small:
            dealt[index] = 1
            total -= weights[index]
        count -= len(small)
        rest = [index for index in rest if dealt[index] == 0]
    for index in rest:
        dealt[index] = weights[index] * count // total
    left = count - sum(dealt[index] for index in rest)
    by_remainder = sorted(rest, key=lambda index: (-(weights[index] * count % total), index))
    for index in by_remainder[:left]:
        dealt[index] += 1
    return dealt


class FrontendElements(Struct, frozen=True, kw_only=True):
    """What one frontend puts into the kernel."""

    member: str | None
    """Entry of the ipset of frontends, e.g. ``10.96.0.10,tcp:80``; None: packets are left alone."""
    elements: dict[tuple[str, str], str]
    """(nft map, key) -> value; empty when the fallback does not serve the frontend."""
    hairpins: tuple[str, ...]
    """Backend addresses, each an element of the hairpin set."""


def frontend_elements(plan: FrontendPlan) -> FrontendElements:
    """Return what ``plan`` puts into the kernel's sets and maps.

    The fallback does not yet tell client classes apart when it picks: it draws from the candidates
    of the class its kind of frontend exists for (pods for a ClusterIP, outsiders for all else). A
    frontend that refuses that class has no elements. Refusals and per-class candidates will be
    further maps beside these.
    """
    key = plan.key
    protocol = key.protocol.name.lower()
    member = f"{key.address},{protocol}:{key.port}"
    if all(action.verdict is Verdict.PASS for action in plan.actions):
        return FrontendElements(member=None, elements={}, hairpins=())
    action = _leading_action(plan)
    backends: tuple[Backend, ...] = ()
    if action.verdict is Verdict.BACKEND:
        backends = plan.candidate_sets[action.candidates].backends
    dealt = slots(backends)
    elements: dict[tuple[str, str], str] = {}
    if dealt:
        match = f"{protocol} . {key.address} . {key.port}"
        for slot, index in enumerate(dealt):
            backend = backends[index]
            elements[f"backends-{slot}", match] = f"{backend.address} . {backend.port}"
        elements["slot-count", match] = f"goto pick-{len(dealt)}"
        pod, node, external = (a.masquerade for a in plan.actions)
        elements["sources", match] = f"goto {MASQUERADE_CHAINS[pod, node, external]}"
    return FrontendElements(
        member=member,
        elements=elements,
        hairpins=tuple(sorted({backends[index].address for index in dealt})),
    )


def _leading_action(plan: FrontendPlan) -> Action:
    leader = ClientClass.POD if plan.kind is FrontendKind.CLUSTER_IP else ClientClass.EXTERNAL
    return plan.actions[leader]


class FamilyElements(Struct, frozen=True, kw_only=True):
    """Everything the kernel must hold for one address family."""

    members: frozenset[str]
    """Entries of the ipset of frontends."""
    elements: Mapping[tuple[str, str], str]
    """(nft map or set, key) -> value; the value of a set's element is empty."""
    pod_cidrs: tuple[str, ...]
    """Networks of the set of pod CIDRs."""


class FamilyChanges(Struct, frozen=True, kw_only=True):
    """The way from one state of a family to the next."""

    members_added: tuple[str, ...] = ()
    members_removed: tuple[str, ...] = ()
    added: dict[tuple[str, str], str] = field(default_factory=dict)
    changed: dict[tuple[str, str], str] = field(default_factory=dict)
    """Elements that exist with another value."""
    removed: tuple[tuple[str, str], ...] = ()
    pod_cidrs: tuple[str, ...] | None = None
    """None: unchanged."""

    @property
    def count(self) -> int:
        """Number of entries and elements touched."""
        return (
            len(self.members_added)
            + len(self.members_removed)
            + len(self.added)
            + len(self.changed)
            + len(self.removed)
            + (len(self.pod_cidrs or ("",)) if self.pod_cidrs is not None else 0)
        )


def _of_family(family: Family, cidrs: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        sorted(c for c in cidrs if (":" in c) == (family is Family.IPV6)),
    )


def family_elements(
    family: Family, plans: Mapping[FrontendKey, FrontendPlan], node: NodeContext
) -> FamilyElements:
    """Return the complete desired state of ``family``: the reference KernelState is held to."""
    members: set[str] = set()
    elements: dict[tuple[str, str], str] = {}
    for key, plan in plans.items():
        if key.family is not family:
            continue
        own = frontend_elements(plan)
        if own.member is not None:
            members.add(own.member)
        elements.update(own.elements)
        for address in own.hairpins:
            elements["hairpin", f"{address} . {address}"] = ""
    return FamilyElements(
        members=frozenset(members),
        elements=elements,
        pod_cidrs=_of_family(family, node.cluster_cidrs),
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
        self._hairpins: Counter[str] = Counter()
        self._pod_cidrs: tuple[str, ...] = ()

    def advance(
        self, plans: Mapping[FrontendKey, FrontendPlan], node: NodeContext
    ) -> FamilyChanges:
        """Return how the kernel gets from the last state to that of ``plans``.

        Plans of the other family are ignored.
        """
        members_added: list[str] = []
        members_removed: list[str] = []
        added: dict[tuple[str, str], str] = {}
        changed: dict[tuple[str, str], str] = {}
        removed: list[tuple[str, str]] = []
        touched: Counter[str] = Counter()

        gone = [key for key in self._plans if key not in plans]
        fresh = [
            (key, plan)
            for key, plan in plans.items()
            if key.family is self.family and self._plans.get(key) != plan
        ]
        for key in gone:
            del self._plans[key]
            before = self._own.pop(key)
            if before.member is not None:
                members_removed.append(before.member)
            removed.extend(before.elements)
            touched.subtract(before.hairpins)
        nothing = FrontendElements(member=None, elements={}, hairpins=())
        for key, plan in fresh:
            before = self._own.get(key, nothing)
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
            removed.extend(place for place in before.elements if place not in after.elements)
            touched.subtract(before.hairpins)
            touched.update(after.hairpins)

        for address, change in touched.items():
            count = self._hairpins[address]
            place = ("hairpin", f"{address} . {address}")
            if count == 0 and change > 0:
                added[place] = ""
            elif count > 0 and count + change == 0:
                removed.append(place)
            self._hairpins[address] = count + change
            if not self._hairpins[address]:
                del self._hairpins[address]

        pod_cidrs = _of_family(self.family, node.cluster_cidrs)
        cidrs_change = None if pod_cidrs == self._pod_cidrs else pod_cidrs
        self._pod_cidrs = pod_cidrs
        return FamilyChanges(
            members_added=tuple(members_added),
            members_removed=tuple(members_removed),
            added=added,
            changed=changed,
            removed=tuple(removed),
            pod_cidrs=cidrs_change,
        )
