"""Every kind of client reaches every kind of backend, with the right source address, by one packet.

All assertions about packets are by the rules' own counters and the workers' at once (World.queues).
"""

import socket
from collections.abc import Iterator

import pytest

from nfqproxy.kernel.counters import rule_counters
from nfqproxy.kernel.netns import Namespace
from nfqproxy.model import Family, Protocol
from tests.kernel.proxy import COMBINATIONS
from tests.kernel.responder import TIMEOUT_S, Answer, ask_tcp, ask_udp, family_of, new_flow, parse
from tests.kernel.world import (
    NODE4,
    NODE6,
    NODE_PORT,
    OUTSIDE4,
    OUTSIDE6,
    PAIR4,
    PAIR6,
    REMOTE4,
    REMOTE6,
    SELF4,
    SELF6,
    WEB4,
    WEB6,
    World,
    is_v6,
    of_family,
    world,
)

LOCAL_PODS = {"pod-1-11", "pod-1-12", "pod-1-13"}
PROTOCOLS = (Protocol.TCP, Protocol.UDP)


@pytest.fixture(scope="module", name="running", params=COMBINATIONS)
def a_world(request: pytest.FixtureRequest) -> Iterator[World]:
    reader, data_path = request.param
    with world(reader=reader, data_path=data_path) as running:
        yield running


def place(address: str, protocol: Protocol) -> tuple[Family, Protocol]:
    return Family.IPV6 if is_v6(address) else Family.IPV4, protocol


def ask(namespace: Namespace, protocol: Protocol, address: str, port: int) -> Answer:
    return (ask_tcp if protocol is Protocol.TCP else ask_udp)(namespace, address, port)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vip", [WEB4, WEB6])
