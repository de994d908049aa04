"""Updates by difference: whatever the way, the kernel ends where a fresh start would; nothing flickers."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfqproxy.core.fallback import family_elements
from nfqproxy.kernel import node_rules
from nfqproxy.kernel.counters import refusal_counters
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
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
    Verdict,
)

from .probes import REFUSED, probe
from .rules_fixtures import (
    BACKEND,
    CLIENT_IP,
    DROP,
    EXTERNAL_IP,
    MASQUERADED,
    NODE,
    SERVICE_CIDRS,
    VIP,
    Cluster,
    ask,
    backends,
    by_key,
    cluster,
    empty,
    inside,
    namespaces,
    plan,
    require_kernel,
    serve,
    sh,
)

pytestmark = pytest.mark.kernel

SETTINGS = RuleSettings(iptables=IptablesBackend.NFT)
IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
Plans = dict[FrontendKey, FrontendPlan]
Held = dict[str, list[str]]


@pytest.fixture
def node() -> Iterator[str]:
    require_kernel()
    with namespaces("node") as names:
        yield names["node"]


@pytest.fixture
def lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


def held(node: str, family: Family) -> Held:
    """Return the elements of every set and map of a family, sorted, and the ipset's members."""
    listing = json.loads(sh(node, "nft", "-j", "list", "table", IP[family], "nfqproxy"))
    found = {}
    for item in listing["nftables"]:
        for kind in ("set", "map"):
            if kind in item:
                elements = item[kind].get("elem", [])
                found[item[kind]["name"]] = sorted(json.dumps(each) for each in elements)
    members = sh(node, "ipset", "save", f"nfqproxy-frontends-{int(family)}").splitlines()
    found["ipset"] = sorted(line for line in members if line.startswith("add "))
    return found


RANGES = {
    Family.IPV4: ("192.0.2.0/24", "192.0.2.0/25", "0.0.0.0/0", "198.51.100.7/32"),
    Family.IPV6: ("2001:db8::/32", "2001:db8:1::/48", "::/0", "2001:db8::1/128"),
}
KEYS = [
    FrontendKey(protocol, address, port)
    for protocol in Protocol
    for address in ("10.96.0.10", "fd00:10:96::10")
    for port in (80, 81)
]


@st.composite
def plans(draw: st.DrawFn) -> Plans:
    made = {}
    for key in draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=6)):
        pod = "10.244.1.{}" if key.family is Family.IPV4 else "fd00:10:244:1::{}"
        sets = tuple(
            CandidateSet(
                backends=tuple(
                    Backend(
                        address=pod.format(number),
                        port=8080,
                        weight=weight,
                        in_pod_network=number > 1,
                    )
                    for number, weight in enumerate(draw(st.lists(st.integers(0, 5), max_size=4)))
                )
            )
            for _ in range(2)
        )
        ranges = st.none() | st.lists(st.sampled_from(RANGES[key.family]), max_size=3).map(tuple)
        verdicts = st.sampled_from((Verdict.BACKEND, Verdict.BACKEND, Verdict.REJECT, Verdict.DROP))
        made[key] = msgspec.structs.replace(
            plan(key, []),
            kind=draw(st.sampled_from((FrontendKind.CLUSTER_IP, FrontendKind.LOAD_BALANCER))),
            candidate_sets=sets,
            actions=tuple(
                Action(
                    verdict=draw(verdicts),
                    candidates=draw(st.integers(0, 1)),
                    masquerade=draw(st.booleans()),
                )
                for _ in ClientClass
            ),
            affinity_timeout_s=draw(st.sampled_from((0, 60))),
            allowed_sources=draw(ranges),
        )
    return made


CONTEXTS = st.sampled_from(
    [
        NodeContext(node_name="n1"),
        NodeContext(node_name="n1", cluster_cidrs=Cluster.CIDRS),
        NodeContext(node_name="n1", cluster_cidrs=("10.0.0.0/8",), service_cidrs=SERVICE_CIDRS),
        NODE,
    ]
)


def test_any_sequence_of_updates_ends_where_a_fresh_start_does(node: str) -> None:
    inside(node, lambda: node_rules.apply(SETTINGS))

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(st.tuples(plans(), CONTEXTS), min_size=1, max_size=5))
    def sequences(history: list[tuple[Plans, NodeContext]]) -> None:
        table = KernelTable(SETTINGS)
        for number, (wanted, context) in enumerate(history):
            result = inside(node, lambda w=wanted, c=context: table.sync(w, c))
            assert result.full is (number == 0)
        by_differences = {family: held(node, family) for family in Family}
        wanted, context = history[-1]
        assert inside(node, lambda: KernelTable(SETTINGS).sync(wanted, context)).full
        assert by_differences == {family: held(node, family) for family in Family}
        for family in Family:
            want = family_elements(family, wanted, context)
            assert len(by_differences[family]["ipset"]) == len(want.members)
            counts = Counter(name for name, _ in want.elements)
            for name, content in want.networks.items():
                counts[name] = len(content)
            have = {name: len(each) for name, each in by_differences[family].items() if each}
            have.pop("ipset", None)
            assert have == {name: count for name, count in counts.items() if count}

    sequences()


