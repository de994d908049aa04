import pytest

from nfqproxy.control.node import (
    Detector,
    NodeSettings,
    NonPodBackends,
    detector_gap,
    node_context,
    node_facts,
)
from nfqproxy.control.objects import Node, Objects, ServiceCidr
from nfqproxy.model import NodeContext

N1 = Node(
    name="n1",
    labels={"topology.kubernetes.io/zone": "z1"},
    pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64"),
    internal_ips=("192.0.2.1", "192.0.2.2", "2001:db8:2::1"),
    external_ips=("203.0.113.1",),
)
N2 = Node(name="n2", pod_cidrs=("10.244.2.0/24",), internal_ips=("192.0.2.12",))
CLUSTER = ("10.244.0.0/16",)


def test_the_facts_of_a_node():
    facts = node_facts(Objects(nodes=(Node(name="n2"), N1)), "n1", ["192.0.2.99", "192.0.2.1"])
    assert facts.exists
    assert facts.zone == "z1"
    assert facts.primary_addresses == ("192.0.2.1", "2001:db8:2::1")
    assert facts.addresses == (
        "192.0.2.1",
        "192.0.2.2",
        "2001:db8:2::1",
        "203.0.113.1",
        "192.0.2.99",
    )
    assert facts.pod_cidrs == ("10.244.1.0/24", "fd00:10:244:1::/64")
    assert facts.eligible


def context(objects: Objects | None = None, **settings: object) -> NodeContext:
    given = {"node_name": "n1", "cluster_cidrs": CLUSTER, **settings}
    return node_context(
        Objects(nodes=(N1, N2)) if objects is None else objects,
        NodeSettings(**given),
        interface_addresses=["127.0.0.1", "192.0.2.1", "10.1.0.1", "::1", "fd00:1::1"],
        outward_addresses=["10.1.0.1"],
    )


def test_the_context_of_a_node():
    found = context(masquerade_all=True)
    assert (found.node_name, found.zone, found.masquerade_all) == ("n1", "z1", True)
    assert found.node_port_addresses == ("192.0.2.1", "2001:db8:2::1")
    assert found.cluster_cidrs == found.pod_networks == CLUSTER
    assert found.has_detector
    assert found.service_cidrs == ()


def test_service_cidrs_are_collected_once():
    cidrs = (
        ServiceCidr(name="a", cidrs=("10.96.0.0/16",)),
        ServiceCidr(name="b", cidrs=("10.96.0.0/16", "fd00:10:96::/112")),
    )
    assert context(Objects(service_cidrs=cidrs)).service_cidrs == (
        "10.96.0.0/16",
        "fd00:10:96::/112",
    )


def test_the_outward_address_is_primary_where_nothing_else_is_known():
    found = context(Objects())
    assert found.primary_addresses == found.node_port_addresses == ("10.1.0.1",)


@pytest.mark.parametrize(
    ("detector", "cidrs", "bridge", "prefix"),
    [
        (Detector.CLUSTER_CIDR, CLUSTER, "", ""),
        (Detector.NODE_CIDR, N1.pod_cidrs, "", ""),
        (Detector.BRIDGE_INTERFACE, (), "cni0", ""),
        (Detector.INTERFACE_NAME_PREFIX, (), "", "veth"),
    ],
)
def test_detectors(detector, cidrs, bridge, prefix):
    found = context(detector=detector, bridge_interface="cni0", interface_name_prefix="veth")
    assert (found.cluster_cidrs, found.bridge_interface, found.interface_name_prefix) == (
        cidrs,
        bridge,
        prefix,
    )
    assert found.has_detector
    # Where pods are is known by clusterCIDR, whatever tells who is one.
    assert found.pod_networks == CLUSTER


def test_node_cidr_without_a_pod_cidr_is_told():
    settings = NodeSettings(node_name="n3", detector=Detector.NODE_CIDR)
    found = node_context(Objects(nodes=(N1,)), settings)
    assert not found.has_detector
    assert "Node n3 is not there or has no podCIDR" in str(detector_gap(found, settings))
    assert detector_gap(context(), NodeSettings(node_name="n1")) is None


@pytest.mark.parametrize(
    ("choice", "clusters", "networks", "masquerades"),
    [
        (NonPodBackends.AUTO, CLUSTER, CLUSTER, True),
        (NonPodBackends.AUTO, (), (), False),
        (NonPodBackends.NEVER, CLUSTER, CLUSTER, False),
        (NonPodBackends.ALWAYS, CLUSTER, CLUSTER, True),
        (
            NonPodBackends.ALWAYS,
            (),
            ("10.244.1.0/24", "10.244.2.0/24", "fd00:10:244:1::/64"),
            True,
        ),
    ],
)
def test_non_pod_backends(choice, clusters, networks, masquerades):
    found = context(non_pod_backends=choice, cluster_cidrs=clusters)
    assert (found.pod_networks, found.masquerade_non_pod_backends) == (networks, masquerades)


@pytest.mark.parametrize(
    ("networks", "addresses", "loopback"),
    [
        (None, ("192.0.2.1", "2001:db8:2::1"), True),
        (("192.0.2.0/24", "::/0"), ("192.0.2.1", "192.0.2.2", "2001:db8:2::1", "fd00:1::1"), False),
        # No IPv6 network: all IPv6 addresses.
        (("10.1.0.0/16",), ("2001:db8:2::1", "10.1.0.1", "fd00:1::1"), False),
        (("127.0.0.0/8", "fd00::/8"), ("fd00:1::1",), True),
        (
            ("0.0.0.0/0", "fd00::/8"),
            ("192.0.2.1", "192.0.2.2", "203.0.113.1", "10.1.0.1", "fd00:1::1"),
            True,
        ),
    ],
)
def test_node_port_addresses(networks, addresses, loopback):
    found = context(node_port_networks=networks, localhost_node_ports=True)
    assert found.node_port_addresses == addresses
    assert found.localhost_node_ports == loopback
    assert not context(node_port_networks=networks).localhost_node_ports


def test_without_a_node_object_the_extra_addresses_are_all_there_is():
    facts = node_facts(Objects(), "n1", ["FD00::1", "010.0.0.1"])
    assert not facts.exists
    assert facts.primary_addresses == ("10.0.0.1", "fd00::1")
    assert facts.zone is None


def test_an_external_address_is_primary_where_there_is_no_internal_one():
    facts = node_facts(Objects(nodes=(Node(name="n1", external_ips=("203.0.113.1",)),)), "n1")
    assert facts.primary_addresses == ("203.0.113.1",)


@pytest.mark.parametrize(
    "changes", [{"deleting": True}, {"taints": ("ToBeDeletedByClusterAutoscaler",)}]
)
def test_a_node_on_its_way_out_is_not_eligible(changes):
    assert not node_facts(Objects(nodes=(Node(name="n1", **changes),)), "n1").eligible


def test_a_bad_extra_address_is_named():
    with pytest.raises(ValueError, match=r'"n1\.local" is not an IP address'):
        node_facts(Objects(), "n1", ["n1.local"])
