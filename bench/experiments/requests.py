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
from bench.established import SECONDS, carried, setups
from bench.observation import Observation, Scale
from bench.stands import Stand, observations
from bench.world import World
from nfqproxy.errors import NfqproxyError

_SCRIPT = Path(__file__).parents[1] / "wrk.lua"
_CONNECTIONS = 32
_QUANTILES = ("0.5", "0.9", "0.99", "0.999")


class Requests:
    """Metrics ``rate`` in requests per second, ``cpu`` in us per request, ``latency`` in us by ``quantile``.

    And ``userspace_packets``: those of established connections that reached userspace; above 0 ends
    the run.
    """

    name = "requests"
    title = "Requests per second and their latency over established connections"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if a request failed or a packet took a wrong way."""

        def measured(stand: Stand, number: int) -> list[Observation]:
            if number == 0:
                return []  # a load of seconds needs no warming up
            load = carried(stand, number, lambda: _wrk(stand))
            said = load.result
            rate = said["requests"] / said["duration_us"] * 1e6
            return [
                stand.observation(self.name, "rate", "1/s", rate, number),
                stand.observation(
                    self.name, "cpu", "us", load.cpu_ns / 1000 / said["requests"], number
                ),
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

        return observations(setups(scale), scale, progress, measured, _servers, turns=scale.turns)


@contextlib.contextmanager
def _servers(place: World, placement: Placement) -> Iterator[None]:
    with web_servers(place, spare_cpu(placement, otherwise=placement.worker)):
        outlast(place)
        yield


def _wrk(stand: Stand) -> dict[str, float]:
    """What wrk.lua prints; a failed request is an error."""
    measured = stand.world.measured
    words = ["wrk", "-t", "1", "-c", str(_CONNECTIONS), "-d", f"{SECONDS}s", "-s", str(_SCRIPT)]
    words.append(f"http://{measured.address}:{measured.port}/")
    cpu = str(stand.placement.sender)
    done = stand.world.client.run("taskset", "-c", cpu, *words, timeout_s=SECONDS + 20)
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if said["errors"] or not said["requests"]:
        raise NfqproxyError(
            f"{said['errors']} of {said['requests']} requests failed: {done.stdout.strip()}"
        )
    return said
