"""The C reference worker (bench/c/reference_worker.c): the floor for NFQUEUE with ctnetlink."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import ClassVar

from bench import native
from bench.contenders.base import Contender, Placement, Serving, StartError
from bench.process import Service, service
from bench.services import PORT, VIP
from bench.world import World

_READY_S = 30.0
_QUEUE = 0

# An iptables-restore text each. The nat rule never matches; it is there because conntrack and NAT
# hook into a namespace only while a rule needs them, and an inserted entry would do nothing.
_RAW = f"""*raw
-A PREROUTING -d {VIP} -p tcp --dport {PORT} --syn -j NFQUEUE --queue-num {_QUEUE} --queue-bypass
COMMIT
"""
_NAT = """*nat
-A PREROUTING -d 192.0.2.255 -p tcp --dport 1 -j DNAT --to-destination 192.0.2.254
COMMIT
"""


class CReference(Contender):
    """Its own minimal rules and the C program."""

    name: ClassVar[str] = "c"
    title: ClassVar[str] = "C reference worker, batches of 64"

    def check(self) -> None:
        """Compiles it."""
        native.program("reference_worker")

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Adds the rules, starts the program; at the end its own counts must show no error."""
        for rules in (_RAW, _NAT):
            world.node.run("iptables-restore", "-w", "--noflush", stdin=rules)
        backends = [f"{backend}={backend.weight}" for backend in world.backends]
        words = [str(native.program("reference_worker")), str(_QUEUE), VIP, str(PORT), *backends]
        with service(world.node, *words, cpu=placement.worker) as running:
            _wait_ready(running)
            yield _ReferenceServing(running)
            running.stop()
            _check_counts(running)


class _ReferenceServing(Serving):
    def __init__(self, running: Service) -> None:
        self.workers = (running.pid,)
        self._running = running

    def complaints(self) -> str:
        return self._running.complained()


def _wait_ready(running: Service) -> None:
    deadline = time.monotonic() + _READY_S
    while "ready" not in running.said():
        if running.popen.poll() is not None or time.monotonic() > deadline:
            raise StartError(f"the C reference worker did not start: {running.complained()}")
        time.sleep(0.01)


def _check_counts(running: Service) -> None:
    counts = json.loads(running.said().splitlines()[-1])
    if counts["errors"] or counts["packets"] != counts["entries"]:
        raise StartError(f"the C reference worker failed to make entries: {counts}")
