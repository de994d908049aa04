"""The plans mean what an independent reading of the contract says, for any objects, node and packet."""

from itertools import product
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.control.node import Detector, NodeSettings, NonPodBackends, node_context
from nfqproxy.control.objects import (
    EndpointSlice,
    Node,
    Objects,
    Service,
    ServiceCidr,
    ServicePortSpec,
    SliceEndpoint,
    SlicePort,
)
from nfqproxy.control.table import ServiceTable, service_ports
from nfqproxy.core.explain import Explainer, Packet
from nfqproxy.core.plan_table import PlanTable, plans_for_node
from nfqproxy.core.plans import Planner, is_served, steered_ports
from nfqproxy.model import Family, Protocol, TrafficPolicy
from tests.unit.core.semantics import World

# The deep profile takes minutes.
pytestmark = pytest.mark.timeout(3600)

CLUSTER_IPS = ("10.96.0.10", "10.96.0.11", "fd00:10:96::10", "fd00:10:96::11")
OUTER_IPS = ("203.0.113.9", "198.51.100.7", "2001:db8:9::9", "192.0.2.1", "10.96.0.10")
POD_IPS = (
    "10.244.1.5",
    "10.244.1.6",
    "10.244.2.5",
    "192.0.2.7",
    "192.0.2.1",
    "fd00:10:244:1::5",
    "fd00:10:244:2::5",
    "2001:db8:2::7",
)
SOURCES = (
    ("10.244.1.5", None),
    ("10.244.1.9", "cni0"),
    ("10.244.2.5", "eth0"),
    ("192.0.2.1", None),
    ("192.0.2.1", "eth0"),
    ("192.0.2.50", None),
    ("198.51.100.7", None),
    ("127.0.0.1", None),
    ("fd00:10:244:1::5", "veth12"),
    ("fd00:10:244:2::5", None),
    ("2001:db8:2::1", None),
    ("2001:db8:2::50", "cni0"),
)
DESTINATIONS = (*CLUSTER_IPS, *OUTER_IPS[:3], "192.0.2.1", "192.0.2.2", "127.0.0.1", "10.96.7.7")
DESTINATIONS += ("2001:db8:2::1", "8.8.8.8")
PORTS = (
    (Protocol.TCP, 80),
    (Protocol.UDP, 80),
    (Protocol.TCP, 30080),
    (Protocol.TCP, 81),
    (None, 0),
)
CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")
RANGES = ("192.0.2.0/24", "10.0.0.0/8", "2001:db8::/32", "198.18.0.0/15")
ZONES, NODE_NAMES = ("z1", "z2"), ("n1", "n2")


def family_of(address: str) -> Family:
    return Family.IPV6 if ":" in address else Family.IPV4


policies = st.sampled_from(list(TrafficPolicy))


def subset(values, *, max_size=3):
    return st.lists(st.sampled_from(values), unique=True, max_size=max_size).map(tuple)


@st.composite
def endpoints(draw, family):
    ready, terminating = draw(st.sampled_from((True, True, False))), draw(st.booleans())
    return SliceEndpoint(
        address=draw(st.sampled_from([ip for ip in POD_IPS if family_of(ip) is family])),
        ready=ready,
        serving=ready or draw(st.booleans()),
        terminating=terminating,
        node=draw(st.sampled_from((*NODE_NAMES, None))),
        zone_hints=draw(st.sampled_from(((), ("z1",), ("z2",), ZONES))),
        node_hints=draw(st.sampled_from(((), (), (), ("n1",), ("n2",)))),
    )


@st.composite
def slices(draw, name):
    family = draw(st.sampled_from(Family))
    return EndpointSlice(
        namespace="default",
        name=name,
        service=draw(st.sampled_from(("a", "b"))),
        family=family,
        ports=tuple(
            SlicePort(name=port, protocol=protocol, port=number)
            for port, protocol, number in draw(
                st.sampled_from(
                    (
                        (("http", Protocol.TCP, 8080),),
                        (("http", Protocol.TCP, 8080), ("dns", Protocol.UDP, 53)),
                        (("dns", Protocol.UDP, 53),),
                        (("http", Protocol.TCP, 8080), ("http", Protocol.TCP, 8081)),
                    )
                )
            )
        ),
        endpoints=tuple(draw(st.lists(endpoints(family), min_size=1, max_size=4))),
        weight=draw(st.sampled_from((None, None, None, 0, 2))),
    )


