import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfqproxy.control.objects import (
    EndpointSlice,
    Objects,
    Service,
    ServicePortSpec,
    SliceEndpoint,
    SlicePort,
)
from nfqproxy.control.table import (
    ServiceTable,
    diff,
    is_externally_accessible,
    service_ports,
    uses_cluster_endpoints,
    uses_local_endpoints,
)
from nfqproxy.model import Family, Protocol, ServicePort, ServicePortName, TrafficPolicy

HTTP = ServicePortName("default", "web", "http", Protocol.TCP, Family.IPV4)
HTTP6 = ServicePortName("default", "web", "http", Protocol.TCP, Family.IPV6)


def service(**changes):
    values = {
        "namespace": "default",
        "name": "web",
        "cluster_ips": ("10.96.0.10",),
        "ports": (ServicePortSpec(name="http", port=80),),
    }
    return Service(**(values | changes))


def slice_(*endpoints, **changes):
    values = {
        "namespace": "default",
        "name": "web-a",
        "service": "web",
        "family": Family.IPV4,
        "ports": (SlicePort(name="http", port=8080),),
        "endpoints": endpoints,
    }
    return EndpointSlice(**(values | changes))


def at(address, **changes):
    return SliceEndpoint(address=address, **changes)


def table(*items):
    return service_ports(
        Objects(
            services=tuple(item for item in items if isinstance(item, Service)),
            endpoint_slices=tuple(item for item in items if isinstance(item, EndpointSlice)),
        ),
        node_name="n1",
    )


def addresses(port):
    return [f"{endpoint.address}:{endpoint.port}" for endpoint in port.endpoints]


# 2.1: which Services exist


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "ExternalName"},
        {"cluster_ips": ()},
        {"labels": {"service.kubernetes.io/service-proxy-name": ""}},
        {"labels": {"service.kubernetes.io/headless": "anything"}},
        {"ports": ()},
    ],
)
def test_a_service_that_the_proxy_skips(changes):
    assert table(service(**changes), slice_(at("10.244.1.10"))) == {}


def test_a_service_exists_only_in_the_families_of_its_cluster_ips():
    single = table(service(ports=(ServicePortSpec(name="http", port=80, node_port=30080),)))
    assert list(single) == [HTTP]
    dual = table(service(cluster_ips=("fd00:10:96::70", "10.96.0.10")))
    assert list(dual) == [HTTP, HTTP6]
    assert dual[HTTP6].cluster_ip == "fd00:10:96::70"


def test_addresses_and_ranges_are_divided_by_family():
    ports = table(
        service(
            cluster_ips=("10.96.0.10", "fd00:10:96::70"),
            external_ips=("203.0.113.9", "2001:db8::9"),
            load_balancer_ips=("198.51.100.7", "2001:db8::7"),
            load_balancer_source_ranges=("10.0.0.0/8", "2001:db8::/32"),
        )
    )
    assert ports[HTTP].external_ips == ("203.0.113.9",)
    assert ports[HTTP].load_balancer_ips == ("198.51.100.7",)
    assert ports[HTTP].load_balancer_source_ranges == ("10.0.0.0/8",)
    assert ports[HTTP6].external_ips == ("2001:db8::9",)
    assert ports[HTTP6].load_balancer_ips == ("2001:db8::7",)
    assert ports[HTTP6].load_balancer_source_ranges == ("2001:db8::/32",)


@pytest.mark.parametrize(
    ("kind", "policy", "expected"),
    [
        ("LoadBalancer", TrafficPolicy.LOCAL, 30999),
        ("LoadBalancer", TrafficPolicy.CLUSTER, 0),
        ("NodePort", TrafficPolicy.LOCAL, 0),
    ],
)
def test_the_health_port_is_kept_for_load_balancers_with_local_policy(kind, policy, expected):
    ports = table(service(type=kind, external_policy=policy, health_check_node_port=30999))
    assert ports[HTTP].health_check_node_port == expected


@pytest.mark.parametrize(
    ("internal", "external", "node_port", "accessible", "cluster", "local"),
    [
        ("Cluster", "Cluster", 0, False, True, False),
        ("Cluster", "Local", 0, False, True, False),
        ("Cluster", "Local", 30080, True, True, True),
        ("Local", "Cluster", 0, False, False, True),
        ("Local", "Cluster", 30080, True, True, True),
    ],
)
def test_which_sets_a_port_uses(internal, external, node_port, accessible, cluster, local):
    port = ServicePort(
        name=HTTP,
        cluster_ip="10.96.0.10",
        port=80,
        node_port=node_port,
        internal_policy=TrafficPolicy(internal),
        external_policy=TrafficPolicy(external),
    )
    assert is_externally_accessible(port) is accessible
    assert uses_cluster_endpoints(port) is cluster
    assert uses_local_endpoints(port) is local


