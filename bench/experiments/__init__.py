"""One module per kind of measurement; each is a :class:`bench.observation.Experiment`."""

from bench.experiments.connections import Connections
from bench.experiments.scaling import Scaling
from bench.experiments.udp_flows import UdpFlows
from bench.observation import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (Connections(), UdpFlows(), Scaling())
}
"""By name, which is also the module's."""
