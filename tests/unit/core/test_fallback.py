"""Slots and elements of the kernel fallback."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.core.fallback import (
    MAX_SLOTS,
    FamilyChanges,
    KernelState,
    family_elements,
    frontend_elements,
    slots,
)
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
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
    assert own.hairpins == ("10.244.1.1", "10.244.1.2")


def test_a_frontend_without_backends_is_queued_and_not_in_the_fallback() -> None:
    own = frontend_elements(plan(WEB, [], verdicts=(Verdict.REJECT,) * 3))
    assert own.member == "10.96.0.10,tcp:80"
    assert own.elements == {}


def test_a_frontend_left_alone_is_nowhere() -> None:
    own = frontend_elements(plan(WEB, pods(1), verdicts=(Verdict.PASS,) * 3))
    assert own.member is None
    assert own.elements == {}


def test_the_fallback_of_an_external_frontend_does_as_outsiders_get() -> None:
    verdicts = (Verdict.BACKEND, Verdict.BACKEND, Verdict.DROP)
    dropped = plan(WEB, pods(1), verdicts, kind=FrontendKind.NODE_PORT)
    assert frontend_elements(dropped).elements == {}
    assert frontend_elements(plan(WEB, pods(1), verdicts)).elements


KEYS = [
    FrontendKey(protocol, address, 80)
    for protocol in Protocol
    for address in ("10.96.0.10", "10.96.0.11", "fd00:10:96::10")
]
PLANS = st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(0, 9), max_size=4)).map(
    lambda shapes: {key: plan(key, pods(*weights)) for key, weights in shapes.items()}
)
NODES = st.sampled_from([(), ("10.244.0.0/16",), ("10.244.0.0/16", "fd00:10:244::/56")]).map(
    lambda cidrs: NodeContext(node_name="n1", cluster_cidrs=cidrs)
)


class Kernel:
    """Sets and maps as the kernel has them: no double adds, no removal of what is not there."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.elements: dict[tuple[str, str], str] = {}
        self.pod_cidrs: tuple[str, ...] = ()

    def take(self, change: FamilyChanges) -> None:
        for member in change.members_added:
            assert member not in self.members
            self.members.add(member)
        for member in change.members_removed:
            self.members.remove(member)
        for place, value in change.changed.items():
            assert self.elements[place] != value
            self.elements[place] = value
        for place, value in change.added.items():
            assert place not in self.elements
            self.elements[place] = value
        for place in change.removed:
            del self.elements[place]
        if change.pod_cidrs is not None:
            self.pod_cidrs = change.pod_cidrs


@given(st.lists(st.tuples(PLANS, NODES), max_size=6))
def test_differences_lead_to_the_reference_state(
    history: list[tuple[dict[FrontendKey, FrontendPlan], NodeContext]],
) -> None:
    for family in Family:
        state, kernel = KernelState(family), Kernel()
        for plans, node in history:
            kernel.take(state.advance(plans, node))
            want = family_elements(family, plans, node)
            assert kernel.members == want.members
            assert kernel.elements == want.elements
            assert kernel.pod_cidrs == want.pod_cidrs
            assert state.advance(dict(plans), node).count == 0