def test_steering_and_balancer_come_from_annotations():
    ports = table(
        service(
            labels={"nfqproxy.io/steer": "true"}, annotations={"nfqproxy.io/balancer": "maglev"}
        )
    )
    assert (ports[HTTP].steered, ports[HTTP].balancer) == (True, "maglev")


# 2.2: which endpoints exist


def test_slices_of_the_other_family_of_other_services_and_excluded_ones_are_ignored():
    ports = table(
        service(),
        slice_(at("10.244.1.10")),
        slice_(at("fd00::1"), name="web-6", family=Family.IPV6),
        slice_(at("10.244.1.11"), name="b", service="other"),
        slice_(at("10.244.1.12"), name="c", namespace="elsewhere"),
        slice_(at("10.244.1.13"), name="d", labels={"service.kubernetes.io/headless": ""}),
    )
    assert addresses(ports[HTTP]) == ["10.244.1.10:8080"]


def test_ports_join_by_name_and_protocol():
    ports = table(
        service(
            ports=(
                ServicePortSpec(name="dns", port=53, protocol=Protocol.UDP),
                ServicePortSpec(name="dns-tcp", port=53),
            )
        ),
        slice_(
            at("10.244.1.53"),
            ports=(
                SlicePort(name="dns", port=5353, protocol=Protocol.UDP),
                SlicePort(name="dns-tcp", port=5354),
                SlicePort(name="dns", port=5355),  # TCP: no Service port of this name and protocol
            ),
        ),
    )
    by_name = {name.port_name: addresses(port) for name, port in ports.items()}
    assert by_name == {"dns": ["10.244.1.53:5353"], "dns-tcp": ["10.244.1.53:5354"]}


def test_endpoints_are_sorted_by_text():
    endpoints = [at(f"10.244.1.{last}") for last in (9, 10, 100)]
    assert addresses(table(service(), slice_(*endpoints))[HTTP]) == [
        "10.244.1.100:8080",
        "10.244.1.10:8080",
        "10.244.1.9:8080",
    ]


def test_of_two_equal_endpoints_the_local_one_wins_else_the_first_by_slice_name():
    local_in_b = table(
        service(),
        slice_(at("10.244.1.10", node="n2"), name="a"),
        slice_(at("10.244.1.10", node="n1"), name="b"),
    )
    assert [endpoint.node for endpoint in local_in_b[HTTP].endpoints] == ["n1"]
    local_in_a = table(
        service(),
        slice_(at("10.244.1.10", node="n1"), name="a"),
        slice_(at("10.244.1.10", node="n2"), name="b"),
    )
    assert [endpoint.node for endpoint in local_in_a[HTTP].endpoints] == ["n1"]
    none_local = table(
        service(),
        slice_(at("10.244.1.10", node="n3"), name="b"),
        slice_(at("10.244.1.10", node="n2"), name="a"),
    )
    assert [endpoint.node for endpoint in none_local[HTTP].endpoints] == ["n2"]


def test_the_same_address_with_two_ports_is_two_endpoints():
    ports = table(
        service(),
        slice_(at("10.244.1.10"), name="a"),
        slice_(at("10.244.1.10"), name="b", ports=(SlicePort(name="http", port=9090),)),
    )
    assert addresses(ports[HTTP]) == ["10.244.1.10:8080", "10.244.1.10:9090"]


def test_weights_are_taken_from_the_nearest_name():
    weights = {"10.244.1.1": 7, "pod-2": 6, "n3": 5, "zone:z4": 4}
    full = {"target_name": "pod-2", "node": "n3", "zone": "z4"}
    ports = table(
        service(weights=weights),
        slice_(
            at("10.244.1.1", **full),
            at("10.244.1.2", **full),
            at("10.244.1.3", node="n3", zone="z4"),
            at("10.244.1.4", zone="z4"),
            at("10.244.1.5", zone="z5"),
            weight=3,
        ),
        slice_(at("10.244.1.6"), name="web-b"),
    )
    found = {endpoint.address: endpoint.weight for endpoint in ports[HTTP].endpoints}
    assert found == {
        "10.244.1.1": 7,
        "10.244.1.2": 6,
        "10.244.1.3": 5,
        "10.244.1.4": 4,
        "10.244.1.5": 3,
        "10.244.1.6": 1,
    }


def test_a_weight_of_zero_is_kept():
    ports = table(service(weights={"n1": 0}), slice_(at("10.244.1.1", node="n1"), weight=5))
    assert [endpoint.weight for endpoint in ports[HTTP].endpoints] == [0]


# Changes

