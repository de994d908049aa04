"""The source address a backend sees where it is not simply "the node's": the kernel's own answer rules.

What the worker installs must equal what MASQUERADE of the kernel fallback (or kube-proxy) does, so that
nobody can tell from a connection who decided it.
"""

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.kernel.routes import Routes
from nfqproxy.lab.topology import Node, Topology, topology
from tests.kernel.manifests import Endpoint, Port, service
from tests.kernel.proxy import DATA_PATHS, Proxy
from tests.kernel.responder import Responder, ask_tcp, ask_udp, new_flow, parse

HOST_VIP = "10.96.0.85"
POD_VIP = "10.96.0.86"
NODE_PORT = 30085
HOST_PORTS = [
    Port(port=80, target=9090, name="tcp", node_port=NODE_PORT),
    Port(port=53, target=9090, protocol="UDP", name="udp"),
]


@contextmanager
def serving(built: Topology, data_path: str) -> Iterator[Proxy]:
    """Service host: a server in the node's own network. Service pod: one pod, with a node port."""
    with Responder() as responder:
        pod = built.pods[0]
        responder.serve(built.node.namespace, "host", 9090)
        responder.serve(pod.namespace, "pod", 8080)
        objects = [
            *service("host", vips=[HOST_VIP], ports=HOST_PORTS, endpoints=[built.node.address4]),
            *service(
                "pod",
                vips=[POD_VIP],
                ports=[Port(port=80, target=8080, node_port=NODE_PORT + 1)],
                endpoints=[pod.address4],
            ),
        ]
        with Proxy(built.node.namespace, objects, data_path=data_path) as proxy:
            yield proxy


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_server_on_the_node_itself_sees_the_client_as_behind_the_fallback(
    topology: Topology, data_path: str
) -> None:
    client, pod, node = topology.client, topology.pods[0], topology.node

    def seen() -> list[tuple[str, str]]:
        answers = [
            ask(origin, address, port)
            for origin in (client.namespace, pod.namespace, node.namespace)
            for ask, address, port in (
                (ask_tcp, HOST_VIP, 80),
                (ask_udp, HOST_VIP, 53),
                (ask_tcp, node.address4, NODE_PORT),
            )
        ]
        return [(answer.name, answer.client) for answer in answers]

    sources = [client.address4, pod.address4, node.address4]
    expected = [("host", source) for source in sources for _ in range(3)]
    with serving(topology, data_path) as proxy:
        by_worker = seen()
        assert proxy.packets() == len(expected)
        proxy.stop()
        assert seen() == expected
    assert by_worker == expected


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_backend_that_is_the_frontend(data_path: str) -> None:
    """An ingress in the hosts' network, behind the nodes' addresses as external IPs: nothing to translate."""
    with topology(pods=(1, 1)) as built, Responder() as responder:
        one, two = built.nodes
        addresses = [a for node in (one, two) for a in (node.address4, node.address6)]
        for node in built.nodes:
            responder.serve(node.namespace, node.name, 9090)
        objects = service(
            "ingress",
            vips=["10.96.0.87", "fd00:10:96::87"],
            ports=[
                Port(port=9090, target=9090, name="tcp"),
                Port(port=9090, target=9090, protocol="UDP", name="udp"),
            ],
            endpoints=[
                Endpoint(address=address, node=node.name)
                for node in (one, two)
                for address in (node.address4, node.address6)
            ],
        )
        objects[0]["spec"]["externalIPs"] = addresses
        # Policy Local binds clients from outside alone, which find nobody on n1.
        responder.serve(two.namespace, two.name, 9091)
        local = service(
            "local",
            vips=["10.96.0.88", "fd00:10:96::88"],
            ports=[Port(port=9091, target=9091)],
            endpoints=[Endpoint(address=a, node=two.name) for a in addresses[2:]],
            external_local=True,
        )
        local[0]["spec"]["externalIPs"] = addresses[2:]

        def ask_local() -> set[str]:
            callers = (pod, one.namespace)
            return {ask_tcp(caller, to, 9091).name for caller in callers for to in addresses[2:]}

        pod = built.pods_of("n1")[0].namespace
        # The client is n2's neighbour, and speaks to it past n1.
        asked = [(built.client.namespace, to) for to in addresses[:2]] + [
            (pod, to) for to in addresses
        ]
        with Proxy(one.namespace, objects + local, data_path=data_path) as proxy:
            assert ask_local() == {two.name}
            by_worker = set()
            for namespace, to in asked * 4:
                before = proxy.packets()
                by_worker.add(_whole_flow(namespace, to, two))
                # Until an answer has come by, conntrack says nothing of a flow that is not translated.
                assert proxy.packets() - before <= 2
                ask_tcp(namespace, to, 9090)
            proxy.lose_workers()
            assert ask_local() == {two.name}
            by_fallback = {_whole_flow(namespace, to, two) for namespace, to in asked * 4}
    assert by_worker == by_fallback == {"n1", "n2"}