@st.composite
def services(draw, name):
    cluster_ips = draw(
        st.sampled_from(
            (CLUSTER_IPS[:1], CLUSTER_IPS[2:3], (CLUSTER_IPS[0], CLUSTER_IPS[2]))
            if name == "a"
            else (CLUSTER_IPS[1:2], CLUSTER_IPS[3:], (CLUSTER_IPS[1], CLUSTER_IPS[3]), ())
        )
    )
    node_port = draw(st.sampled_from((0, 30080)))
    return Service(
        namespace="default",
        name=name,
        cluster_ips=cluster_ips,
        ports=draw(
            st.sampled_from(
                (
                    (ServicePortSpec(name="http", port=80, node_port=node_port),),
                    (
                        ServicePortSpec(name="http", port=80, node_port=node_port),
                        ServicePortSpec(name="dns", protocol=Protocol.UDP, port=80),
                    ),
                )
            )
        ),
        external_ips=draw(subset(OUTER_IPS)),
        load_balancer_ips=draw(subset(OUTER_IPS)),
        load_balancer_source_ranges=draw(subset(RANGES)),
        internal_policy=draw(policies),
        external_policy=draw(policies),
        labels=draw(
            st.sampled_from(({}, {}, {}, {"service.kubernetes.io/service-proxy-name": "other"}))
        ),
        weights=draw(st.sampled_from(({}, {}, {"10.244.1.5": 0, "10.244.2.5": 5}))),
    )


NODES = (
    Node(
        name="n1",
        labels={"topology.kubernetes.io/zone": "z1"},
        pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64"),
        internal_ips=("192.0.2.1", "2001:db8:2::1"),
        external_ips=("192.0.2.2",),
    ),
    Node(name="n2", pod_cidrs=("10.244.2.0/24",), internal_ips=("192.0.2.12",)),
)


@st.composite
def worlds(draw):
    objects = Objects(
        services=(draw(services("a")), draw(services("b"))),
        endpoint_slices=tuple(draw(slices(f"slice-{n}")) for n in range(draw(st.integers(2, 6)))),
        nodes=draw(st.sampled_from((NODES, NODES, NODES[1:]))),
        service_cidrs=draw(
            st.sampled_from(((), (ServiceCidr(name="c", cidrs=("10.96.0.0/16",)),)))
        ),
    )
    settings = NodeSettings(
        node_name="n1",
        addresses=draw(st.sampled_from(((), ("198.51.100.7",)))),
        detector=draw(st.sampled_from(Detector)),
        cluster_cidrs=draw(st.sampled_from(((), CIDRS, CIDRS[:1]))),
        bridge_interface="cni0",
        interface_name_prefix="veth",
        node_port_networks=draw(
            st.sampled_from((None, None, ("192.0.2.2/32",), ("2001:db8::/32",), ("127.0.0.0/8",)))
        ),
        localhost_node_ports=draw(st.booleans()),
        masquerade_all=draw(st.sampled_from((False, False, True))),
        non_pod_backends=draw(st.sampled_from(NonPodBackends)),
    )
    return objects, settings


def packets(found: Explainer, chance: Random) -> list[Packet]:
    """Mostly for addresses that are frontends, some for any address."""
    chosen = chance.sample(PACKETS, 15)
    for key in found.plans:
        for source, interface in chance.sample(SOURCES, 8):
            if family_of(source) is key.family:
                chosen.append(
                    Packet(
                        source=source,
                        interface=interface,
                        destination=key.address,
                        protocol=key.protocol,
                        port=key.port,
                    )
                )
    return chosen


def explainer(objects: Objects, settings: NodeSettings) -> Explainer:
    node = node_context(objects, settings)
    ports = service_ports(objects, node_name=settings.node_name).values()
    return Explainer(
        node=node, settings=settings, ports=ports, plans=plans_for_node(ports, node, settings)
    )


PACKETS = [
    Packet(source=source, interface=interface, destination=to, protocol=protocol, port=number)
    for (source, interface), to, (protocol, number) in product(SOURCES, DESTINATIONS, PORTS)
    if family_of(source) is family_of(to)
]


