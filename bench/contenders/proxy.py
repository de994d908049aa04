"""nfqproxy itself, started by its command as a user would, once per queue reader."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import ClassVar

from bench.contenders.base import Contender, Placement, Serving, StartError
from bench.contenders.kubeproxy import KubeProxyIptables
from bench.manifests import manifests
from bench.process import Service, descendants, pin, service
from bench.world import NODE_NAME, POD_NETWORK, SOURCES, World
from nfqproxy.api import admin
from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel.netns import Namespace

# A table of 5,000 Services takes some seconds.
_READY_S = 60.0


class Nfqproxy(Contender):
    """nfqproxy with its default reader and any number of workers.

    The first worker has the worker's CPU; each further one takes the CPU before it, round and
    round, so on a machine with few CPUs they share with each other and with the load.
    """

    name: ClassVar[str] = "nfqproxy"
    title: ClassVar[str] = "nfqproxy"
    reader: ClassVar[str] = "netlink"
    data_path: ClassVar[str] = "ctnetlink"
    mode: ClassVar[tuple[str, ...]] = ("--mode", "replace")

    def __init__(self, workers: int = 1, queue_length: int | None = None) -> None:
        self.workers = workers
        self.queue_length = queue_length

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Runs the proxy on the sender's CPU and moves each worker to its own."""
        with tempfile.NamedTemporaryFile("w", prefix="nfqb-", suffix=".json") as file:
            file.write(manifests(world))
            file.flush()
            words = ["--manifests", file.name, *self.mode, "--node-name", NODE_NAME]
            words += ["--reader", self.reader, "--workers", str(self.workers)]
            words += ["--data-path", self.data_path]
            # Whoever calls is a pod of the cluster: nobody is masqueraded, as with the others.
            words += ["--cluster-cidr", f"{SOURCES},{POD_NETWORK}"]
            if self.queue_length is not None:
                words += ["--queue-length", str(self.queue_length)]
            command = [sys.executable, "-m", "nfqproxy", "run", *words]
            with service(world.node, *command, cpu=placement.sender) as running:
                serving = _ProxyServing(world.node, running, self.name)
                for pid, cpu in zip(serving.workers, self.cpus(placement), strict=True):
                    pin(pid, cpu)
                yield serving

    def cpus(self, placement: Placement) -> tuple[int, ...]:
        """The CPU of each worker."""
        available = sorted(os.sched_getaffinity(0))
        first = available.index(placement.worker)
        return tuple(available[(first - index) % len(available)] for index in range(self.workers))


class NetlinkReader(Nfqproxy):
    """The project's own reader: batches, fail-open."""

    name: ClassVar[str] = "netlink"
    title: ClassVar[str] = "nfqproxy, reader netlink"


class MarkPath(NetlinkReader):
    """The same reader; packets are marked, and a nat rule translates: no entry is made by the worker."""

    name: ClassVar[str] = "mark"
    title: ClassVar[str] = "nfqproxy, data path mark"
    data_path: ClassVar[str] = "mark"


class NetfilterqueueReader(Nfqproxy):
    """The netfilterqueue package: a callback per packet."""

    name: ClassVar[str] = "netfilterqueue"
    title: ClassVar[str] = "nfqproxy, reader netfilterqueue"
    reader: ClassVar[str] = "netfilterqueue"

    def check(self) -> None:
        """The package is an extra."""
        if importlib.util.find_spec("netfilterqueue") is None:
            raise HostError("the package netfilterqueue is not installed: run ./task setup")


class Overlay(Nfqproxy):
    """Mode overlay, which steers all Services beside kube-proxy's iptables rules for the same ones."""

    name: ClassVar[str] = "overlay"
    title: ClassVar[str] = "nfqproxy, mode overlay beside kube-proxy's rules, iptables mode"
    mode: ClassVar[tuple[str, ...]] = ("--mode", "overlay", "--steer-all")

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Loads kube-proxy's rules first, as on a node that runs it."""
        with KubeProxyIptables().serve(world, placement), super().serve(world, placement) as both:
            yield both


class _ProxyServing(Serving):
    def __init__(self, node: Namespace, running: Service, name: str) -> None:
        self._node = node
        self._running = running
        self._name = name
        self.workers = self._wait_ready()
        self.others = tuple(descendants(running.pid) - set(self.workers))

    def installed(self) -> int | None:
        workers = self._status()
        return None if workers is None else sum(int(str(worker["installed"])) for worker in workers)

    def complaints(self) -> str:
        return self._running.complained()

    def _status(self) -> list[dict[str, object]] | None:
        """The ``workers`` of ``nfqproxy status``; None while it does not answer."""
        try:
            document = self._node.call(lambda: admin.ask("status"))
        except NfqproxyError:
            return None
        workers: list[dict[str, object]] = document["workers"]
        return workers

    def _wait_ready(self) -> tuple[int, ...]:
        deadline = time.monotonic() + _READY_S
        while True:
            workers = self._status()
            if workers and all(worker["ready"] for worker in workers):
                return tuple(int(str(worker["pid"])) for worker in workers)
            status = self._running.popen.poll()
            if status is not None:
                raise StartError(
                    f"nfqproxy run ({self._name}) ended with status {status}: {self.complaints()}"
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"nfqproxy run ({self._name}) has no ready worker after {_READY_S:.0f} s: "
                    f"{self.complaints()}"
                )
            time.sleep(0.05)
