"""One module per kind of measurement; each is a :class:`bench.observation.Experiment`."""

from bench.experiments.bulk import Bulk
from bench.experiments.connections import Connections
from bench.experiments.latency import Latency
from bench.experiments.overload import Overload
from bench.experiments.requests import Requests
from bench.experiments.scaling import Scaling
from bench.experiments.udp_flows import UdpFlows
from bench.observation import Experiment

_ALL: tuple[Experiment, ...] = (
    Connections(),
    Latency(),
    Requests(),
    Bulk(),
    UdpFlows(),
    Overload(),
    Scaling(),
)

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
"""By name, which is also the module's."""
