"""Slots and elements of the kernel fallback."""

from collections import Counter
from itertools import product

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfqproxy.core.fallback import (
    CLASS_MAPS,
    MAX_SLOTS,
    NETWORK_SETS,
    FamilyChanges,
    FrontendElements,
    KernelState,
    family_elements,
    frontend_elements,
    slots,
)
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    ClientClass,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
    TrafficPolicy,
    Verdict,
)


def pods(*weights: int) -> list[Backend]:
    return [
        Backend(address=f"10.244.1.{i}", port=8080, weight=weight)
        for i, weight in enumerate(weights, start=1)
    ]


def plan(
    key: FrontendKey,
    backends: list[Backend],
    verdicts: tuple[Verdict, Verdict, Verdict] = (Verdict.BACKEND,) * 3,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    masquerade: tuple[bool, bool, bool] = (False, True, True),
) -> FrontendPlan:
    pod, node, external = (
        Action(verdict=v, masquerade=m) for v, m in zip(verdicts, masquerade, strict=True)
    )
    return FrontendPlan(
        key=key,
        kind=kind,
        namespace="default",
        service="web",
        port_name="http",
        policy=TrafficPolicy.CLUSTER,
        candidate_sets=(CandidateSet(backends=tuple(backends)),),
        actions=(pod, node, external),
    )


WEB = FrontendKey(Protocol.TCP, "10.96.0.10", 80)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((), {}),
        ((0,), {}),
        ((7,), {0: 1}),
        ((1, 1, 1), {0: 1, 1: 1, 2: 1}),
        ((100, 100), {0: 1, 1: 1}),
        ((5, 3, 2), {0: 5, 1: 3, 2: 2}),
        ((50, 0, 30, 20), {0: 5, 2: 3, 3: 2}),
        ((1000, 1), {0: 63, 1: 1}),
        ((2, 1), {0: 2, 1: 1}),
    ],
)
def test_slots_of_known_weights(weights: tuple[int, ...], shares: dict[int, int]) -> None:
    assert dict(Counter(slots(pods(*weights)))) == shares


def test_beyond_the_limit_the_heaviest_are_served() -> None:
    weights = [1] * 70 + [2] * 10
    chosen = slots(pods(*weights))
    assert len(chosen) == MAX_SLOTS
    assert set(range(70, 80)) <= set(chosen)
    assert set(chosen) == {*range(54), *range(70, 80)}


def test_equal_weights_are_exact_up_to_the_limit() -> None:
    for count in range(1, MAX_SLOTS + 1):
        assert slots(pods(*[3] * count)) == tuple(range(count))


@given(st.lists(st.integers(0, 1000), max_size=80))
def test_slots_respect_weights(weights: list[int]) -> None:
    shares = Counter(slots(pods(*weights)))
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    assert shares.total() <= MAX_SLOTS
    assert bool(shares) == bool(positive)
    assert all(weights[i] > 0 for i in shares)
    if len(positive) <= MAX_SLOTS:
        assert set(shares) == set(positive)
    for i in shares:
        for j in shares:
            if weights[i] > weights[j]:
                assert shares[i] >= shares[j], "a heavier backend has no fewer slots"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_few_moderate_weights_are_close_to_their_share(weights: list[int]) -> None:
    shares = Counter(slots(pods(*weights)))
    total = sum(weights)
    for i, weight in enumerate(weights):
        # Largest remainder is off by less than one slot, one for a backend raised to its minimum.
        assert abs(shares[i] / shares.total() - weight / total) < 1.0 / 20


def test_elements_of_a_frontend() -> None:
    own = frontend_elements(plan(WEB, pods(2, 1)))
    assert own.member == "10.96.0.10,tcp:80"
    assert own.elements == {
        ("backends-0", "tcp . 10.96.0.10 . 80"): "10.244.1.1 . 8080",
        ("backends-1", "tcp . 10.96.0.10 . 80"): "10.244.1.1 . 8080",
        ("backends-2", "tcp . 10.96.0.10 . 80"): "10.244.1.2 . 8080",
        ("slot-count", "tcp . 10.96.0.10 . 80"): "goto pick-3",
        ("sources", "tcp . 10.96.0.10 . 80"): "goto masquerade-nx",
    }
    assert own.shared == (
        ("cluster-ips", "10.96.0.10"),
        ("hairpin", "10.244.1.1 . 10.244.1.1"),
        ("hairpin", "10.244.1.2 . 10.244.1.2"),
    )


