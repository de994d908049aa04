"""Requests over connections that stay open: wrk against nginx, keep-alive.

Userspace has seen the first packet of each connection; from then on nfqproxy must cost what a
plain DNAT rule costs. That no later packet reached a queue is proved in every round.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.clients import outlast, spare_cpu, web_servers
from bench.contenders import Placement
from bench.established import CONTENDERS, carried, whole_seconds
from bench.observation import Observation, Scale
from bench.stands import Setup, Stand, checked, observations
from bench.world import World, world
from nfqproxy.errors import NfqproxyError

_SCRIPT = Path(__file__).parents[1] / "wrk.lua"
_CONNECTIONS = 32
_QUANTILES = ("0.5", "0.9", "0.99", "0.999")


class Requests:
    """Metrics ``rate`` in requests per second, ``latency`` in us with parameter ``quantile``.

    And ``userspace_packets``: those of established connections that reached userspace; above 0 ends
    the run.
    """

    name = "requests"
    title = "Requests per second and their latency over established connections"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if a request failed or a packet took a wrong way."""
        services = min(scale.services)
        setups = [
            Setup(
                contender,
                world((1, 1, 1), services=services, has_pods=True),
                {"services": services},
            )
            for contender in checked(contender() for contender in CONTENDERS)
        ]

        def measured(stand: Stand, number: int) -> list[Observation]:
            if number == 0:
                return []  # a load of seconds needs no warming up
            seconds = whole_seconds(scale.seconds)
            load = carried(stand, number, lambda: _wrk(stand, seconds))
            said = load.result
            rate = said["requests"] / said["duration_us"] * 1e6
            return [
                stand.observation(self.name, "rate", "1/s", rate, number),
                stand.observation(
                    self.name, "userspace_packets", "packets", load.userspace_packets, number
                ),
                *(
                    stand.observation(
                        self.name, "latency", "us", said[text], number, quantile=float(text)
                    )
                    for text in _QUANTILES
                ),
            ]

        return observations(setups, scale, progress, measured, _servers)


@contextlib.contextmanager
def _servers(place: World, placement: Placement) -> Iterator[None]:
    with web_servers(place, spare_cpu(placement, otherwise=placement.worker)):
        outlast(place)
        yield


def _wrk(stand: Stand, seconds: int) -> dict[str, float]:
    """What wrk.lua prints; a failed request is an error."""
    measured = stand.world.measured
    words = ["wrk", "-t", "1", "-c", str(_CONNECTIONS), "-d", f"{seconds}s", "-s", str(_SCRIPT)]
    words.append(f"http://{measured.address}:{measured.port}/")
    cpu = str(stand.placement.sender)
    done = stand.world.client.run("taskset", "-c", cpu, *words, timeout_s=seconds + 20)
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if said["errors"] or not said["requests"]:
        raise NfqproxyError(
            f"{said['errors']} of {said['requests']} requests failed: {done.stdout.strip()}"
        )
    return said
