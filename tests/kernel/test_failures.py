"""Death and overload: no connection is refused, lost or left waiting for a retransmit's time-out.

What serves meanwhile is the kernel's fallback; KERNEL facts: a queue without reader drops, a full queue
drops, unless told otherwise. These tests hold that we have told otherwise.

On both data paths, but for two: that a worker which hangs is replaced is seen by the supervisor's pings alone, and
stopping under load is, by marks, the start after a kill (here) and another number of workers (test_workers.py).
"""

import itertools
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nfqproxy.kernel.counters import queue_statistics
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology
from nfqproxy.model import Family, Protocol
from tests.kernel.conftest import WEB_VIP4, MakeTopology
from tests.kernel.manifests import Port, service
from tests.kernel.proxy import DATA_PATHS, RUNS, Proxy, wait_until
from tests.kernel.responder import Responder

PORTS = [
    Port(port=80, target=8080, name="tcp"),
    Port(port=53, target=8080, protocol="UDP", name="udp"),
]


@contextmanager
def running(built: Topology, *flags: str, **options: object) -> Iterator[Proxy]:
    with ExitStack() as stack:
        responder = stack.enter_context(Responder())
        pods = built.pods_of("n1")
        for pod in pods:
            responder.serve(pod.namespace, pod.name, 8080)
        objects = service("web", vips=[WEB_VIP4], ports=PORTS, endpoints=[p.address4 for p in pods])
        yield stack.enter_context(
            Proxy(built.node.namespace, objects, *flags, **options)  # type: ignore[arg-type]
        )


class Load(threading.Thread):
    """Connects one after the other from a namespace until told to stop; collects failures.

    From each of ``sources`` in turn; the empty one is the namespace's own address.
    """

    def __init__(self, namespace: Namespace, sources: Sequence[str] = ("",)) -> None:
        super().__init__(name="load")
        self._namespace = namespace
        self._sources = itertools.cycle([(source, 0) for source in sources])
        self._done = threading.Event()
        self.failures: list[str] = []
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        self._namespace.call(self._connect)

    def _connect(self) -> None:
        while not self._done.is_set():
            try:
                with socket.create_connection(
                    (WEB_VIP4, 80), timeout=5, source_address=next(self._sources)
                ) as sock:
                    self.answers[sock.recv(100).split()[0].decode()] += 1
            except OSError as error:
                self.failures.append(str(error))

    def reach(self, count: int) -> None:
        """Wait until ``count`` connections more have been answered."""
        goal = self.answers.total() + count
        wait_until(lambda: self.answers.total() >= goal or self.failures, "the load goes on")

    def finish(self) -> None:
        self._done.set()
        self.join()
        assert not self.failures
        assert self.answers.total()


@contextmanager
def load(namespace: Namespace, sources: Sequence[str] = ("",)) -> Iterator[Load]:
    thread = Load(namespace, sources)
    thread.start()
    try:
        yield thread
    finally:
        thread.finish()