@given(worlds(), st.integers(0, 2**32))
def test_explain_equals_the_independent_reading(world, seed):
    objects, settings = world
    reference = World(objects, settings)
    found = explainer(objects, settings)
    for packet in packets(found, Random(seed)):
        expected = reference.outcome(packet)
        answer = found.explain(packet)
        frontend = answer.frontend and (
            answer.frontend.kind.value,
            answer.frontend.namespace,
            answer.frontend.service,
            answer.frontend.port_name,
        )
        assert (answer.verdict.value, answer.client, frontend) == (
            expected.verdict,
            expected.client,
            expected.frontend,
        ), packet
        assert {
            (b.address, b.port): (b.weight, b.masquerade) for b in answer.backends
        } == expected.backends, packet
        total = sum(weight for weight, _ in expected.backends.values())
        for backend in answer.backends:
            assert backend.probability == pytest.approx(backend.weight / total)


@given(worlds(), worlds(), st.randoms(use_true_random=False))
def test_any_order_of_the_same_events_gives_the_same_plans(before, after, chance):
    """The table is led from one state to another, object by object, in some order."""
    objects, settings = after
    table = ServiceTable(settings.node_name)
    table.replace(before[0])
    events = [("services", item) for item in objects.services]
    events += [("endpoint_slices", item) for item in objects.endpoint_slices]
    names = {item.name for item in objects.endpoint_slices}
    events += [
        ("removed_endpoint_slices", (item.namespace, item.name))
        for item in before[0].endpoint_slices
        if item.name not in names
    ]
    chance.shuffle(events)
    for kind, item in events:
        table.apply(**{kind: [item]})
    node = node_context(objects, settings)
    ports = list(table.ports.values())
    chance.shuffle(ports)
    from_nothing = service_ports(objects, node_name=settings.node_name).values()
    plans = plans_for_node(ports, node, settings)
    assert plans == plans_for_node(from_nothing, node, settings)


def made_at_once(ports, node, settings):
    """The plans as a whole: kinds in the order they match (2.5), Services by name, the first wins."""
    every = [
        (rank, port.name, plan)
        for port in steered_ports(ports, settings)
        for rank, plan in Planner(node).plans_of(port)
    ]
    plans = {}
    for _, _, plan in sorted(every, key=lambda item: item[:2]):
        plans.setdefault(plan.key, plan)
    return {key: plan for key, plan in plans.items() if is_served(plan) or not settings.is_overlay}


@given(worlds(), worlds(), st.sampled_from((False, True)), st.randoms(use_true_random=False))
def test_plans_kept_by_difference_are_those_made_from_nothing(before, after, is_overlay, chance):
    """Object by object; each change names exactly what differs from the plans before it."""
    objects, settings = after
    settings = msgspec.structs.replace(settings, is_overlay=is_overlay, steer_all=is_overlay)
    node = node_context(objects, settings)
    services = ServiceTable(settings.node_name)
    services.replace(before[0])
    table = PlanTable(settings)
    assert table.replace(services.ports.values(), node).upserts == table.plans
    events = [("services", item) for item in objects.services]
    events += [("endpoint_slices", item) for item in objects.endpoint_slices]
    events += [("removed_services", (item.namespace, item.name)) for item in objects.services]
    chance.shuffle(events)
    for kind, item in events:
        old = dict(table.plans)
        diff = services.apply(**{kind: [item]})
        touched = (*diff.added, *diff.changed)
        change = table.apply([services.ports[name] for name in touched], diff.removed)
        assert table.plans == made_at_once(services.ports.values(), node, settings)
        assert change.upserts == {
            key: plan for key, plan in table.plans.items() if old.get(key) != plan
        }
        assert set(change.removes) == old.keys() - table.plans.keys()
        assert len(change.keys) == len(set(change.keys))
    elsewhere = msgspec.structs.replace(node, zone="z2", node_port_addresses=("192.0.2.77",))
    table.replace(services.ports.values(), elsewhere)
    assert table.plans == made_at_once(services.ports.values(), elsewhere, settings)


@given(worlds())
def test_overlay_acts_on_steered_and_served_frontends_only(world):
    objects, _settings = world
    overlay = NodeSettings(node_name="n1", is_overlay=True, cluster_cidrs=CIDRS)
    node = node_context(objects, overlay)
    ports = list(service_ports(objects, node_name="n1").values())
    assert plans_for_node(ports, node, overlay) == {}
    all_of_them = NodeSettings(node_name="n1", is_overlay=True, steer_all=True, cluster_cidrs=CIDRS)
    replace = NodeSettings(node_name="n1", cluster_cidrs=CIDRS)
    steered = plans_for_node(ports, node, all_of_them)
    whole = plans_for_node(ports, node, replace)
    assert steered.items() <= whole.items()
    for key, plan in whole.items():
        serves = any(action.verdict == "backend" for action in plan.actions)
        assert (key in steered) == serves
