"""One module per kind of measurement; each is a :class:`bench.observation.Experiment`."""

from collections.abc import Iterable

from bench.experiments.bulk import Bulk
from bench.experiments.connections import Connections
from bench.experiments.latency import Latency
from bench.experiments.memory import Memory
from bench.experiments.overload import Overload
from bench.experiments.packets import Packets
from bench.experiments.programming import Programming
from bench.experiments.requests import Requests
from bench.experiments.scaling import Scaling
from bench.experiments.udp_flows import UdpFlows
from bench.observation import Experiment
from nfqproxy.errors import InputError

_ALL: tuple[Experiment, ...] = (
    Connections(),
    Latency(),
    Packets(),
    Requests(),
    Bulk(),
    UdpFlows(),
    Overload(),
    Scaling(),
    Programming(),
    Memory(),
)

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
"""By name, which is also the module's; in the order in which `bench run` takes them."""


def experiments(names: Iterable[str]) -> list[Experiment]:
    """The named ones, each once, in the order given; :class:`InputError` lists the known names."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise InputError(f"no experiment is named {name!r}: choose from {known}")
    return [EXPERIMENTS[name] for name in chosen]
