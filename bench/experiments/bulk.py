"""Throughput of one established connection: iperf3 through each contender.

With one backend also because iperf3 talks to its server over two connections.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

from bench.clients import outlast, spare_cpu
from bench.contenders import Placement
from bench.established import SECONDS, carried, setups
from bench.observation import Observation, Scale
from bench.process import service
from bench.services import BACKEND_PORT
from bench.stands import Stand, observations
from bench.world import World


class Bulk:
    """Metrics ``throughput`` in bit/s, as the server received it, and ``cpu`` in ms per gigabyte."""

    name = "bulk"
    title = "Throughput of one established TCP connection"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if the transfer failed or a packet took a wrong way."""

        def measured(stand: Stand, number: int) -> list[Observation]:
            if number == 0:
                return []  # a load of seconds needs no warming up
            load = carried(stand, number, lambda: _iperf3(stand))
            bits_per_second, received = load.result
            cost = load.cpu_ns / 1e6 / (received / 1e9)
            return [
                stand.observation(self.name, "throughput", "bit/s", bits_per_second, number),
                stand.observation(self.name, "cpu", "ms/GB", cost, number),
            ]

        return observations(setups(scale), scale, progress, measured, _server, turns=scale.turns)


@contextlib.contextmanager
def _server(place: World, placement: Placement) -> Iterator[None]:
    [pod], [backend] = place.pods, place.backends
    words = ("iperf3", "--server", "--port", str(BACKEND_PORT))
    with service(pod, *words, cpu=spare_cpu(placement, otherwise=placement.worker)) as running:
        pod.wait_for_port(backend.address, BACKEND_PORT, process=running.popen)
        outlast(place)
        yield


def _iperf3(stand: Stand) -> tuple[float, float]:
    """Bits per second and bytes, as the server counts them."""
    measured = stand.world.measured
    words = ["iperf3", "--client", measured.address, "--port", str(measured.port), "--json"]
    cpu = str(stand.placement.sender)
    done = stand.world.client.run(
        "taskset", "-c", cpu, *words, "--time", str(SECONDS), timeout_s=SECONDS + 20
    )
    received: dict[str, float] = json.loads(done.stdout)["end"]["sum_received"]
    return received["bits_per_second"], received["bytes"]
