"""The fallback by class of client: who gets which backends, and who sees which source."""

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
from nfqproxy.model import (
    Action,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
    Verdict,
)

from .probes import SILENCE
from .rules_fixtures import (
    BACKEND,
    CLIENT_IP,
    MASQUERADED,
    NODE,
    NODE_IP,
    VIP,
    Cluster,
    ask,
    backends,
    borrowed,
    by_key,
    cluster,
    gateway,
    inside,
    plan,
    pod_address,
    require_kernel,
    serve,
    sh,
)

pytestmark = pytest.mark.kernel

every_family = pytest.mark.parametrize("family", list(Family))
LOCAL = Action(verdict=Verdict.BACKEND, candidates=1)


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


@pytest.fixture
def lab(shared_lab: Cluster) -> Iterator[Cluster]:
    with borrowed(shared_lab) as built:
        yield built


def node_port(family: Family, protocol: Protocol = Protocol.TCP) -> FrontendPlan:
    """eTP Local: C is b2 and b3, L is b3; pods keep their source, the node is masqueraded."""
    return plan(
        FrontendKey(protocol, NODE_IP[family], 30080),
        backends(family, 0, 1, 1),
        local=backends(family, 0, 0, 1),
        kind=FrontendKind.NODE_PORT,
        actions=(BACKEND, MASQUERADED, LOCAL),
    )