def _whole_flow(namespace: Namespace, to: str, other: Node) -> str:
    """The one backend of a flow of several datagrams; that of the other node sees this node's address."""
    with new_flow(namespace, to, 9090) as sock:
        seen = set()
        for _ in range(6):
            sock.send(b"?")
            seen.add(parse(sock.recv(200)))
        (answer,) = seen
    if answer.name == other.name:
        assert answer.client == ("2001:db8:2::1" if ":" in to else "192.0.2.1")
    return answer.name


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_two_clients_with_one_source_port_reach_one_node_port(
    topology: Topology, data_path: str
) -> None:
    """Both are masqueraded to one address: the kernel must find the second another port."""
    client, pod = topology.client, topology.pods[1]
    with serving(topology, data_path):
        held: list[socket.socket] = []
        try:
            seen = set()
            for namespace in (client.namespace, pod.namespace):
                for port in range(20000, 20100):
                    sock = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
                    held.append(sock)
                    sock.settimeout(5)
                    sock.bind(("", port))
                    sock.connect((topology.node.address4, NODE_PORT + 1))
                    name, address, source_port = sock.recv(100).split()
                    assert (name, address) == (b"pod", topology.node.address4.encode())
                    seen.add(source_port)
            assert len(seen) == 200
        finally:
            for sock in held:
                sock.close()


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_route_that_comes_late_brings_the_right_source(
    topology: Topology, data_path: str
) -> None:
    """Without a route nothing may be installed: an unmasqueraded entry would outlive the lack."""
    client, pod, node = topology.client, topology.pods[0], topology.node
    with serving(topology, data_path) as proxy:
        node.namespace.ip(f"route replace unreachable {pod.address4}/32")
        with client.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.bind(("", 20500))
            with pytest.raises(OSError, match="No route to host"):
                sock.connect((POD_VIP, 80))
        # By marks it is the kernel that chooses the source, and there is nothing to be found out before.
        assert proxy.counters() == ({"no_route": 1} if data_path == "ctnetlink" else {})
        assert "sport=20500" not in node.namespace.run("conntrack", "-L").stdout
        node.namespace.ip(f"route replace {pod.address4}/32 dev {pod.host_device} scope link")
        with client.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.bind(("", 20500))
            sock.connect((POD_VIP, 80))
            assert sock.recv(100).split()[:2] == [b"pod", node.address4.encode()]


def test_routes_tell_the_nodes_own_addresses_apart(topology: Topology) -> None:
    node = topology.node

    def look_up() -> list[bytes | None]:
        routes = Routes()
        try:
            return [
                routes.masquerade_source(socket.inet_aton(address))
                for address in (node.address4, topology.pods[0].address4)
            ]
        finally:
            routes.close()

    assert node.namespace.call(look_up) == [b"", socket.inet_aton(node.address4)]


def test_addresses_are_listed_anew_for_addresses_and_not_for_routes(topology: Topology) -> None:
    node = topology.node
    routes = node.namespace.call(Routes)

    def arrive() -> None:
        assert select.select([routes.fileno()], [], [], 5)[0], "no event came"
        assert routes.changed()

    try:
        before = routes.addresses()
        node.namespace.ip("route add 10.99.0.0/24 via 192.0.2.254")
        arrive()
        assert routes.addresses() is before
        node.namespace.ip("addr add 192.0.2.77/24 dev eth0")
        arrive()
        added = {address.address for address in routes.addresses()}
        assert added - {address.address for address in before} == {socket.inet_aton("192.0.2.77")}
    finally:
        routes.close()
