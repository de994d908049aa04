"""Which entries the service table contradicts; vectors 39 to 42 of the worked ones among them."""

import itertools
from ipaddress import ip_address

import msgspec
import pytest

from nfqproxy.core.reconcile import Reason, expectation, judge
from nfqproxy.model import Endpoint, Family, NodeContext, Protocol, ServicePort, ServicePortName
from nfqproxy.wire import ctnetlink

VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"
E1, E2 = "10.244.1.5", "10.244.2.5"
CLIENT = "192.0.2.10"
NODE, SECOND, ELSEWHERE = "192.0.2.1", "192.0.2.7", "203.0.113.200"
CONTEXT = NodeContext(node_name="n1", node_port_addresses=(NODE,))
LOCAL = frozenset(ip_address(text).packed for text in (NODE, SECOND, "127.0.0.1"))
DNAT = ctnetlink.IPS_DST_NAT | ctnetlink.IPS_DST_NAT_DONE
SCTP_STATES = {
    name.removeprefix("SCTP_CONNTRACK_"): value
    for name, value in vars(ctnetlink).items()
    if name.startswith("SCTP_CONNTRACK_")
}


def endpoint(address: str, port: int = 53, **conditions: bool) -> Endpoint:
    return Endpoint(address=address, port=port, **conditions)


def service_port(
    *endpoints: Endpoint,
    service: str = "dns",
    protocol: Protocol = Protocol.UDP,
    family: Family = Family.IPV4,
    cluster_ip: str = VIP,
    **fields: object,
) -> ServicePort:
    return ServicePort(
        name=ServicePortName("default", service, "", protocol, family),
        cluster_ip=cluster_ip,
        port=53,
        endpoints=endpoints,
        **fields,  # type: ignore[arg-type]
    )


def entry(
    frontend: str = VIP,
    port: int = 53,
    *,
    to: str | None = E1,
    to_port: int = 53,
    protocol: Protocol = Protocol.UDP,
    zone: int = 0,
    sctp_state: int | None = None,
    source: str | None = None,
) -> ctnetlink.Entry:
    """A flow of CLIENT; ``to`` None: untranslated; ``source``: the address it is masqueraded with."""
    client = CLIENT if ":" not in frontend else "2001:db8:2::10"
    original = ctnetlink.Tuple(
        ip_address(client).packed, ip_address(frontend).packed, int(protocol), 40000, port
    )
    reply = original.inverse()
    status = 0
    if to is not None:
        reply = ctnetlink.Tuple(
            ip_address(to).packed,
            ip_address(source or client).packed,
            int(protocol),
            to_port,
            40000,
        )
        if (to, to_port) != (frontend, port):
            status = DNAT
    return ctnetlink.Entry(
        original=original,
        reply=reply,
        status=status,
        timeout_s=30,
        mark=0,
        tcp_state=3 if protocol is Protocol.TCP else None,
        sctp_state=sctp_state,
        id=1,
        zone=zone,
        labels=b"",
        use=1,
        original_packets=None,
        original_bytes=None,
        reply_packets=None,
        reply_bytes=None,
    )


def reason(
    found: ctnetlink.Entry, *ports: ServicePort, node: NodeContext = CONTEXT
) -> Reason | None:
    stale = judge(found, expectation(ports, node), LOCAL)
    return stale.reason if stale is not None else None


def test_vector_39_a_tcp_connection_is_never_cut() -> None:
    port = service_port(endpoint(E2), protocol=Protocol.TCP)
    assert reason(entry(protocol=Protocol.TCP), port) is None
    assert expectation([port], CONTEXT).lookups == frozenset()


def test_vector_40_a_flow_to_a_gone_backend_goes() -> None:
    gone = endpoint(E1, ready=False, serving=False)
    assert reason(entry(), service_port(endpoint(E2))) is Reason.BACKEND_GONE
    assert reason(entry(), service_port(gone, endpoint(E2))) is Reason.BACKEND_GONE
    assert reason(entry(to=E2), service_port(gone, endpoint(E2))) is None


def test_vector_41_without_any_endpoint_entries_stay() -> None:
    gone = endpoint(E1, ready=False, serving=False, terminating=True)
    for port in (service_port(), service_port(gone)):
        assert reason(entry(), port) is None
        assert reason(entry(to=None), port) is None
        assert expectation([port], CONTEXT).lookups == frozenset()


def test_vector_42_an_untranslated_flow_goes() -> None:
    assert reason(entry(to=None), service_port(endpoint(E1))) is Reason.UNTRANSLATED


@pytest.mark.parametrize(
    ("conditions", "stays"),
    [
        ({"ready": True, "serving": True}, True),
        ({"ready": False, "serving": True, "terminating": True}, True),
        # publishNotReadyAddresses: ready whatever the pod says.
        ({"ready": True, "serving": False}, True),
        ({"ready": False, "serving": False, "terminating": True}, False),
        ({"ready": False, "serving": False}, False),
    ],
    ids=str,
)
def test_a_serving_endpoint_keeps_its_flows(conditions: dict[str, bool], stays: bool) -> None:
    port = service_port(endpoint(E1, **conditions), endpoint(E2))
    assert (reason(entry(), port) is None) is stays


def test_the_endpoints_port_counts() -> None:
    port = service_port(endpoint(E1, 5353))
    assert reason(entry(to_port=53), port) is Reason.BACKEND_GONE
    assert reason(entry(to_port=5353), port) is None


