import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfqproxy.control.topology import candidate_sets
from nfqproxy.model import Endpoint, Family, Protocol, ServicePort, ServicePortName

E1, E2 = "10.244.1.5", "10.244.2.5"


def endpoint(address=E1, **changes):
    values = {"address": address, "port": 80, "node": "n1" if address == E1 else "n2"}
    return Endpoint(**(values | changes))


def port(*endpoints):
    return ServicePort(
        name=ServicePortName("default", "s", "http", Protocol.TCP, Family.IPV4),
        cluster_ip="10.96.0.10",
        port=80,
        endpoints=endpoints,
    )


def sets(*endpoints, zone="z1"):
    found = candidate_sets(port(*endpoints), "n1", zone)
    return (
        [e.address for e in found.cluster],
        [e.address for e in found.local],
        found.has_any,
    )


DRAINING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}
UNREADY = {"ready": False, "serving": False, "terminating": False}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The numbers are those of the worked vectors in SEMANTICS 2.14.
        pytest.param({}, {}, ([E1, E2], [E1], True), id="1-and-6"),
        pytest.param(UNREADY, {}, ([E2], [], True), id="7"),
        pytest.param(DRAINING, {}, ([E2], [E1], True), id="8-and-10"),
        pytest.param(UNREADY, UNREADY, ([], [], False), id="9"),
        pytest.param(DRAINING, DRAINING, ([E1, E2], [E1], True), id="11"),
        pytest.param(GONE, GONE, ([], [], False), id="12"),
        pytest.param({"zone_hints": ("z1",)}, {"zone_hints": ("z2",)}, ([E1], [E1], True), id="35"),
        pytest.param(
            DRAINING | {"zone_hints": ("z1",)}, {"zone_hints": ("z2",)}, ([E2], [E1], True), id="36"
        ),
        pytest.param({"zone_hints": ("z2",)}, {"zone_hints": ("z1",)}, ([E2], [E1], True), id="37"),
        pytest.param({"zone_hints": ("z1",)}, {}, ([E1, E2], [E1], True), id="one-without-hints"),
        pytest.param(
            {"node_hints": ("n2",), "zone_hints": ("z1",)},
            {"node_hints": ("n1",), "zone_hints": ("z2",)},
            ([E2], [E1], True),
            id="node-hints-before-zone-hints",
        ),
        pytest.param(
            {"node_hints": ("n2",), "zone_hints": ("z1",)},
            {"node_hints": ("n3",), "zone_hints": ("z2",)},
            ([E1], [E1], True),
            id="node-hints-without-match-leave-zone-hints",
        ),
    ],
)
def test_worked_vectors(first, second, expected):
    assert sets(endpoint(E1, **first), endpoint(E2, **second)) == expected


def test_a_node_without_zone_does_not_filter_by_zone():
    hinted = [endpoint(E1, zone_hints=("z1",)), endpoint(E2, zone_hints=("",))]
    assert sets(*hinted, zone=None)[0] == [E1, E2]
    assert sets(*hinted, zone="")[0] == [E1, E2]


def test_an_endpoint_without_node_is_never_local():
    found = candidate_sets(port(endpoint(E1, node=None)), "", None)
    assert found.local == ()


DRAINED = {"weight": 0}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param(
            DRAINED | {"zone_hints": ("z1",)},
            {"zone_hints": ("z2",)},
            ([E1, E2], [E1], True),
            id="a-drained-zone-is-served-by-the-others",
        ),
        pytest.param(
            DRAINED | {"node_hints": ("n1",)},
            {"node_hints": ("n2",)},
            ([E1, E2], [E1], True),
            id="a-drained-node-is-served-by-the-others",
        ),
        pytest.param(DRAINED, DRAINING, ([E2], [E1], True), id="drained-and-terminating"),
        pytest.param(
            DRAINED, DRAINING | {"node": "n1"}, ([E2], [E2], True), id="the-same-on-this-node"
        ),
        pytest.param(DRAINED, DRAINED, ([E1, E2], [E1], False), id="all-drained"),
        pytest.param(DRAINED, DRAINED | DRAINING, ([E1], [E1], False), id="both-drained"),
    ],
)
def test_a_set_of_weight_0_alone_is_as_good_as_empty(first, second, expected):
    assert sets(endpoint(E1, **first), endpoint(E2, **second)) == expected


def reference(endpoints, node, zone):
    """SEMANTICS 2.3 word for word."""
    r = [e for e in endpoints if e.ready]
    t = [e for e in endpoints if e.serving and e.terminating]

    def local(x):
        return [e for e in x if e.node is not None and e.node == node]

    if len(r) != 0:
        node_mode = all(len(e.node_hints) > 0 for e in r) and any(node in e.node_hints for e in r)
        zone_mode = (
            zone is not None
            and all(len(e.zone_hints) > 0 for e in r)
            and any(zone in e.zone_hints for e in r)
        )
        if node_mode:
            c = [e for e in r if node in e.node_hints]
        elif zone_mode:
            c = [e for e in r if zone in e.zone_hints]
        else:
            c = r
    else:
        c = t
    own = local(r) if len(local(r)) != 0 else local(t)
    return c, own, len(r) != 0 or len(t) != 0


hints = st.lists(st.sampled_from(["n1", "n2"]), max_size=2, unique=True).map(tuple)
zone_hints = st.lists(st.sampled_from(["z1", "z2"]), max_size=2, unique=True).map(tuple)
many = st.lists(
    st.builds(
        Endpoint,
        address=st.sampled_from([E1, E2, "10.244.3.5"]),
        port=st.integers(1, 9),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
        node=st.sampled_from(["n1", "n2", None]),
        node_hints=hints,
        zone_hints=zone_hints,
    ),
    max_size=4,
)


@settings(max_examples=500)
@given(many, st.sampled_from(["n1", "n2"]), st.sampled_from(["z1", "z2", None]))
def test_candidate_sets_equal_the_reference(endpoints, node, zone):
    found = candidate_sets(port(*endpoints), node, zone)
    expected = reference(endpoints, node, zone)
    assert (list(found.cluster), list(found.local), found.has_any) == expected
    if any(e.ready for e in endpoints):
        assert found.cluster, "the topology filter emptied the set"
