"""Source ranges of load-balancer addresses, checked by the kernel whoever translates."""

from collections.abc import Iterator

import pytest

from nfqproxy.model import Backend, Family, FrontendKey, FrontendKind, FrontendPlan, Protocol

from .probes import REFUSED, SILENCE
from .rules_fixtures import (
    CLIENT_IP,
    EXTERNAL_IP,
    LB_IP,
    NODE,
    Cluster,
    backends,
    borrowed,
    by_key,
    cluster,
    counted,
    empty,
    gateway,
    inside,
    plan,
    pod_address,
    require_kernel,
    serve,
    sh,
)

pytestmark = pytest.mark.kernel

LB = FrontendKind.LOAD_BALANCER
CLIENTS = {Family.IPV4: "192.0.2.0/24", Family.IPV6: "2001:db8:2::/64"}
CLIENT = {Family.IPV4: "192.0.2.2/32", Family.IPV6: "2001:db8:2::2/128"}
PODS = {Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:10:244::/56"}
ELSEWHERE = {Family.IPV4: "8.8.8.0/24", Family.IPV6: "2001:4860::/32"}
EVERYBODY = {Family.IPV4: "0.0.0.0/0", Family.IPV6: "::/0"}
ROLES = ("client", "node", "b1")
every_family = pytest.mark.parametrize("family", list(Family))
every_protocol = pytest.mark.parametrize("protocol", list(Protocol))


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


@pytest.fixture
def lab(shared_lab: Cluster) -> Iterator[Cluster]:
    with borrowed(shared_lab) as built:
        yield built


def guarded(key: FrontendKey, *ranges: str) -> FrontendPlan:
    return plan(key, backends(key.family, 0, 1), kind=LB, ranges=ranges)


@every_protocol
@every_family
def test_who_is_in_no_range_is_dropped(lab: Cluster, family: Family, protocol: Protocol) -> None:
    """Pods and the node itself get no exemption; the other frontends of the Service have no ranges."""
    key = FrontendKey(protocol, LB_IP[family], 80)
    free = FrontendKey(protocol, EXTERNAL_IP[family], 80)
    serve(
        lab,
        guarded(key, ELSEWHERE[family]),
        plan(free, backends(family, 0, 1), kind=FrontendKind.EXTERNAL_IP),
    )
    answers = lab.probes(ROLES, key)
    assert answers == dict.fromkeys(answers, SILENCE)
    assert set(counted(lab)) == {"source-range-dropped"}
    assert counted(lab)["source-range-dropped"] >= len(ROLES)
    if protocol is not Protocol.SCTP:
        served = lab.probes(ROLES, free)
        assert all(answer.startswith("b2 ") for answer in served.values()), served


@every_protocol
@every_family
def test_the_check_comes_before_the_refusal(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    key = FrontendKey(protocol, LB_IP[family], 80)
    without = plan(key, [], kind=LB, ranges=(CLIENT[family],), actions=empty(key).actions)
    serve(lab, without)
    assert lab.probes(ROLES, key) == {
        ("client", str(key)): REFUSED[family],
        ("node", str(key)): SILENCE,
        ("b1", str(key)): SILENCE,
    }


@every_family
def test_ranges_may_change_in_every_way(lab: Cluster, family: Family) -> None:
    """Wider, narrower, overlapping, of several networks, all and none: within one table."""
    key = FrontendKey(Protocol.TCP, LB_IP[family], 80)
    neighbour = FrontendKey(Protocol.TCP, LB_IP[family], 443)
    table = serve(lab, guarded(key, ELSEWHERE[family]), guarded(neighbour, CLIENT[family]))
    steps: list[tuple[tuple[str, ...] | None, set[str]]] = [
        ((CLIENTS[family],), {"client"}),
        ((CLIENT[family],), {"client"}),
        ((CLIENT[family], CLIENTS[family], CLIENT[family]), {"client"}),
        ((CLIENTS[family], PODS[family]), {"client", "b1"}),
        ((PODS[family],), {"b1"}),
        ((EVERYBODY[family],), {"client", "b1"}),
        ((EVERYBODY[family], ELSEWHERE[family]), {"client", "b1"}),
        ((), set()),
        (None, {"client", "b1"}),
        ((ELSEWHERE[family],), set()),
    ]
    for ranges, allowed in steps:
        wanted = plan(key, backends(family, 0, 1), kind=LB, ranges=ranges)
        plans = by_key(wanted, guarded(neighbour, CLIENT[family]))
        result = inside(lab.node, lambda plans=plans: table.sync(plans, NODE))
        assert not result.full
        answers = lab.probes(("client", "b1"), key)
        served = {role for (role, _), answer in answers.items() if answer.startswith("b2 ")}
        assert served == allowed, ranges
        assert set(answers.values()) - {SILENCE} == {
            f"b2 {CLIENT_IP[family] if role == 'client' else pod_address(family, 1)}"
            for role in served
        }
    assert lab.probe("client", neighbour).startswith("b2 ")
    inside(lab.node, lambda: table.sync({}, NODE))
    ip = "ip" if family is Family.IPV4 else "ip6"
    for name in ("guarded", "allowed-sources"):
        assert "elements" not in sh(lab.node, "nft", "list", "set", ip, "nfqproxy", name)


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@every_family
def test_a_workers_entry_opens_nothing(lab: Cluster, family: Family, protocol: Protocol) -> None:
    """Before NAT the destination is still the frontend, whoever chose the translation."""
    key = FrontendKey(protocol, LB_IP[family], 80)
    target = pod_address(family, 1)
    target = f"[{target}]:8080" if family is Family.IPV6 else f"{target}:8080"
    state = ["--state", "SYN_SENT"] if protocol is Protocol.TCP else []
    for port, ranges, expected in (
        (40001, ELSEWHERE[family], SILENCE),
        (40002, CLIENTS[family], f"b1 {CLIENT_IP[family]}"),
    ):
        serve(lab, guarded(key, ranges))
        sh(
            lab.node, "conntrack", "-I", "-p", protocol.name.lower(), "-t", "20",
            "-s", CLIENT_IP[family], "-d", key.address, "--sport", str(port), "--dport", "80",
            "--dst-nat", target, *state,
        )  # fmt: skip
        assert lab.probe("client", key, (CLIENT_IP[family], port)) == expected


@every_family
def test_it_is_asked_what_the_client_was(lab: Cluster, family: Family) -> None:
    """A process of the node to a socket of the node is looked at twice, the second time masqueraded."""
    own, other = gateway(family, 1), gateway(family, 2)
    lab.servers.add(lab.node, "host", own, 8081)
    key = FrontendKey(Protocol.TCP, LB_IP[family], 80)
    length = 32 if family is Family.IPV4 else 128
    serve(
        lab,
        plan(
            key,
            [Backend(address=own, port=8081)],
            kind=LB,
            masquerade=(True, True, True),
            ranges=(f"{other}/{length}",),
        ),
    )
    answer = lab.probe("node", key, (other, 40003))
    assert answer.startswith("host ")
    assert answer != f"host {other}", "masqueraded"
    assert lab.probe("node", key, (own, 40004)) == SILENCE


@every_family
def test_a_backend_that_is_given_itself_is_asked_as_well(lab: Cluster, family: Family) -> None:
    key = FrontendKey(Protocol.TCP, LB_IP[family], 80)
    for ranges, expected in (
        (PODS[family], f"b1 {gateway(family, 1)}"),
        (CLIENTS[family], SILENCE),
    ):
        serve(lab, plan(key, backends(family, 1), kind=LB, ranges=(ranges,)))
        assert lab.probe("b1", key) == expected


@every_family
def test_a_neighbours_translation_opens_nothing(lab: Cluster, family: Family) -> None:
    """With its own rule ahead of the fallback, as a kube-proxy of before may have left."""
    key = FrontendKey(Protocol.TCP, LB_IP[family], 80)
    ip = "ip" if family is Family.IPV4 else "ip6"
    target = pod_address(family, 3)
    target = f"[{target}]:8080" if family is Family.IPV6 else f"{target}:8080"
    serve(lab, guarded(key, PODS[family]))
    rules = "".join(
        f"chain {hook} {{ type nat hook {hook} priority -120;"
        f" {ip} daddr {key.address} tcp dport 80 dnat to {target}; }}\n"
        for hook in ("prerouting", "output")
    )
    sh(lab.node, "nft", "-f", "-", stdin=f"table {ip} neighbour {{\n{rules}}}\n")
    try:
        answers = lab.probes(ROLES, key)
    finally:
        sh(lab.node, "nft", "delete", "table", ip, "neighbour")
    assert answers == {
        ("client", str(key)): SILENCE,
        ("node", str(key)): SILENCE,
        ("b1", str(key)): f"b3 {pod_address(family, 1)}",
    }
