"""Real clients of the measured Service (bench/c/calls.c), and the servers that answer them."""

import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench import native
from bench.contenders import Placement
from bench.process import descendants, pin
from bench.services import BACKEND_PORT
from bench.world import NODE_NAME, World
from nfqproxy.errors import NfqproxyError
from nfqproxy.lab.servers import require_programs, server_directory, start_web
from nfqproxy.lab.topology import Pod

_GRACE_S = 20.0
MAX_CALLS = 20_000
"""Of one client."""
FIRST_PORT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What one client experienced, call by call."""

    connect_ns: Sequence[int]
    answer_ns: Sequence[int]
    """From the start of connect() to the first bytes of the answer."""
    backends: Counter[str]
    """Calls by the backend that answered, ``address:port``."""

    def __len__(self) -> int:
        return len(self.connect_ns)


@contextlib.contextmanager
def calling(
    world: World,
    *,
    cpu: int,
    seconds: float,
    rate: int = 0,
    calls: int = MAX_CALLS,
    first_port: int = FIRST_PORT,
) -> Iterator[Callable[[], Calls]]:
    """Starts a client that calls the Service one call at a time; what it gives waits for the end.

    ``rate``: calls per second, 0 for one after the other. Each call is from a port of its own, from
    ``first_port`` on; of several clients each needs as many. Left early, the client is stopped. A call
    that fails is a :class:`NfqproxyError`.
    """
    words = [str(native.program("calls")), "-n", str(world.client.path)]
    words += ["-d", world.measured.address, "-p", str(world.measured.port)]
    words += ["-s", str(first_port), "-k", str(calls), "-t", str(seconds), "-r", str(rate)]
    running = subprocess.Popen(
        ["taskset", "-c", str(cpu), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def result() -> Calls:
        try:
            output, errors = running.communicate(timeout=seconds + _GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise NfqproxyError(f"the client did not end within {_GRACE_S:.0f} s") from error
        if running.returncode:
            raise NfqproxyError(f"a client's call failed: {errors.strip()}")
        rows = [line.split() for line in output.splitlines()]
        if not rows:
            raise NfqproxyError("the client made no call")
        return Calls(
            connect_ns=[int(row[0]) for row in rows],
            answer_ns=[int(row[1]) for row in rows],
            backends=Counter(f"{row[2]}:{BACKEND_PORT}" for row in rows),
        )

    try:
        yield result
    finally:
        running.kill()
        running.communicate()


@contextlib.contextmanager
def web_servers(world: World, cpu: int) -> Iterator[None]:
    """nginx in every pod, on one CPU, which answers with the pod's address."""
    require_programs(["nginx"])
    with server_directory() as directory:
        try:
            for pod, backend in zip(world.pods, world.backends, strict=True):
                place = Pod(
                    name=backend.address,
                    namespace=pod,
                    node=NODE_NAME,
                    address4=backend.address,
                    address6="",
                    host_device=backend.device,
                )
                server = start_web(place, directory, ports=(BACKEND_PORT,))
                for pid in descendants(server.pid):
                    pin(pid, cpu)
            yield
        finally:
            # Before their directory goes.
            for pod in world.pods:
                pod.close()


def spare_cpu(placement: Placement, otherwise: int) -> int:
    """A CPU that neither load nor worker has; without one, ``otherwise``."""
    others = os.sched_getaffinity(0) - {placement.sender, placement.worker}
    return min(others, default=otherwise)


def outlast(world: World) -> None:
    """Lets entries of closed connections stand long enough to be counted after a load."""
    world.node.sysctl({"net/netfilter/nf_conntrack_tcp_timeout_close": 120})
