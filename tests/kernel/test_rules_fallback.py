"""Real traffic through the kernel fallback: nobody reads the queue."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.counters import queue_statistics, rule_counters
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
from nfqproxy.model import (
    Backend,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
)

from .rules_fixtures import Cluster, ask, by_key, cluster, inside, plan, require_kernel, sh

pytestmark = pytest.mark.kernel

FAMILIES = [Family.IPV4, Family.IPV6]
VIP = {Family.IPV4: "10.96.0.10", Family.IPV6: "fd00:10:96::10"}
NODE_IP = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:2::1"}
CLIENT_IP = {Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:2::2"}
TO_CLIENT_CLUSTER_IP = (False, True, True)  # with a detector: nodes and outsiders
SETTINGS = RuleSettings(iptables=IptablesBackend.NFT)
UDP_PORTS = itertools.count(10_000)
NODE = NodeContext(node_name="n1", cluster_cidrs=Cluster.CIDRS)


def pod(family: Family, number: int) -> str:
    return f"10.244.{number}.2" if family is Family.IPV4 else f"fd00:10:244:{number}::2"


def backends(family: Family, *weights: int) -> list[Backend]:
    return [
        Backend(address=pod(family, i), port=8080, weight=weight)
        for i, weight in enumerate(weights, start=1)
    ]


@pytest.fixture
def lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


def serve(lab: Cluster, *plans: FrontendPlan, settings: RuleSettings = SETTINGS) -> KernelTable:
    def work() -> KernelTable:
        node_rules.apply(settings)
        table = KernelTable(settings)
        table.sync(by_key(*plans), NODE)
        return table

    return inside(lab.node, work)


@pytest.mark.parametrize("backend", [IptablesBackend.NFT, IptablesBackend.LEGACY])
@pytest.mark.parametrize("role", ["client", "node"])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@pytest.mark.parametrize("family", FAMILIES)
def test_connections_are_shared_by_weight(
    lab: Cluster, family: Family, protocol: Protocol, role: str, backend: IptablesBackend
) -> None:
    settings = RuleSettings(iptables=backend)
    key = FrontendKey(protocol, VIP[family], 80)
    serve(lab, plan(key, backends(family, 5, 3, 2)), settings=settings)
    count = 300
    # A port that the kernel gives out a second time would be a flow that is known already.
    ports = UDP_PORTS if protocol is Protocol.UDP else itertools.repeat(0)
    replies = inside(
        lab.names[role],
        lambda: Counter(
            ask(protocol, VIP[family], 80, ("", next(ports))).split()[0] for _ in range(count)
        ),
    )
    assert set(replies) == {"b1", "b2", "b3"}
    expected = {"b1": 0.5 * count, "b2": 0.3 * count, "b3": 0.2 * count}
    chi_square = sum((replies[b] - want) ** 2 / want for b, want in expected.items())
    assert chi_square < 27.6, replies  # 2 degrees of freedom: p = 1e-6
    # UDP: the second packet of a flow comes from the server, so each flow is queued once.
    assert inside(lab.node, rule_counters)[family, protocol] == count


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_masqueraded(lab: Cluster, family: Family) -> None:
    one = backends(family, 1)
    cluster_ip = FrontendKey(Protocol.TCP, VIP[family], 80)
    node_port = FrontendKey(Protocol.TCP, NODE_IP[family], 30080)
    outside = FrontendKey(Protocol.TCP, VIP[family], 443)
    serve(
        lab,
        plan(cluster_ip, one, masquerade=TO_CLIENT_CLUSTER_IP),
        plan(node_port, one, kind=FrontendKind.NODE_PORT, masquerade=(True, True, True)),
        plan(
            outside,
            [Backend(address=CLIENT_IP[family], port=8080, in_pod_network=False)],
            masquerade=TO_CLIENT_CLUSTER_IP,
        ),
    )
    gateway = pod(family, 1).removesuffix("2") + "1"

    def seen(role: str, key: FrontendKey) -> str:
        return lab.ask(role, key.protocol, key.address, key.port)

    assert seen("client", cluster_ip) == f"b1 {gateway}"
    assert seen("node", cluster_ip) == f"b1 {gateway}"
    assert seen("b2", cluster_ip) == f"b1 {pod(family, 2)}"
    assert seen("b1", cluster_ip) == f"b1 {gateway}", "hairpin"
    assert seen("client", node_port) == f"b1 {gateway}"
    assert seen("b2", node_port) == f"b1 {gateway}"
    assert seen("node", node_port) == f"b1 {gateway}"
    assert seen("b1", node_port) == f"b1 {gateway}", "hairpin"
    assert seen("b1", outside) == f"client {NODE_IP[family]}", "backend outside the pod network"


def test_source_is_kept_without_a_detector(lab: Cluster) -> None:
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    inside(lab.node, lambda: node_rules.apply(SETTINGS))
    table = KernelTable(SETTINGS)
    plans = by_key(plan(key, backends(Family.IPV4, 1)))
    inside(lab.node, lambda: table.sync(plans, NodeContext(node_name="n1")))
    assert lab.ask("client", Protocol.TCP, key.address, 80) == "b1 192.0.2.2"
    assert lab.ask("b1", Protocol.TCP, key.address, 80) == "b1 10.244.1.1", "hairpin"


def test_updates_never_lose_a_connection(lab: Cluster) -> None:
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    shapes = [
        backends(Family.IPV4, *weights)
        for weights in ((1,), (1, 1, 1), (5, 3, 2), (0, 1, 0), (1, 60, 3), (2, 1))
    ]
    table = serve(lab, plan(key, shapes[0]))
    done = threading.Event()
    failures: list[BaseException] = []
    syncs = 0

    def update() -> None:
        nonlocal syncs
        while not done.is_set():
            syncs += 1
            if syncs % 7 == 0:
                table.forget()
            table.sync(by_key(plan(key, shapes[syncs % len(shapes)])), NODE)

    def run_updates() -> None:
        try:
            inside(lab.node, update)
        except BaseException as error:
            failures.append(error)

    updater = threading.Thread(target=run_updates)
    updater.start()
    replies: Counter[str] = Counter()

    def connect() -> None:
        while syncs < 40 and updater.is_alive():
            replies[ask(Protocol.TCP, key.address, 80).split()[0]] += 1

    try:
        inside(lab.names["client"], connect)
    finally:
        done.set()
        updater.join()
    assert not failures
    assert replies.total() > 200
    assert set(replies) <= {"b1", "b2", "b3"}, replies


def test_a_removed_service_is_gone_everywhere(lab: Cluster) -> None:
    plans = [
        plan(FrontendKey(p, VIP[f], port), backends(f, 1, 2))
        for f in FAMILIES
        for p in Protocol
        for port in (80, 81)
    ]
    table = serve(lab, *plans)
    result = inside(lab.node, lambda: table.sync({}, NodeContext(node_name="n1")))
    assert result.members_removed == len(plans)
    assert not result.full
    for f, ip in ((4, "ip"), (6, "ip6")):
        assert "Number of entries: 0" in sh(lab.node, "ipset", "list", f"nfqproxy-frontends-{f}")
        for name in ("slot-count", "sources", "backends-0", "backends-2"):
            assert "elements" not in sh(lab.node, "nft", "list", "map", ip, "nfqproxy", name)
        for name in ("hairpin", "pod-cidrs"):
            assert "elements" not in sh(lab.node, "nft", "list", "set", ip, "nfqproxy", name)


def test_no_queue_is_listed_without_a_reader(lab: Cluster) -> None:
    serve(lab)
    assert inside(lab.node, queue_statistics) == {}


STALE_KUBE_PROXY = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SEP-1 - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SEP-1
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.3.2:8080
COMMIT
"""


@pytest.mark.parametrize("backend", [IptablesBackend.NFT, IptablesBackend.LEGACY])
def test_the_fallback_comes_before_stale_rules_of_kube_proxy(
    lab: Cluster, backend: IptablesBackend
) -> None:
    sh(lab.node, f"iptables-{backend.value}-restore", "--noflush", stdin=STALE_KUBE_PROXY)
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    roles = ("client", "node", "b2")

    def servers() -> list[str]:
        return [lab.ask(role, Protocol.TCP, key.address, 80).split()[0] for role in roles]

    assert servers() == ["b3"] * 3
    serve(lab, plan(key, backends(Family.IPV4, 1)))
    assert servers() == ["b1"] * 3
    inside(lab.node, node_rules.cleanup)
    assert servers() == ["b3"] * 3