names = st.sampled_from(["web", "shop", "dns"])
nodes = st.sampled_from(["n1", "n2", None])
specs = st.builds(
    ServicePortSpec,
    name=st.sampled_from(["http", "dns"]),
    port=st.integers(1, 3),
    protocol=st.sampled_from(Protocol),
)
services = st.builds(
    Service,
    namespace=st.sampled_from(["default", "kube-system"]),
    name=names,
    cluster_ips=st.sampled_from([(), ("10.96.0.1",), ("10.96.0.1", "fd00::1")]),
    ports=st.lists(specs, max_size=2, unique_by=lambda spec: spec.name).map(tuple),
    weights=st.dictionaries(st.sampled_from(["n1", "10.0.0.1"]), st.integers(0, 3), max_size=2),
)
slices = st.builds(
    EndpointSlice,
    namespace=st.sampled_from(["default", "kube-system"]),
    name=st.sampled_from(["a", "b", "c", "d"]),
    service=names,
    family=st.just(Family.IPV4),
    ports=st.lists(
        st.builds(
            SlicePort,
            name=st.sampled_from(["http", "dns"]),
            port=st.integers(1, 2),
            protocol=st.sampled_from(Protocol),
        ),
        max_size=3,
    ).map(tuple),
    endpoints=st.lists(
        st.builds(
            SliceEndpoint,
            address=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.10"]),
            node=nodes,
            ready=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    weight=st.sampled_from([None, 0, 4]),
)
states = st.builds(
    Objects,
    services=st.lists(services, max_size=4, unique_by=lambda s: (s.namespace, s.name)).map(tuple),
    endpoint_slices=st.lists(slices, max_size=5, unique_by=lambda s: (s.namespace, s.name)).map(
        tuple
    ),
)


@given(states, st.randoms(use_true_random=False))
def test_the_order_of_the_objects_does_not_matter(objects, chance):
    def shuffled(values):
        return tuple(chance.sample(values, len(values)))

    again = Objects(
        services=shuffled(objects.services), endpoint_slices=shuffled(objects.endpoint_slices)
    )
    first, second = (service_ports(state, node_name="n1") for state in (objects, again))
    assert list(first.items()) == list(second.items())


@settings(max_examples=200)
@given(st.lists(states, min_size=1, max_size=4))
def test_a_table_kept_through_changes_equals_one_made_from_nothing(history):
    kept = ServiceTable("n1")
    before = {}
    for objects in history:
        found = kept.replace(objects)
        now = service_ports(objects, node_name="n1")
        assert dict(kept.ports) == now
        assert found == diff(before, now)
        before = now


@given(states, st.lists(st.one_of(services, slices), max_size=5))
def test_single_objects_do_the_same_as_a_replacement(objects, later):
    kept = ServiceTable("n1")
    kept.replace(objects)
    all_services = {(s.namespace, s.name): s for s in objects.services}
    all_slices = {(s.namespace, s.name): s for s in objects.endpoint_slices}
    for item in later:
        if isinstance(item, Service):
            all_services[item.namespace, item.name] = item
            kept.apply(services=[item])
        else:
            all_slices[item.namespace, item.name] = item
            kept.apply(endpoint_slices=[item])
    end = Objects(services=tuple(all_services.values()), endpoint_slices=tuple(all_slices.values()))
    assert dict(kept.ports) == service_ports(end, node_name="n1")
    kept.apply(removed_services=list(all_services), removed_endpoint_slices=list(all_slices))
    assert dict(kept.ports) == {}


def test_the_difference_names_what_was_added_changed_and_removed():
    old = table(service(), slice_(at("10.244.1.10")))
    new = table(service(cluster_ips=("10.96.0.10", "fd00::1")), slice_(at("10.244.1.11")))
    assert diff(old, new) == msgspec.structs.replace(diff({}, {}), added=(HTTP6,), changed=(HTTP,))
    assert diff(new, old).removed == (HTTP6,)
    assert not diff(old, old)


def test_one_changed_slice_touches_one_service_of_many():
    count = 200
    chance = random.Random(1)
    objects = Objects(
        services=tuple(service(name=f"s{n}", cluster_ips=(f"10.96.1.{n}",)) for n in range(count)),
        endpoint_slices=tuple(
            slice_(at(f"10.244.1.{n}"), name=f"s{n}-a", service=f"s{n}") for n in range(count)
        ),
    )
    kept = ServiceTable("n1")
    assert len(kept.replace(objects).added) == count
    untouched = dict(kept.ports)
    chosen = chance.randrange(count)
    found = kept.apply(
        endpoint_slices=[slice_(at("10.244.9.9"), name=f"s{chosen}-a", service=f"s{chosen}")]
    )
    assert [name.service for name in found.changed] == [f"s{chosen}"]
    assert not found.added
    assert not found.removed
    same = [name for name, port in kept.ports.items() if untouched[name] is port]
    assert len(same) == count - 1
