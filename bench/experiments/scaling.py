"""More workers: does the rate grow with their number, and what does a connection cost then?

The kernel spreads packets over the workers' queues by a hash of the addresses (``--queue-balance``);
the load comes from some hundred addresses, so every worker gets about its part, and one that got
less than half of it ends the run. Workers take CPUs from the last downwards; the load has the first.
The parameter ``placement`` says whether that left every worker a CPU of its own: ``own``, ``with the
load`` (a worker runs on the load's CPU, so the figure is too low) or ``shared`` (several workers on
one CPU: it shows only what more queues cost).
"""

import os
from collections.abc import Callable

from bench.contenders import Nfqproxy
from bench.flows import Sample, observe
from bench.observation import Observation, Scale
from bench.stands import Setup, Stand, WrongResultError
from bench.world import world

_LEAST_PART = 0.5


class Scaling:
    """Metrics ``rate``, ``worker_cpu``, ``path_cpu``, ``imbalance``; parameter ``workers``."""

    name = "scaling"
    title = "Workers: how do rate and CPU per connection change with their number?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if connections went wrong or a worker got too few."""
        setups = [
            Setup(
                Nfqproxy(workers=workers),
                world((1, 1, 1)),
                {"workers": workers, "placement": _placement(workers)},
            )
            for workers in scale.workers
        ]
        return observe(self.name, setups, scale, progress, also=self._imbalance)

    def _imbalance(self, stand: Stand, sample: Sample) -> list[Observation]:
        """The most packets that a worker got, of the mean."""
        counts = sample.queued.values()
        mean = sample.sent.connections / len(stand.serving.workers)
        if len(counts) != len(stand.serving.workers) or min(counts) < mean * _LEAST_PART:
            raise WrongResultError(
                f"{stand}, round {sample.round}: the workers got {sorted(counts)} packets of "
                f"{sample.sent.connections}, so this is not a measure of that many workers"
            )
        value = max(counts) / mean
        return [stand.observation(self.name, "imbalance", "ratio", value, sample.round)]


def _placement(workers: int) -> str:
    cpus = len(os.sched_getaffinity(0))
    if workers < cpus:
        return "own"
    return "with the load" if workers == cpus else "shared"