def replies(lab: Cluster, role: str, key: FrontendKey, count: int = 30) -> Counter[str]:
    return inside(
        lab.names[role],
        lambda: Counter(ask(key.protocol, key.address, key.port) for _ in range(count)),
    )


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@every_family
def test_each_class_draws_from_its_own_candidates(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    served = node_port(family, protocol)
    serve(lab, served)
    assert set(replies(lab, "client", served.key)) == {f"b3 {CLIENT_IP[family]}"}
    assert set(replies(lab, "b1", served.key)) == {
        f"b2 {pod_address(family, 1)}",
        f"b3 {pod_address(family, 1)}",
    }
    assert set(replies(lab, "node", served.key)) == {
        f"b2 {gateway(family, 2)}",
        f"b3 {gateway(family, 3)}",
    }


@every_family
def test_the_source_of_pods_counts_first(lab: Cluster, family: Family) -> None:
    """An address of the node inside the pod network (a bridge's, say) is a pod's: P before N."""
    served = node_port(family)
    serve(lab, served)
    source = (gateway(family, 1), 0)
    answer = inside(lab.node, lambda: ask(Protocol.TCP, served.key.address, 30080, source))
    assert answer.split()[1] == source[0]


def test_without_a_detector_pods_are_outsiders(lab: Cluster) -> None:
    served = node_port(Family.IPV4)
    serve(lab, served, node=NodeContext(node_name="n1"))
    assert set(replies(lab, "b1", served.key)) == {f"b3 {pod_address(Family.IPV4, 1)}"}


@pytest.mark.parametrize(
    ("settings", "pods", "outsiders"),
    [
        ({"interface_name_prefix": "b"}, ("b1", "b2"), ("client",)),
        ({"bridge_interface": "b1"}, ("b1",), ("b2", "client")),
        ({"bridge_interface": "client"}, ("client",), ("b1", "b2")),
    ],
)
@every_family
def test_detectors_by_interface(
    lab: Cluster,
    family: Family,
    settings: dict[str, str],
    pods: tuple[str, ...],
    outsiders: tuple[str, ...],
) -> None:
    """The pods' links are named after them: b1, b2, b3, and client for the outer one."""
    served = node_port(family)
    cluster_ip = plan(
        FrontendKey(Protocol.TCP, VIP[family], 80),
        backends(family, 0, 0, 1),
        masquerade=(False, True, True),
    )
    outside = plan(
        FrontendKey(Protocol.TCP, VIP[family], 443),
        [
            msgspec.structs.replace(
                backends(family, 1)[0], address=CLIENT_IP[family], in_pod_network=False
            )
        ],
        masquerade=(False, False, False),
    )
    node = NodeContext(node_name="n1", **settings)
    rules = RuleSettings(iptables=IptablesBackend.NFT, **settings)
    serve(lab, served, cluster_ip, outside, settings=rules, node=node)
    own = {role: pod_address(family, int(role[1])) for role in ("b1", "b2")} | {
        "client": CLIENT_IP[family]
    }
    for role in pods:
        assert {answer.split()[0] for answer in replies(lab, role, served.key)} == {"b2", "b3"}
        assert set(replies(lab, role, cluster_ip.key, 1)) == {f"b3 {own[role]}"}
    for role in outsiders:
        assert set(replies(lab, role, served.key)) == {f"b3 {own[role]}"}
        assert set(replies(lab, role, cluster_ip.key, 1)) == {f"b3 {gateway(family, 3)}"}
    if "b1" in pods:
        assert set(replies(lab, "b1", outside.key, 1)) == {f"client {NODE_IP[family]}"}
    if "b1" in outsiders:
        assert set(replies(lab, "b1", outside.key, 1)) == {f"client {own['b1']}"}
    assert {answer.split()[0] for answer in replies(lab, "node", served.key)} == {"b2", "b3"}


@every_family
def test_a_frontend_may_change_between_one_and_several_sets(lab: Cluster, family: Family) -> None:
    several = node_port(family)
    one = plan(several.key, backends(family, 1), kind=FrontendKind.NODE_PORT)
    table = serve(lab, several)
    for wanted, expected in ((one, "b1"), (several, "b3"), (one, "b1")):
        result = inside(lab.node, lambda wanted=wanted: table.sync(by_key(wanted), NODE))
        assert result.members_added == result.members_removed == 0
        assert {answer.split()[0] for answer in replies(lab, "client", wanted.key)} == {expected}


COUNT = 200


def each_source(lab: Cluster, family: Family, key: FrontendKey) -> dict[str, str]:
    """Ask from many addresses of the client; source -> backend."""
    prefix, length = ("192.0.2.", 32) if family is Family.IPV4 else ("2001:db8:2::1:", 128)
    sources = [f"{prefix}{number}" for number in range(40, 40 + COUNT)]
    batch = "".join(f"addr add {source}/{length} dev eth0\n" for source in sources)
    sh(lab.names["client"], "ip", "-force", "-batch", "-", stdin=batch, check=False)
    return inside(
        lab.names["client"],
        lambda: {
            source: ask(key.protocol, key.address, key.port, (source, 0)).split()[0]
            for source in sources
        },
    )


@every_family
def test_with_affinity_a_client_stays_with_its_backend(lab: Cluster, family: Family) -> None:
    cluster_ip = FrontendKey(Protocol.TCP, VIP[family], 80)
    datagrams = FrontendKey(Protocol.UDP, VIP[family], 80)
    port = FrontendKey(Protocol.TCP, NODE_IP[family], 30080)
    weights = backends(family, 2, 1, 1)
    plans = [
        plan(cluster_ip, weights, affinity_s=10800),
        plan(datagrams, weights, affinity_s=10800),
        plan(port, weights, kind=FrontendKind.NODE_PORT, affinity_s=10800),
    ]
    serve(lab, *plans)
    first = each_source(lab, family, cluster_ip)
    spread = Counter(first.values())
    # 200 clients over weights 2:1:1; five standard deviations of a binomial are below 36.
    for name, share in (("b1", 100), ("b2", 50), ("b3", 50)):
        assert abs(spread[name] - share) < 36, spread
    assert each_source(lab, family, cluster_ip) == first
    assert each_source(lab, family, port) == first, "all frontends of the port agree"
    assert each_source(lab, family, datagrams) == first
    # Also when the rules are put on the node again, by another process.
    inside(lab.node, lambda: node_rules.cleanup())
    serve(lab, *plans)
    assert each_source(lab, family, cluster_ip) == first


def test_a_class_without_backends_leaves_the_others_alone(lab: Cluster) -> None:
    """All local backends drain: outsiders are refused, pods and the node go on."""
    key = FrontendKey(Protocol.TCP, NODE_IP[Family.IPV4], 30080)
    serve(
        lab,
        plan(
            key,
            backends(Family.IPV4, 0, 1),
            local=backends(Family.IPV4, 0),
            kind=FrontendKind.NODE_PORT,
            actions=(BACKEND, MASQUERADED, LOCAL),
        ),
    )
    assert lab.probe("client", key) == "icmp 3/3"
    assert lab.probe("b1", key).startswith("b2 ")
    assert lab.probe("node", key).startswith("b2 ")
    assert SILENCE not in lab.probes(("client", "b1", "node"), key).values()