def test_a_masqueraded_flow_is_judged_by_its_backend() -> None:
    assert reason(entry(source=NODE), service_port(endpoint(E1))) is None
    assert reason(entry(source=NODE), service_port(endpoint(E2))) is Reason.BACKEND_GONE


def test_a_backend_that_is_the_frontend_needs_no_translation() -> None:
    """A host-network endpoint on an external IP: the kernel sets no NAT bit for such an entry."""
    port = service_port(endpoint(NODE, 53), external_ips=(NODE,))
    same = entry(NODE, to=NODE)
    assert not same.is_dnat
    assert reason(same, port) is None


@pytest.mark.parametrize("address", [VIP, "203.0.113.9", "198.51.100.7"])
def test_every_kind_of_frontend(address: str) -> None:
    port = service_port(
        endpoint(E2), external_ips=("203.0.113.9",), load_balancer_ips=("198.51.100.7",)
    )
    assert reason(entry(address), port) is Reason.BACKEND_GONE
    assert reason(entry(address, to=None), port) is Reason.UNTRANSLATED
    assert reason(entry(address, 54), port) is None


def test_node_ports() -> None:
    port = service_port(endpoint(E2), node_port=30053)
    assert reason(entry(NODE, 30053), port) is Reason.BACKEND_GONE
    assert reason(entry(NODE, 30053, to=None), port) is Reason.UNTRANSLATED
    # Any local address if translated; untranslated a program of the node may own it.
    assert reason(entry(SECOND, 30053), port) is Reason.BACKEND_GONE
    assert reason(entry(SECOND, 30053, to=None), port) is None
    # Traffic of others that the node forwards.
    assert reason(entry(ELSEWHERE, 30053), port) is None
    assert reason(entry(ELSEWHERE, 30053, to=None), port) is None
    # The loopback address serves only if it is told to.
    assert reason(entry("127.0.0.1", 30053, to=None), port) is None
    with_loopback = msgspec.structs.replace(CONTEXT, localhost_node_ports=True)
    found = reason(entry("127.0.0.1", 30053, to=None), port, node=with_loopback)
    assert found is Reason.UNTRANSLATED
    # A port of the other family is another one.
    assert reason(entry("2001:db8::1", 30053, to=None), port) is None


def test_other_traffic_is_left_alone() -> None:
    port = service_port(endpoint(E2), node_port=30053)
    assert reason(entry(zone=7), port) is None
    assert reason(entry(port=54), port) is None
    assert reason(entry("10.96.0.11"), port) is None
    assert reason(entry(protocol=Protocol.SCTP), port) is None
    ping = ctnetlink.Tuple(
        ip_address(CLIENT).packed, ip_address(VIP).packed, 1, icmp_id=53, icmp_type=8
    )
    echo = entry()
    echo = ctnetlink.Entry(
        **{
            **{name: getattr(echo, name) for name in echo.__slots__},
            "original": ping,
            "reply": ping.inverse(),
        }
    )
    assert reason(echo, port) is None


def test_ipv6() -> None:
    six = service_port(endpoint("fd00:10:244:2::5"), family=Family.IPV6, cluster_ip=VIP6)
    assert reason(entry(VIP6, to="fd00:10:244:1::5"), six) is Reason.BACKEND_GONE
    assert reason(entry(VIP6, to="fd00:10:244:2::5"), six) is None
    assert expectation([six], CONTEXT).lookups == {(Family.IPV6, Protocol.UDP)}


@pytest.mark.parametrize("state", [None, *SCTP_STATES.values()])
def test_sctp_goes_only_while_no_backend_has_spoken(state: int | None) -> None:
    port = service_port(endpoint(E2), protocol=Protocol.SCTP)
    goes = state in (None, *(SCTP_STATES[name] for name in ("NONE", "CLOSED", "COOKIE_WAIT")))
    for to, expected in ((E1, Reason.BACKEND_GONE), (None, Reason.UNTRANSLATED), (E2, None)):
        found = reason(entry(protocol=Protocol.SCTP, to=to, sctp_state=state), port)
        assert found is (expected if goes else None)


def test_of_two_claimants_the_one_counts_that_the_plans_choose() -> None:
    first = service_port(endpoint(E1), service="a", external_ips=("203.0.113.9",))
    second = service_port(
        endpoint(E2), service="b", cluster_ip="10.96.0.11", external_ips=("203.0.113.9",)
    )
    owner = service_port(endpoint(E2), service="c", cluster_ip="203.0.113.9")
    shared = entry("203.0.113.9", to=E2)
    for order in itertools.permutations([first, second]):
        assert reason(shared, *order) is Reason.BACKEND_GONE
    # A cluster IP wins over an external IP, whatever the names.
    assert reason(shared, first, second, owner) is None
    # The first one has nobody: the flow is not given to the second.
    nobody = service_port(service="a", external_ips=("203.0.113.9",))
    assert reason(entry("203.0.113.9", to=E1), nobody, second) is None


def test_expectations_differ_only_where_a_judgement_does() -> None:
    terminating = endpoint(E1, ready=False, serving=True, terminating=True)
    one = expectation([service_port(endpoint(E1), endpoint(E2))], CONTEXT)
    assert expectation([service_port(terminating, endpoint(E2))], CONTEXT) == one
    tcp = service_port(endpoint(E1), service="web", protocol=Protocol.TCP)
    assert expectation([tcp, service_port(endpoint(E2), endpoint(E1))], CONTEXT) == one
    assert expectation([service_port(endpoint(E2))], CONTEXT) != one