def test_a_live_service_is_never_refused(lab: Cluster) -> None:
    """Its candidates, classes, affinity and ranges change under traffic; every connection is served."""
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    pods = [backends(Family.IPV4, *weights) for weights in ((1,), (1, 2, 1), (0, 0, 1))]
    local = Action(verdict=Verdict.BACKEND, candidates=1)
    lb = FrontendKind.LOAD_BALANCER
    shapes = [
        plan(key, pods[0]),
        plan(key, pods[1], local=pods[0], actions=(BACKEND, MASQUERADED, local)),
        plan(key, pods[2], affinity_s=60),
        plan(key, pods[0], local=pods[1], actions=(DROP, MASQUERADED, local)),
        plan(key, pods[1], kind=lb, ranges=("192.0.2.0/24",)),
        plan(key, pods[1], kind=lb, ranges=("192.0.2.0/25", "8.8.8.8/32")),
        plan(key, pods[2], kind=lb),
    ]
    outcomes = under_updates(lab, shapes, lambda: ask(key.protocol, key.address, key.port))
    assert outcomes.total() > 100
    assert {each.split()[0] for each in outcomes} <= {"b1", "b2", "b3"}, outcomes


def test_a_service_that_comes_and_goes_is_served_or_refused(lab: Cluster) -> None:
    """At no instant does its packet fall between the two: no silence, no routing elsewhere.

    An external address, because a ClusterIP would be refused by its address as well.
    """
    key = FrontendKey(Protocol.UDP, EXTERNAL_IP[Family.IPV4], 80)
    kind = FrontendKind.EXTERNAL_IP
    shapes = [plan(key, backends(Family.IPV4, 1), kind=kind), empty(key, kind)]
    outcomes = under_updates(lab, shapes, lambda: probe(key), full_every=0)
    assert set(outcomes) == {f"b1 {CLIENT_IP[Family.IPV4]}", REFUSED[Family.IPV4]}


def under_updates(
    lab: Cluster, shapes: list[FrontendPlan], connect: Callable[[], str], full_every: int = 11
) -> Counter[str]:
    """Connect from the client while the node goes round the plans; count the outcomes.

    Every so many syncs is a full one, 0: none but the first.
    """
    table = serve(lab, shapes[0])
    done = threading.Event()
    failures: list[BaseException] = []
    syncs = 0

    def update() -> None:
        nonlocal syncs
        while not done.is_set():
            syncs += 1
            if full_every and syncs % full_every == 0:
                table.forget()
            table.sync(by_key(shapes[syncs % len(shapes)]), NODE)

    def run_updates() -> None:
        try:
            inside(lab.node, update)
        except BaseException as error:
            failures.append(error)

    updater = threading.Thread(target=run_updates)
    updater.start()
    outcomes: Counter[str] = Counter()

    def connections() -> None:
        while syncs < 40 and updater.is_alive():
            outcomes[connect()] += 1

    try:
        inside(lab.names["client"], connections)
    finally:
        done.set()
        updater.join()
    assert not failures
    return outcomes


def ten_thousand() -> Plans:
    """Every third has policies per class, every fifth affinity, every seventh no endpoints."""
    local = Action(verdict=Verdict.BACKEND, candidates=1)
    made = []
    for number in range(10_000):
        key = FrontendKey(Protocol.TCP, f"10.96.{number // 250}.{number % 250 + 1}", 80)
        pods = [
            Backend(address=f"10.{100 + n // 60_000}.{n // 250 % 240}.{n % 250 + 1}", port=8080)
            for n in range(3 * number, 3 * number + 3)
        ]
        if number % 7 == 0:
            made.append(empty(key))
        elif number % 3 == 0:
            actions = (BACKEND, MASQUERADED, local)
            made.append(plan(key, pods, local=pods[:1], actions=actions))
        else:
            made.append(plan(key, pods, affinity_s=60 if number % 5 == 0 else 0))
    return by_key(*made)


def test_ten_thousand_services(node: str, record_property: Callable[[str, object], None]) -> None:
    table = KernelTable(SETTINGS)
    inside(node, lambda: node_rules.apply(SETTINGS))
    wanted = ten_thousand()

    def timed(name: str, plans: Plans) -> int:
        started = time.perf_counter()
        result = inside(node, lambda: table.sync(plans, NODE))
        elapsed = time.perf_counter() - started
        record_property(name, round(elapsed, 3))
        print(f"{name}: {elapsed:.3f} s, {result}")
        return result.count

    def rules() -> list[int]:
        chains = sh(node, "nft", "list", "chains")
        return [sh(node, "nft", "-t", "list", "ruleset").count("\n\t\t"), chains.count("chain ")]

    before = rules()
    timed("first sync of 10,000 Services", wanted)
    assert rules() == before
    members = sum(1 for number in range(10_000) if number % 7)
    listing = sh(node, "ipset", "list", "-t", "nfqproxy-frontends-4")
    assert f"Number of entries: {members}" in listing
    key = FrontendKey(Protocol.TCP, "10.96.0.2", 80)
    one_more = wanted | by_key(plan(key, backends(Family.IPV4, 1, 1, 1, 1)))
    # Three backends replaced, one slot more: three values, a slot, the count, four hairpins for three.
    assert timed("one change among them", one_more) == 3 + 1 + 1 + 4 + 3
    assert timed("no change", dict(one_more)) == 0
    started = time.perf_counter()
    counters = inside(node, refusal_counters)
    print(f"counters beside 10,000 Services: {time.perf_counter() - started:.3f} s")
    assert set(counters.values()) == {0}