def test_external_client_is_forwarded_with_the_nodes_address(
    running: World, vip: str, protocol: Protocol
) -> None:
    with running.queues({place(vip, protocol): 12}):
        answers = [ask(running.client, protocol, vip, 80) for _ in range(12)]
    assert {answer.name for answer in answers} <= LOCAL_PODS
    assert {answer.client for answer in answers} == {of_family(vip, NODE4, NODE6)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vip", [WEB4, WEB6, REMOTE4, REMOTE6])
def test_node_process_is_served_with_the_nodes_address(
    running: World, vip: str, protocol: Protocol
) -> None:
    with running.queues({place(vip, protocol): 6}):
        answers = [ask(running.node, protocol, vip, 80) for _ in range(6)]
    expected = LOCAL_PODS if vip in (WEB4, WEB6) else {"pod-2-11"}
    assert {answer.name for answer in answers} <= expected
    assert {answer.client for answer in answers} == {of_family(vip, NODE4, NODE6)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vip", [REMOTE4, REMOTE6])
def test_pod_keeps_its_source(running: World, vip: str, protocol: Protocol) -> None:
    pod = running.pod
    with running.queues({place(vip, protocol): 3}):
        answers = [ask(pod.namespace, protocol, vip, 80) for _ in range(3)]
    assert {(a.name, a.client) for a in answers} == {
        ("pod-2-11", of_family(vip, pod.address4, pod.address6))
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vip", [SELF4, SELF6])
def test_hairpin_pod_reaches_itself_with_the_nodes_address(
    running: World, vip: str, protocol: Protocol
) -> None:
    with running.queues({place(vip, protocol): 3}):
        answers = [ask(running.pod.namespace, protocol, vip, 80) for _ in range(3)]
    # Its own address as source would make it answer itself over loopback, past the translation.
    assert {(a.name, a.client) for a in answers} == {("pod-1-11", of_family(vip, NODE4, NODE6))}
    neighbour = running.topology.pods[1]
    answer = ask(neighbour.namespace, protocol, vip, 80)
    assert answer.client == of_family(vip, neighbour.address4, neighbour.address6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("vip", [OUTSIDE4, OUTSIDE6])
def test_pod_to_a_backend_outside_the_pod_network_is_masqueraded(
    running: World, vip: str, protocol: Protocol
) -> None:
    with running.queues({place(vip, protocol): 3}):
        answers = [ask(running.pod.namespace, protocol, vip, 80) for _ in range(3)]
    assert {(a.name, a.client) for a in answers} == {("c2", of_family(vip, NODE4, NODE6))}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", [NODE4, NODE6])
@pytest.mark.parametrize("origin", ["outside", "node", "pod"])
def test_node_port_masquerades_everybody(
    running: World, origin: str, address: str, protocol: Protocol
) -> None:
    source = {"outside": running.client, "node": running.node, "pod": running.pod.namespace}[origin]
    with running.queues({place(address, protocol): 4}):
        answers = [ask(source, protocol, address, NODE_PORT) for _ in range(4)]
    assert {answer.name for answer in answers} <= LOCAL_PODS
    assert {answer.client for answer in answers} == {address}


def test_counters_agree_with_iptables(running: World) -> None:
    ask_tcp(running.client, WEB4, 80)
    ask_udp(running.client, WEB6, 80)
    counted = running.node.call(rule_counters)
    assert counted == running.proxy.queued()
    assert counted[Family.IPV4, Protocol.TCP] > 0
    assert counted[Family.IPV6, Protocol.UDP] > 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_ports_of_a_service_address_are_left_alone(
    running: World, protocol: Protocol
) -> None:
    with running.queues({}), pytest.raises((TimeoutError, ConnectionRefusedError, OSError)):
        (ask_tcp if protocol is Protocol.TCP else ask_udp)(running.client, WEB4, 81, timeout_s=0.2)


class Flow:
    """One UDP socket and who answers it."""

    def __init__(self, namespace: Namespace, address: str, port: int) -> None:
        self.socket = new_flow(namespace, address, port)
        self.names: set[str] = set()
        self.answered = 0

    def send(self, text: str) -> None:
        self.socket.send(text.encode())

    def receive(self) -> str:
        data = self.socket.recv(65536)
        self.names.add(parse(data).name)
        self.answered += 1
        return data.split(b"\n", 1)[1].decode()


@pytest.mark.parametrize("vip", [WEB4, WEB6])
def test_udp_flow_is_queued_once_whatever_its_length(running: World, vip: str) -> None:
    flows = [Flow(running.client, vip, 80) for _ in range(30)]
    try:
        with running.queues({place(vip, Protocol.UDP): 30}):
            for turn in range(20):
                for flow in flows:
                    flow.send(f"turn {turn}")
                assert [flow.receive() for flow in flows] == [f"turn {turn}"] * 30
        assert [flow.answered for flow in flows] == [20] * 30
        assert [len(flow.names) for flow in flows] == [1] * 30
        assert set.union(*(flow.names for flow in flows)) == LOCAL_PODS
    finally:
        for flow in flows:
            flow.socket.close()


def test_udp_burst_of_twins_loses_nothing_and_stays_with_one_backend(running: World) -> None:
    """Datagrams of one flow that are queued before the first is decided must agree."""
    flows = [Flow(running.client, WEB4, 80) for _ in range(30)]
    try:
        for flow in flows:
            for number in range(8):
                flow.send(str(number))
        for flow in flows:
            assert sorted(flow.receive() for _ in range(8)) == [str(n) for n in range(8)]
        assert [len(flow.names) for flow in flows] == [1] * 30
    finally:
        for flow in flows:
            flow.socket.close()


@pytest.mark.parametrize("vip", [PAIR4, PAIR6])
def test_one_udp_socket_talks_to_two_ports_of_one_address(running: World, vip: str) -> None:
    """The set of known flows holds no destination port; the second port must work nevertheless."""
    for _ in range(5):
        with running.client.socket(family_of(vip), socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)
            for turn in range(4):
                for port in (53, 5353):
                    sock.sendto(f"{port} {turn}".encode(), (vip, port))
                    data, sender = sock.recvfrom(65536)
                    assert sender[:2] == (vip, port)
                    assert data.split(b"\n", 1)[1] == f"{port} {turn}".encode()
