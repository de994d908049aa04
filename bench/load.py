"""The SYN load (bench/c/synflood.c): bounded by what waits in the node's queues."""

import json
import subprocess
from dataclasses import dataclass

from bench import native
from bench.world import FIRST_SOURCE, NODE_MAC, PORT, VIP, World
from nfqproxy.errors import NfqproxyError

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What one load did."""

    connections: int
    wall_ns: int
    """From the first frame until no packet waited any more."""
    cpu_ns: int
    """The generator's CPU time, with the node's work that ran inside its system calls."""
    naps: int
    """Times it slept because enough packets were waiting; 0: the sender was the bottleneck."""
    most_waiting: int
    """Most packets that were seen waiting at once."""


def send(world: World, *, connections: int, in_flight: int, rate: int, cpu: int) -> Sent:
    """Sends ``connections`` SYNs, each from its own source; returns when the queues are empty.

    ``in_flight``: most packets waiting before a batch of 64 is sent. ``rate``: packets per second
    at most, 0 for no limit. Every call sends the same tuples.
    """
    options = ["-c", str(world.client.path), "-n", str(world.node.path), "-i", "uplink"]
    options += ["-m", NODE_MAC, "-d", VIP, "-p", str(PORT), "-f", FIRST_SOURCE]
    options += ["-k", str(connections), "-w", str(in_flight), "-r", str(rate)]
    command = ["taskset", "-c", str(cpu), str(native.program("synflood")), *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise NfqproxyError(f"the load did not end within {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise NfqproxyError(f"the load stopped: {done.stderr.strip()}")
    said = json.loads(done.stdout)
    return Sent(
        connections=said["sent"],
        wall_ns=said["wall_ns"],
        cpu_ns=(said["user_us"] + said["system_us"]) * 1000,
        naps=said["naps"],
        most_waiting=said["most_waiting"],
    )
