"""More new connections than the worker takes: who serves them, and is any lost?

The load is sent regardless of what waits, 2 and 10 times as fast as the worker takes it. What it takes is
measured anew in every round, before the load: ``capacity``. ``offered`` is what the sender really reached, and
``reached`` how many times the capacity that was.

With a CPU of its own (parameter ``worker``: ``own CPU``) the worker is asked for 2 times as much; one sender, in
whose calls the kernel's fallback works too, may not reach that, and 10 times are out of its reach. So
the rest is measured with a worker that shares its CPU with a busy neighbour of a higher priority
(``slowed``): its capacity is then about a tenth of the true one.

When the worker's queue (of 1,024 packets here) is full the kernel lets packets pass undecided
(fail-open) and nfqproxy's fallback rules serve them. Every connection must have arrived at a backend
over one right entry, the shares of both together as the weights say; one that is lost ends the run.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.contenders import Nfqproxy
from bench.flows import measure
from bench.load import Load
from bench.native import program
from bench.observation import Observation, Scale
from bench.process import service
from bench.stands import Setup, Stand, checked, observations
from bench.world import check_table_room, world

# A short queue, so that few connections overfill it: at factor 2 half of them wait at the end.
_QUEUE_LENGTH = 1024
_LEAST_CONNECTIONS = 6 * _QUEUE_LENGTH
_BATCH = 64
_SLOWED = 10
"""Nice value; the neighbour's is 0."""
_NEIGHBOUR = ("sh", "-c", "while :; do :; done")


def _set_nice(pid: int, nice: int) -> None:
    """Sets a process's priority against everybody else on its CPU.

    The worker leads a session of its own, and with sched_autogroup_enabled it is sessions that share a CPU:
    then their own nice value counts (sched(7), "The autogroup feature").
    """
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    group = Path("/proc") / str(pid) / "autogroup"
    if group.exists():
        group.write_text(f"{nice}\n")


class Overload:
    """Metrics ``capacity``, ``offered`` in 1/s, ``reached``; ``by_worker``, ``by_fallback``, ``lost`` as shares.

    Parameters ``worker``: ``own CPU`` or ``slowed``; ``factor``: how many times the capacity was asked for.
    """

    name = "overload"
    title = "More connections than the worker takes: who serves them?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if a connection was lost or went wrong."""
        connections = max(scale.connections, _LEAST_CONNECTIONS)
        checked([Nfqproxy()])
        check_table_room(connections)
        program("flood")

        def measured(stand: Stand, number: int) -> list[Observation]:
            if number == 0:
                return []  # every round begins with a load that warms up
            found = self._observe(stand, number, connections, (2,), "own CPU")
            for worker in stand.serving.workers:
                _set_nice(worker, _SLOWED)
            # It belongs to the node's namespace only so that it goes with it.
            with service(stand.world.node, *_NEIGHBOUR, cpu=stand.placement.worker):
                found += self._observe(stand, number, connections, (2, 10), "slowed")
            for worker in stand.serving.workers:
                _set_nice(worker, 0)
            return found

        setups = [Setup(Nfqproxy(queue_length=_QUEUE_LENGTH), world((1, 1, 1)))]
        return observations(setups, scale, progress, measured)

    def _observe(
        self, stand: Stand, number: int, connections: int, factors: Sequence[int], worker: str
    ) -> list[Observation]:
        cpu = stand.placement.sender
        taken = Load(connections=connections, cpu=cpu, in_flight=_QUEUE_LENGTH - 2 * _BATCH)
        paced = measure(stand, taken, round_number=number)
        capacity = paced.sent.per_second
        found: list[Observation] = []
        for factor in factors:
            load = Load(
                connections=connections,
                cpu=cpu,
                in_flight=0,
                rate=round(capacity * factor),
                batch=_BATCH,
            )
            sample = measure(stand, load, round_number=number, may_fall_back=True)
            by_worker = (sample.installed or 0) / connections
            arrived = sum(sample.shares.values()) / connections
            offered = connections / sample.sent.sending_ns * 1e9
            values = (
                ("capacity", "1/s", capacity),
                ("offered", "1/s", offered),
                ("reached", "x", offered / capacity),
                ("by_worker", "share", by_worker),
                ("by_fallback", "share", arrived - by_worker),
                ("lost", "share", 1 - arrived),
            )
            found += [
                stand.observation(self.name, *value, number, factor=factor, worker=worker)
                for value in values
            ]
        return found
