"""ClusterState: single changes lead where the whole leads."""

from nfqproxy.control.cluster import ClusterState
from nfqproxy.control.objects import (
    EndpointSlice,
    Node,
    ObjectChange,
    Objects,
    Service,
    ServiceCidr,
    ServicePortSpec,
    SliceEndpoint,
    SlicePort,
    object_key,
)
from nfqproxy.model import Family

WEB = Service(
    namespace="default", name="web", cluster_ips=("10.96.0.80",), ports=(ServicePortSpec(port=80),)
)
SLICE = EndpointSlice(
    namespace="default",
    name="web-1",
    service="web",
    family=Family.IPV4,
    ports=(SlicePort(name="", port=8080),),
    endpoints=(SliceEndpoint(address="10.244.1.11", node="n1"),),
)
N1, N2 = Node(name="n1", pod_cidrs=("10.244.1.0/24",)), Node(name="n2")
CIDR = ServiceCidr(name="kubernetes", cidrs=("10.96.0.0/16",))
ALL = Objects(services=(WEB,), endpoint_slices=(SLICE,), nodes=(N1, N2), service_cidrs=(CIDR,))


def state() -> ClusterState:
    made = ClusterState("n1")
    diff = made.replace(ALL)
    assert diff.surroundings
    assert len(diff.ports.added) == 1
    return made


def test_the_same_again_is_no_change() -> None:
    found = state().replace(ALL)
    assert not found.surroundings
    assert not found.ports


def test_surroundings_are_told_apart_from_services() -> None:
    found = state()
    other = ServiceCidr(name="kubernetes", cidrs=("10.97.0.0/16",))
    diff = found.apply(ObjectChange(upserts=(other,)))
    assert diff.surroundings
    assert not diff.ports
    assert found.surroundings == Objects(nodes=(N1, N2), service_cidrs=(other,))
    diff = found.apply(ObjectChange(removes=(object_key(N2), object_key(other))))
    assert diff.surroundings
    assert found.surroundings == Objects(nodes=(N1,))
    assert not found.apply(ObjectChange(removes=(object_key(N2),))).surroundings


def test_an_object_that_the_whole_no_longer_holds_goes() -> None:
    found = state()
    diff = found.replace(Objects(services=(WEB,), nodes=(N1,)))
    assert diff.surroundings
    assert len(diff.ports.changed) == 1
    assert [port.endpoints for port in found.ports.values()] == [()]
    diff = found.apply(ObjectChange(removes=(object_key(WEB),)))
    assert len(diff.ports.removed) == 1
    assert not found.ports
    assert not diff.surroundings