def maps(own: FrontendElements, *names: str) -> dict[str, str]:
    """Values of the one element that each of the maps holds."""
    found = {name: value for (name, _), value in own.elements.items()}
    return {name: found[name] for name in names if name in found}


ALL_CLASSES = ("slot-count", "by-class", *CLASS_MAPS.values(), "refusals")


def test_a_frontend_without_backends_is_refused_and_never_queued() -> None:
    own = frontend_elements(plan(WEB, [], verdicts=(Verdict.REJECT,) * 3))
    assert own.member is None
    assert own.elements == {("refusals", "tcp . 10.96.0.10 . 80"): "goto reject-frontend"}
    assert own.shared == (("cluster-ips", "10.96.0.10"),)


def test_a_frontend_whose_backends_all_drain_is_refused() -> None:
    own = frontend_elements(plan(WEB, pods(0, 0)))
    assert own.member is None
    assert maps(own, *ALL_CLASSES) == {"refusals": "goto reject-frontend"}


def test_a_frontend_left_alone_is_nowhere() -> None:
    own = frontend_elements(plan(WEB, pods(1), verdicts=(Verdict.PASS,) * 3))
    assert own.member is None
    assert own.elements == {}
    assert own.shared == ()


def test_a_class_that_is_refused_is_in_no_map_and_dropped_in_the_end() -> None:
    verdicts = (Verdict.BACKEND, Verdict.BACKEND, Verdict.DROP)
    own = frontend_elements(plan(WEB, pods(1), verdicts, kind=FrontendKind.NODE_PORT))
    assert own.member == "10.96.0.10,tcp:80"
    assert maps(own, *ALL_CLASSES) == {
        "by-class": "",
        "slot-count-pod": "goto pick-1",
        "slot-count-node": "goto pick-1",
        "refusals": "goto drop-outsiders",
    }
    assert ("cluster-ips", "10.96.0.10") not in own.shared


def test_where_nobody_is_served_everybody_is_dropped() -> None:
    own = frontend_elements(plan(WEB, pods(1), (Verdict.DROP,) * 3))
    assert maps(own, *ALL_CLASSES) == {"refusals": "goto drop-frontend"}


def two_sets(cluster: list[Backend], local: list[Backend], affinity_s: int = 0) -> FrontendPlan:
    """eTP Local: pods and the node draw from the cluster's set, others from the local one."""
    return msgspec.structs.replace(
        plan(WEB, cluster, kind=FrontendKind.LOAD_BALANCER),
        candidate_sets=(
            CandidateSet(backends=tuple(cluster)),
            CandidateSet(backends=tuple(local)),
        ),
        actions=(
            Action(verdict=Verdict.BACKEND),
            Action(verdict=Verdict.BACKEND, masquerade=True),
            Action(verdict=Verdict.BACKEND, candidates=1),
        ),
        affinity_timeout_s=affinity_s,
    )


def test_classes_with_sets_of_their_own() -> None:
    own = frontend_elements(two_sets(pods(1, 1, 1), pods(1), affinity_s=10))
    assert maps(own, *ALL_CLASSES, "sources", "local-backends-0", "backends-2") == {
        "by-class": "",
        "slot-count-pod": "goto pick-by-source-3",
        "slot-count-node": "goto pick-by-source-3",
        "slot-count-external": "goto local-pick-by-source-1",
        "sources": "goto masquerade-n",
        "local-backends-0": "10.244.1.1 . 8080",
        "backends-2": "10.244.1.3 . 8080",
    }
    assert ("local-backends-1", "tcp . 10.96.0.10 . 80") not in own.elements


