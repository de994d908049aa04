"""The load of new flows (bench/c/flood.c): bounded by what waits in the node's queues, or not."""

import contextlib
import ipaddress
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import native
from bench.services import PORT, VIP
from bench.world import LOAD_SOURCES, NODE_MAC, World
from nfqproxy.errors import NfqproxyError

_TIMEOUT_S = 120.0
_ADDRESSES = 512
"""Most source addresses of one load."""
_LEAST_PORTS = 8
_NO_LIMIT = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    connections: int
    """New flows: TCP SYNs, or UDP datagrams where the measured Service is UDP."""
    cpu: int
    """The sender's CPU."""
    in_flight: int = 1024
    """Most packets waiting in the node's queues before a batch is sent; 0: send regardless."""
    rate: int = 0
    """Packets per second at most; 0: as fast as they are taken."""
    batch: int = 64
    """Packets per system call; the kernel works on them one after the other before anything else."""
    established: int = 0
    """Send ACKs of so many connections in turn instead; 0: first packets, each of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What one load did."""

    connections: int
    sending_ns: int
    """From the first frame to the last."""
    wall_ns: int
    """From the first frame until no packet waited any more."""
    cpu_ns: int
    """The generator's CPU time, with the node's work that ran inside its system calls."""
    naps: int
    """Times it slept because enough packets were waiting; 0: the sender was the bottleneck."""
    most_waiting: int
    """Most packets that were seen waiting at once."""

    @property
    def per_second(self) -> float:
        """Flows that were dealt with per second."""
        return self.connections / self.wall_ns * 1e9


def send(world: World, load: Load, number: int = 0) -> Sent:
    """Sends the load; returns when the queues are empty. Raises :class:`NfqproxyError` if it fails.

    ``number``: loads of different numbers (modulo 128) come from different addresses, so that one
    does not meet what the kernel remembers of the one before.
    """
    with sending(world, load, number) as result:
        return result()


@contextlib.contextmanager
def sending(world: World, load: Load, number: int = 0) -> Iterator[Callable[[], Sent]]:
    """Begins as `send`; what it gives waits for the end. Left before that, the load is stopped."""
    command = _command(world, load, number)
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def result() -> Sent:
        try:
            output, errors = running.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise NfqproxyError(f"the load did not end within {_TIMEOUT_S:.0f} s") from error
        if running.returncode:
            raise NfqproxyError(f"the load stopped: {errors.strip()}")
        said = json.loads(output)
        return Sent(
            connections=said["sent"],
            sending_ns=said["sending_ns"],
            wall_ns=said["wall_ns"],
            cpu_ns=(said["user_us"] + said["system_us"]) * 1000,
            naps=said["naps"],
            most_waiting=said["most_waiting"],
        )

    try:
        yield result
    finally:
        running.kill()
        running.communicate()


def _command(world: World, load: Load, number: int) -> list[str]:
    # Few ports to an address, as queues are chosen by address, but no more than 512 addresses.
    flows = load.established or load.connections
    ports = max(_LEAST_PORTS, -(-flows // _ADDRESSES))
    sources = ipaddress.IPv4Network(LOAD_SOURCES)
    first = sources[number * _ADDRESSES % sources.num_addresses]
    options = ["-c", str(world.client.path), "-n", str(world.node.path), "-i", "uplink"]
    options += ["-m", NODE_MAC, "-d", VIP, "-p", str(PORT), "-f", str(first), "-s", str(ports)]
    options += ["-k", str(load.connections), "-w", str(load.in_flight or _NO_LIMIT)]
    options += ["-r", str(load.rate), "-b", str(load.batch)]
    options += ["-u"] if world.measured.protocol == "udp" else []
    options += ["-e", str(load.established)] if load.established else []
    return ["taskset", "-c", str(load.cpu), str(native.program("flood")), *options]
