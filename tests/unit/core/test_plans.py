"""Plans against the decision tables of the service semantics (ClusterIP and external frontends)."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.control.node import NodeSettings
from nfqproxy.core.plan_table import plans_for_node
from nfqproxy.core.plans import is_served
from nfqproxy.model import (
    Action,
    ClientClass,
    Endpoint,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
    ServicePort,
    ServicePortName,
    TrafficPolicy,
    Verdict,
)

LOCAL = Endpoint(address="10.244.1.5", port=8080, node="n1")
REMOTE = Endpoint(address="10.244.2.5", port=8080, node="n2")
CIDR = ("10.244.0.0/16",)
SETTINGS = NodeSettings(node_name="n1")
VIP = FrontendKey(Protocol.TCP, "10.96.0.10", 80)
NODE_PORT = FrontendKey(Protocol.TCP, "192.0.2.1", 30080)


def port(
    *endpoints: Endpoint,
    internal: TrafficPolicy = TrafficPolicy.CLUSTER,
    external: TrafficPolicy = TrafficPolicy.CLUSTER,
    name: str = "web",
) -> ServicePort:
    return ServicePort(
        name=ServicePortName("default", name, "http", Protocol.TCP, Family.IPV4),
        cluster_ip="10.96.0.10",
        port=80,
        node_port=30080,
        external_ips=("203.0.113.9",),
        load_balancer_ips=("198.51.100.7",),
        internal_policy=internal,
        external_policy=external,
        endpoints=endpoints,
    )


def node(cidrs: tuple[str, ...] = CIDR, *, masquerade_all: bool = False) -> NodeContext:
    return NodeContext(
        node_name="n1",
        node_port_addresses=("192.0.2.1", "2001:db8:2::1"),
        cluster_cidrs=cidrs,
        masquerade_all=masquerade_all,
    )


def plans(
    found: ServicePort, context: NodeContext | None = None
) -> dict[FrontendKey, FrontendPlan]:
    return plans_for_node([found], context or node(), SETTINGS)


def masquerades(plan: FrontendPlan) -> tuple[bool, ...]:
    return tuple(action.masquerade for action in plan.actions)


def picks(plan: FrontendPlan, who: ClientClass) -> list[str]:
    action = plan.actions[who]
    assert action.verdict is Verdict.BACKEND
    return [backend.address for backend in plan.candidate_sets[action.candidates].backends]


def test_every_kind_of_frontend_has_its_plan() -> None:
    kinds = {str(key): plan.kind for key, plan in plans(port(LOCAL)).items()}
    assert kinds == {
        "10.96.0.10:80/tcp": FrontendKind.CLUSTER_IP,
        "203.0.113.9:80/tcp": FrontendKind.EXTERNAL_IP,
        "198.51.100.7:80/tcp": FrontendKind.LOAD_BALANCER,
        "192.0.2.1:30080/tcp": FrontendKind.NODE_PORT,
    }


def test_cluster_ip_masquerades_all_but_pods() -> None:
    assert masquerades(plans(port(LOCAL))[VIP]) == (False, True, True)


def test_cluster_ip_without_a_detector_keeps_every_source() -> None:
    assert masquerades(plans(port(LOCAL), node(()))[VIP]) == (False, False, False)


def test_masquerade_all() -> None:
    found = plans(port(LOCAL), node(masquerade_all=True))
    assert masquerades(found[VIP]) == (True, True, True)


def test_external_policy_cluster_masquerades_everybody() -> None:
    assert masquerades(plans(port(LOCAL))[NODE_PORT]) == (True, True, True)


def test_external_policy_local() -> None:
    plan = plans(port(LOCAL, REMOTE, external=TrafficPolicy.LOCAL))[NODE_PORT]
    assert picks(plan, ClientClass.POD) == ["10.244.1.5", "10.244.2.5"]
    assert picks(plan, ClientClass.NODE) == ["10.244.1.5", "10.244.2.5"]
    assert picks(plan, ClientClass.EXTERNAL) == ["10.244.1.5"]
    assert masquerades(plan) == (False, True, False)


def test_external_policy_local_without_local_endpoint_drops_outsiders_only() -> None:
    plan = plans(port(REMOTE, external=TrafficPolicy.LOCAL))[NODE_PORT]
    assert [action.verdict for action in plan.actions] == [
        Verdict.BACKEND,
        Verdict.BACKEND,
        Verdict.DROP,
    ]
    assert is_served(plan)


def test_internal_policy_local() -> None:
    plan = plans(port(LOCAL, REMOTE, internal=TrafficPolicy.LOCAL))[VIP]
    assert picks(plan, ClientClass.POD) == ["10.244.1.5"]
    dropping = plans(port(REMOTE, internal=TrafficPolicy.LOCAL))[VIP]
    assert {action.verdict for action in dropping.actions} == {Verdict.DROP}
    assert not is_served(dropping)


def test_without_endpoints_everything_is_refused() -> None:
    for plan in plans(port()).values():
        assert {action.verdict for action in plan.actions} == {Verdict.REJECT}
        assert not is_served(plan)


def test_a_drained_service_is_not_served() -> None:
    drained = Endpoint(address="10.244.1.5", port=8080, node="n1", weight=0)
    assert not is_served(plans(port(drained))[VIP])


def test_backends_outside_the_pod_network_are_known() -> None:
    host = Endpoint(address="192.0.2.7", port=6443, node="n1")
    backends = plans(port(LOCAL, host))[VIP].candidate_sets[0].backends
    assert [backend.in_pod_network for backend in backends] == [True, False]
    undetected = plans(port(LOCAL, host), node(()))[VIP].candidate_sets[0].backends
    assert [backend.in_pod_network for backend in undetected] == [True, True]


@given(st.permutations(["alpha", "beta", "gamma"]))
def test_two_services_of_one_address_the_first_name_wins(names: list[str]) -> None:
    found = plans_for_node([port(LOCAL, name=name) for name in names], node(), SETTINGS)
    assert {plan.service for plan in found.values()} == {"alpha"}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_is_served_asks_the_verdict(verdict: Verdict) -> None:
    plan = plans(port(LOCAL))[VIP]
    action = Action(verdict=verdict)
    changed = msgspec.structs.replace(plan, actions=(action, action, action))
    assert is_served(changed) == (verdict is Verdict.BACKEND)


def test_masquerade_all_binds_cluster_ips_only() -> None:
    found = plans(port(LOCAL, REMOTE, external=TrafficPolicy.LOCAL), node(masquerade_all=True))
    assert masquerades(found[NODE_PORT]) == (False, True, False)


def test_a_drained_set_is_as_good_as_empty() -> None:
    drained = Endpoint(address="10.244.1.5", port=8080, node="n1", weight=0)
    for plan in plans(port(drained)).values():
        assert {action.verdict for action in plan.actions} == {Verdict.REJECT}
    internal = plans(port(drained, REMOTE, internal=TrafficPolicy.LOCAL))[VIP]
    assert {action.verdict for action in internal.actions} == {Verdict.DROP}
    external = plans(port(drained, REMOTE, external=TrafficPolicy.LOCAL))[NODE_PORT]
    assert external.actions[ClientClass.EXTERNAL].verdict is Verdict.DROP
    assert picks(external, ClientClass.POD) == ["10.244.1.5", "10.244.2.5"]


def test_the_loopback_address_serves_this_node_alone() -> None:
    context = msgspec.structs.replace(node(), localhost_node_ports=True)
    key = FrontendKey(Protocol.TCP, "127.0.0.1", 30080)
    served = plans(port(REMOTE, external=TrafficPolicy.LOCAL), context)[key]
    assert [action.verdict for action in served.actions] == ["drop", "backend", "drop"]
    assert picks(served, ClientClass.NODE) == ["10.244.2.5"]
    assert masquerades(served)[ClientClass.NODE]
    refused = plans(port(), context)[key]
    assert {action.verdict for action in refused.actions} == {Verdict.REJECT}
    assert key not in plans(port(REMOTE))


def test_pod_networks_of_one_family_say_nothing_of_the_other() -> None:
    six = msgspec.structs.replace(
        port(Endpoint(address="2001:db8::5", port=8080)),
        name=ServicePortName("default", "web", "http", Protocol.TCP, Family.IPV6),
        cluster_ip="fd00:10:96::10",
    )
    plan = plans(six)[FrontendKey(Protocol.TCP, "fd00:10:96::10", 80)]
    assert masquerades(plan) == (False, False, False)
    assert plan.candidate_sets[0].backends[0].in_pod_network


def test_where_pods_are_may_be_known_apart_from_who_is_one() -> None:
    host = Endpoint(address="192.0.2.7", port=6443, node="n1")
    context = msgspec.structs.replace(node(()), bridge_interface="cni0", pod_networks=CIDR)
    plan = plans(port(LOCAL, host), context)[VIP]
    assert masquerades(plan) == (False, True, True)
    assert [b.in_pod_network for b in plan.candidate_sets[0].backends] == [True, False]