def test_equal_sets_are_one_entry() -> None:
    own = frontend_elements(two_sets(pods(1, 1), pods(1, 1)))
    assert maps(own, *ALL_CLASSES, "local-backends-0") == {"slot-count": "goto pick-2"}


def test_a_local_set_that_drains_refuses_outsiders_alone() -> None:
    own = frontend_elements(two_sets(pods(1, 0), pods(0)))
    assert maps(own, *ALL_CLASSES) == {
        "by-class": "",
        "slot-count-pod": "goto pick-1",
        "slot-count-node": "goto pick-1",
        "refusals": "goto reject-frontend",
    }


def test_three_different_sets_are_an_error() -> None:
    three = tuple(CandidateSet(backends=tuple(pods(*[1] * count))) for count in (1, 2, 3))
    actions = tuple(Action(verdict=Verdict.BACKEND, candidates=index) for index in range(3))
    wrong = msgspec.structs.replace(plan(WEB, pods(1)), candidate_sets=three, actions=actions)
    with pytest.raises(ValueError, match="more than 2 different sets"):
        frontend_elements(wrong)


def test_backends_outside_the_pod_network() -> None:
    outside = [Backend(address="192.0.2.9", port=6443, in_pod_network=False)]
    assert ("non-pod-backends", "192.0.2.9") in frontend_elements(plan(WEB, outside)).shared


def guarded(key: FrontendKey, *ranges: str) -> FrontendPlan:
    return msgspec.structs.replace(plan(key, pods(1)), allowed_sources=ranges)


def test_source_ranges_do_not_overlap() -> None:
    own = frontend_elements(
        guarded(WEB, "192.0.2.0/25", "192.0.2.128/25", "192.0.2.7/32", "8.8.8.8/32")
    )
    match = "tcp . 10.96.0.10 . 80"
    assert {place for place in own.elements if place[0] in ("guarded", "allowed-sources")} == {
        ("guarded", match),
        ("allowed-sources", f"{match} . 8.8.8.8/32"),
        ("allowed-sources", f"{match} . 192.0.2.0/24"),
    }
    six = FrontendKey(Protocol.TCP, "fd00:10:96::10", 80)
    elements = frontend_elements(guarded(six, "2001:db8::/32", "2001:db8:1::/48")).elements
    assert ("allowed-sources", "tcp . fd00:10:96::10 . 80 . 2001:db8::/32") in elements
    assert len([place for place in elements if place[0] == "allowed-sources"]) == 1


def test_the_guard_falls_before_its_ranges_and_new_ranges_replace_old_ones() -> None:
    state, node = KernelState(Family.IPV4), NodeContext(node_name="n1")
    match = "tcp . 10.96.0.10 . 80"
    wide, narrow = f"{match} . 10.0.0.0/8", f"{match} . 10.1.0.0/16"
    state.advance({WEB: guarded(WEB, "10.0.0.0/8")}, node)
    change = state.advance({WEB: guarded(WEB, "10.1.0.0/16")}, node)
    assert change.removed_first == (("allowed-sources", wide),)
    assert change.added == {("allowed-sources", narrow): ""}
    change = state.advance({WEB: plan(WEB, pods(1))}, node)
    assert change.removed_first == (("guarded", match),)
    assert change.removed == (("allowed-sources", narrow),)
    state.advance({WEB: guarded(WEB, "10.0.0.0/8")}, node)
    change = state.advance({}, node)
    assert change.removed_first == ()
    assert {("guarded", match), ("allowed-sources", wide)} <= set(change.removed)


def test_an_endpoint_change_touches_neither_queue_nor_refusals() -> None:
    state, node = KernelState(Family.IPV4), NodeContext(node_name="n1")
    state.advance({WEB: two_sets(pods(1, 1), pods(1))}, node)
    change = state.advance({WEB: two_sets(pods(1, 1, 1), pods(1))}, node)
    touched = {name for name, _ in (*change.added, *change.changed, *change.removed)}
    assert touched == {"backends-2", "slot-count-pod", "slot-count-node", "hairpin"}
    assert not change.members_added
    assert not change.members_removed
    assert not change.networks