def echo(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    return sock.recv(100)


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_worker_loses_no_connection(
    make_topology: MakeTopology, run: tuple[str, str]
) -> None:
    reader, data_path = run
    built = make_topology()
    client = built.client.namespace
    with running(built, reader=reader, data_path=data_path) as proxy:
        held = client.call(lambda: socket.create_connection((WEB_VIP4, 80), timeout=5))
        with held:
            assert held.recv(100)
            with load(client) as flood:
                for _ in range(3):
                    flood.reach(300)
                    killed = proxy.kill_worker()
                    flood.reach(300)
                    proxy.wait_replaced(killed)
                flood.reach(100)
            assert echo(held, b"still here") == b"still here"
        decided = proxy.packets()
        assert decided >= 100
        assert proxy.status()["workers"][0]["restarts"] == 3


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_packets_in_a_dying_workers_queue_are_not_lost(
    make_topology: MakeTopology, data_path: str
) -> None:
    """Datagrams wait in the queue of a stopped worker; it dies; each is delivered, none sent again."""
    built = make_topology()
    client, node = built.client.namespace, built.node.namespace
    with running(built, data_path=data_path) as proxy:
        worker = proxy.worker_pids()[0]
        os.kill(worker, signal.SIGSTOP)
        socks = [client.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
        try:
            for sock in socks:
                sock.settimeout(10)
                sock.sendto(b"once", (WEB_VIP4, 53))

            def waiting() -> int:
                return sum(queue.waiting for queue in queue_statistics().values())

            wait_until(lambda: node.call(waiting) == 20, "twenty datagrams wait in the queue")
            os.kill(worker, signal.SIGKILL)
            for sock in socks:
                assert sock.recv(200).endswith(b"once")
        finally:
            for sock in socks:
                sock.close()


def test_a_hanging_worker_is_replaced(make_topology: MakeTopology) -> None:
    built = make_topology()
    with running(built) as proxy:
        worker = proxy.worker_pids()[0]
        os.kill(worker, signal.SIGSTOP)
        wait_until(
            lambda: (
                proxy.status()["workers"][0]["pid"] not in (worker, None)
                and proxy.status()["workers"][0]["ready"]
            ),
            "the stopped worker was replaced",
            timeout_s=40,
        )
        with load(built.client.namespace) as flood:
            flood.reach(50)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_killed_supervisor_loses_no_connection(
    make_topology: MakeTopology, data_path: str
) -> None:
    """Its workers leave, the fallback serves, and a new supervisor takes over."""
    built = make_topology()
    client = built.client.namespace
    with running(built, data_path=data_path) as proxy:
        held = client.call(lambda: socket.create_connection((WEB_VIP4, 80), timeout=5))
        with held, load(client) as flood:
            assert held.recv(100)
            flood.reach(300)
            workers = proxy.worker_pids()
            os.kill(proxy.pid, signal.SIGKILL)
            wait_until(
                lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers),
                "the workers have left",
            )
            flood.reach(300)
            proxy.start()
            flood.reach(300)
            assert echo(held, b"still here") == b"still here"
        assert proxy.packets() > 0


def test_stop_and_start_under_load(make_topology: MakeTopology) -> None:
    built = make_topology()
    with running(built, workers=2) as proxy, load(built.client.namespace) as flood:
        for _ in range(3):
            flood.reach(200)
            proxy.stop()
            flood.reach(200)
            proxy.start()
        flood.reach(200)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_an_overflowing_queue_fails_open(make_topology: MakeTopology, data_path: str) -> None:
    """More SYNs than the queue may hold: the rest is served by the fallback, nothing is lost."""
    built = make_topology(clients=2)
    node = built.node.namespace
    with running(built, "--queue-length", "16", data_path=data_path) as proxy:
        worker = proxy.worker_pids()[0]
        os.kill(worker, signal.SIGSTOP)
        answers: list[bytes] = []
        failures: list[str] = []

        def burst(namespace: Namespace) -> None:
            socks = []
            for _ in range(200):
                sock = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.connect_ex((WEB_VIP4, 80))
                socks.append(sock)
            resume.wait()
            for sock in socks:
                with sock:
                    sock.setblocking(True)
                    sock.settimeout(10)
                    try:
                        answers.append(sock.recv(100))
                    except OSError as error:
                        failures.append(str(error))

        resume = threading.Event()
        threads = [
            threading.Thread(target=burst, args=(client.namespace,)) for client in built.clients
        ]
        for thread in threads:
            thread.start()
        wait_until(
            lambda: proxy.queued().get((Family.IPV4, Protocol.TCP), 0) >= 400,
            "all SYNs have met the queue rule",
        )
        assert node.call(queue_statistics)[100].waiting == 16
        os.kill(worker, signal.SIGCONT)
        resume.set()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(answers) == 400
        assert all(answers)
        status = proxy.status()["workers"][0]
        assert status["packets"] == 16
        assert (status["queue_dropped"], status["user_dropped"]) == (0, 0)
