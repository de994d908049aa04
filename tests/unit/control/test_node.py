import pytest

from nfqproxy.control.node import node_context, node_facts
from nfqproxy.control.objects import Node, Objects

N1 = Node(
    name="n1",
    labels={"topology.kubernetes.io/zone": "z1"},
    pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64"),
    internal_ips=("192.0.2.1", "192.0.2.2", "2001:db8:2::1"),
    external_ips=("203.0.113.1",),
)


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
    context = node_context(facts, cluster_cidrs=["10.244.0.0/16"], masquerade_all=True)
    assert (context.node_name, context.zone, context.masquerade_all) == ("n1", "z1", True)
    assert context.node_port_addresses == ("192.0.2.1", "2001:db8:2::1")
    assert context.cluster_cidrs == ("10.244.0.0/16",)


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
