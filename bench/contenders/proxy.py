"""nfqproxy itself, started by its command as a user would, once per queue reader."""

import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import ClassVar

from bench.contenders.base import Contender, Placement, Serving, StartError
from bench.manifests import manifests
from bench.process import Service, descendants, pin, service
from bench.world import NODE_NAME, World
from nfqproxy.errors import HostError
from nfqproxy.kernel.netns import Namespace

_READY_S = 20.0


class _Proxy(Contender):
    """What both readers share."""

    reader: ClassVar[str]
    data_path: ClassVar[str] = "ctnetlink"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Runs the proxy on the sender's CPU and moves its one worker to the worker's."""
        with tempfile.NamedTemporaryFile("w", prefix="nfqb-", suffix=".json") as file:
            file.write(manifests(world))
            file.flush()
            words = ["--manifests", file.name, "--mode", "replace", "--node-name", NODE_NAME]
            words += ["--reader", self.reader, "--workers", "1"]
            words += ["--data-path", self.data_path]
            command = [sys.executable, "-m", "nfqproxy", "run", *words]
            with service(world.node, *command, cpu=placement.sender) as running:
                serving = _ProxyServing(world.node, running, self.name)
                for pid in serving.workers:
                    pin(pid, placement.worker)
                yield serving


class NetlinkReader(_Proxy):
    """The project's own reader: batches, fail-open."""

    name: ClassVar[str] = "netlink"
    title: ClassVar[str] = "nfqproxy, reader netlink"
    reader: ClassVar[str] = "netlink"


class MarkPath(NetlinkReader):
    """The same reader; packets are marked, and a nat rule translates: no entry is made by the worker."""

    name: ClassVar[str] = "mark"
    title: ClassVar[str] = "nfqproxy, data path mark"
    data_path: ClassVar[str] = "mark"


class NetfilterqueueReader(_Proxy):
    """The netfilterqueue package: a callback per packet."""

    name: ClassVar[str] = "netfilterqueue"
    title: ClassVar[str] = "nfqproxy, reader netfilterqueue"
    reader: ClassVar[str] = "netfilterqueue"

    def check(self) -> None:
        """The package is an extra."""
        if importlib.util.find_spec("netfilterqueue") is None:
            raise HostError("the package netfilterqueue is not installed: run ./task setup")


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
        command = (sys.executable, "-m", "nfqproxy", "status", "-o", "json")
        done = self._node.run(*command, check=False)
        if done.returncode:
            return None
        workers: list[dict[str, object]] = json.loads(done.stdout)["workers"]
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
