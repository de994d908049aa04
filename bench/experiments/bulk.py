"""Throughput of one established connection: iperf3 through each contender.

One backend, because iperf3 talks to its server over two connections.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

from bench.clients import outlast, spare_cpu
from bench.contenders import Placement
from bench.established import CONTENDERS, carried, whole_seconds
from bench.observation import Observation, Scale
from bench.process import service
from bench.services import BACKEND_PORT
from bench.stands import Setup, Stand, checked, observations
from bench.world import World, world


class Bulk:
    """Metric ``throughput`` in bit/s, as the server received it."""

    name = "bulk"
    title = "Throughput of one established TCP connection"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if the transfer failed or a packet took a wrong way."""
        services = min(scale.services)
        setups = [
            Setup(contender, world((1,), services=services, has_pods=True), {"services": services})
            for contender in checked(contender() for contender in CONTENDERS)
        ]

        def measured(stand: Stand, number: int) -> list[Observation]:
            if number == 0:
                return []  # a load of seconds needs no warming up
            seconds = whole_seconds(scale.seconds)
            value = carried(stand, number, lambda: _iperf3(stand, seconds)).result
            return [stand.observation(self.name, "throughput", "bit/s", value, number)]

        return observations(setups, scale, progress, measured, _server)


@contextlib.contextmanager
def _server(place: World, placement: Placement) -> Iterator[None]:
    [pod], [backend] = place.pods, place.backends
    words = ("iperf3", "--server", "--port", str(BACKEND_PORT))
    with service(pod, *words, cpu=spare_cpu(placement, otherwise=placement.worker)) as running:
        pod.wait_for_port(backend.address, BACKEND_PORT, process=running.popen)
        outlast(place)
        yield


def _iperf3(stand: Stand, seconds: int) -> float:
    measured = stand.world.measured
    words = ["iperf3", "--client", measured.address, "--port", str(measured.port), "--json"]
    cpu = str(stand.placement.sender)
    done = stand.world.client.run(
        "taskset", "-c", cpu, *words, "--time", str(seconds), timeout_s=seconds + 20
    )
    received: float = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]
    return received
