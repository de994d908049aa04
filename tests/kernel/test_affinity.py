"""ClientIP affinity on live traffic: many clients, restarts of every process, time-outs, changes."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.kernel.affinity_file import store_path
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology
from tests.kernel.conftest import WEB_VIP4, MakeTopology
from tests.kernel.manifests import Port, service
from tests.kernel.proxy import DATA_PATHS, Proxy, wait_until
from tests.kernel.responder import Responder

CLIENTS = [f"192.0.2.{number}" for number in range(50, 250)]
PORTS = [
    Port(port=80, target=8080, name="tcp", node_port=30080),
    Port(port=81, target=8080, name="other"),
    Port(port=53, target=8080, protocol="UDP", name="udp"),
]


def sticky(pods: Sequence[str], timeout_s: int = 600) -> list[dict[str, Any]]:
    objects = service("web", vips=[WEB_VIP4], ports=PORTS, endpoints=list(pods))
    objects[0]["spec"]["sessionAffinity"] = "ClientIP"
    objects[0]["spec"]["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": timeout_s}}
    return objects


class Crowd:
    """A topology whose one client namespace holds 200 client addresses."""

    def __init__(self, built: Topology) -> None:
        self.topology = built
        self.client: Namespace = built.client.namespace
        self.node: Namespace = built.node.namespace
        self.pods = [pod.address4 for pod in built.pods_of("n1")]
        self.client.ip(*(f"addr add {address}/24 dev eth0" for address in CLIENTS))

    def ask(
        self, client: str, address: str = WEB_VIP4, port: int = 80, *, udp: bool = False
    ) -> str:
        """Name of the backend that answers a new connection or flow of a client."""

        def connect() -> str:
            kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
            with socket.socket(socket.AF_INET, kind) as sock:
                sock.settimeout(5)
                sock.bind((client, 0))
                sock.connect((address, port))
                if udp:
                    sock.send(b"x")
                return sock.recv(100).split()[0].decode()

        return self.client.call(connect)

    def ask_all(self, address: str = WEB_VIP4, port: int = 80) -> dict[str, str]:
        return {client: self.ask(client, address, port) for client in CLIENTS}


@pytest.fixture
def crowd(make_topology: MakeTopology) -> Iterator[Crowd]:
    with ExitStack() as stack:
        built = make_topology(pods=(3,))
        responder = stack.enter_context(Responder())
        for pod in built.pods_of("n1"):
            responder.serve(pod.namespace, pod.name, 8080)
        yield Crowd(built)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_200_clients_stay_over_restarts_of_every_process(crowd: Crowd, data_path: str) -> None:
    with Proxy(crowd.node, sticky(crowd.pods), workers=2, data_path=data_path) as proxy:
        first = crowd.ask_all()
        assert set(first.values()) == {pod.name for pod in crowd.topology.pods_of("n1")}
        assert crowd.ask_all() == first
        # All frontends of the port share the state: the node port too, whichever worker it meets.
        assert crowd.ask_all(crowd.topology.node.address4, 30080) == first
        for _ in range(2):
            proxy.wait_replaced(proxy.kill_worker())
        assert crowd.ask_all() == first
        proxy.stop()
        proxy.start()
        assert crowd.ask_all() == first
        proxy.kill()
        proxy.start()
        assert crowd.ask_all() == first
        assert proxy.status()["affinity_records"] == len(CLIENTS)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_ports_have_records_of_their_own(crowd: Crowd, data_path: str) -> None:
    """TCP 80, TCP 81 and UDP 53 of one Service: three records, drawn independently."""
    with Proxy(crowd.node, sticky(crowd.pods), "--seed", "3", data_path=data_path) as proxy:
        answers = [
            (crowd.ask(client), crowd.ask(client, port=81), crowd.ask(client, port=53, udp=True))
            for client in CLIENTS[:40]
        ]
        again = [
            (crowd.ask(client), crowd.ask(client, port=81), crowd.ask(client, port=53, udp=True))
            for client in CLIENTS[:40]
        ]
        assert answers == again
        assert any(len(set(answer)) > 1 for answer in answers)
        assert proxy.status()["affinity_records"] == 120


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_the_time_out_is_honoured(crowd: Crowd, data_path: str) -> None:
    """After a second without a new connection clients are drawn anew; before, they are not."""
    with Proxy(crowd.node, sticky(crowd.pods, timeout_s=1), "--seed", "5", data_path=data_path):
        clients = CLIENTS[:30]
        first = {client: crowd.ask(client) for client in clients}
        time.sleep(1.1)
        second = {client: crowd.ask(client) for client in clients}
        assert second != first
        started = time.monotonic()
        third = {client: crowd.ask(client) for client in clients}
        if time.monotonic() - started < 0.9:
            assert third == second


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_an_endpoint_that_leaves_is_replaced_and_does_not_come_back(
    crowd: Crowd, data_path: str
) -> None:
    with Proxy(crowd.node, sticky(crowd.pods), data_path=data_path) as proxy:
        first = crowd.ask_all()
        gone = crowd.topology.pods_of("n1")[0].name
        proxy.follow(sticky(crowd.pods[1:]))
        second = crowd.ask_all()
        assert gone not in second.values()
        assert all(second[c] == first[c] for c in CLIENTS if first[c] != gone)
        proxy.follow(sticky(crowd.pods))
        assert crowd.ask_all() == second


def test_cleanup_forgets(crowd: Crowd) -> None:
    with Proxy(crowd.node, sticky(crowd.pods)) as proxy:
        crowd.ask(CLIENTS[0])
        wait_until(lambda: proxy.status()["affinity_records"] == 1, "the record is stored")
        file = crowd.node.call(store_path)
        assert file.exists()
        os.kill(proxy.pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{proxy.pid}/exe").exists(), "the proxy has ended")
        assert str(file) in proxy.cleanup()
        assert not file.exists()