def test_cluster_ips_live_as_long_as_one_port_does() -> None:
    state, node = KernelState(Family.IPV4), NodeContext(node_name="n1")
    other = FrontendKey(Protocol.UDP, "10.96.0.10", 53)
    ip = ("cluster-ips", "10.96.0.10")
    both = {key: plan(key, pods(1)) for key in (WEB, other)}
    assert ip in state.advance(both, node).added
    assert ip not in state.advance({other: both[other]}, node).removed
    assert ip in state.advance({}, node).removed


KEYS = [
    FrontendKey(protocol, address, 80)
    for protocol in Protocol
    for address in ("10.96.0.10", "10.96.0.11", "fd00:10:96::10")
]
RANGES = {
    Family.IPV4: ("192.0.2.0/24", "192.0.2.0/25", "10.0.0.0/8", "198.51.100.7/32"),
    Family.IPV6: ("2001:db8::/32", "2001:db8:1::/48", "fd00::/8"),
}


@st.composite
def random_plans(draw: st.DrawFn) -> dict[FrontendKey, FrontendPlan]:
    made = {}
    for key in draw(st.lists(st.sampled_from(KEYS), unique=True)):
        weights = st.lists(st.integers(0, 9), max_size=4)
        sets = tuple(
            CandidateSet(
                backends=tuple(
                    msgspec.structs.replace(each, in_pod_network=draw(st.booleans()))
                    for each in pods(*draw(weights))
                )
            )
            for _ in range(2)
        )
        ranges = st.none() | st.lists(st.sampled_from(RANGES[key.family]), max_size=3).map(tuple)
        made[key] = msgspec.structs.replace(
            plan(key, []),
            kind=draw(st.sampled_from(FrontendKind)),
            candidate_sets=sets,
            actions=tuple(
                Action(
                    verdict=draw(st.sampled_from(Verdict)),
                    candidates=draw(st.integers(0, 1)),
                    masquerade=draw(st.booleans()),
                )
                for _ in ClientClass
            ),
            affinity_timeout_s=draw(st.sampled_from((0, 60))),
            allowed_sources=draw(ranges),
        )
    return made


PLANS = random_plans()
NODES = st.sampled_from([(), ("10.244.0.0/16",), ("10.244.0.0/16", "fd00:10:244::/56")]).flatmap(
    lambda cidrs: st.sampled_from([(), ("10.96.0.0/16", "fd00:10:96::/112")]).map(
        lambda services: NodeContext(node_name="n1", cluster_cidrs=cidrs, service_cidrs=services)
    )
)


class Kernel:
    """Sets and maps as the kernel has them: no double adds, no removal of what is not there."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.elements: dict[tuple[str, str], str] = {}
        self.networks: dict[str, tuple[str, ...]] = dict.fromkeys(NETWORK_SETS, ())

    def take(self, change: FamilyChanges) -> None:
        for member in change.members_added:
            assert member not in self.members
            self.members.add(member)
        for member in change.members_removed:
            self.members.remove(member)
        for place in change.removed_first:
            del self.elements[place]
        for place, value in change.changed.items():
            assert self.elements[place] != value
            self.elements[place] = value
        for place, value in change.added.items():
            assert place not in self.elements
            self.elements[place] = value
        for place in change.removed:
            del self.elements[place]
        for name, content in change.networks.items():
            assert self.networks[name] != content
            self.networks[name] = content


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(PLANS, NODES), max_size=6))
def test_differences_lead_to_the_reference_state(
    history: list[tuple[dict[FrontendKey, FrontendPlan], NodeContext]],
) -> None:
    for family, is_told in product(Family, (False, True)):
        state, kernel = KernelState(family), Kernel()
        before: dict[FrontendKey, FrontendPlan] = {}
        for plans, node in history:
            altered = [key for key in {**before, **plans} if before.get(key) != plans.get(key)]
            kernel.take(state.advance(plans, node, altered if is_told else None))
            before = plans
            want = family_elements(family, plans, node)
            assert kernel.members == want.members
            assert kernel.elements == want.elements
            assert kernel.networks == want.networks
            assert state.advance(dict(plans), node).count == 0
