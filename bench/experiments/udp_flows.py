"""New UDP flows: one datagram each from a source that nobody has seen; conntrack entries are made.

At the largest number of Services up to 5,000; the measured one is UDP.
"""

from collections.abc import Callable

from bench.contenders import IptablesDnat, KubeProxyIptables, KubeProxyNftables, Nfqproxy
from bench.experiments.programming import most
from bench.flows import observe
from bench.observation import Observation, Scale
from bench.stands import Setup
from bench.world import world

_CONTENDERS = (Nfqproxy, IptablesDnat, KubeProxyIptables, KubeProxyNftables)


class UdpFlows:
    """Metrics ``rate``, ``worker_cpu``, ``path_cpu``; parameter ``services``."""

    name = "udp_flows"
    title = "New UDP flows: how many per second, and CPU per flow?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if flows went wrong."""
        services = most(scale)
        setups = [
            Setup(
                contender(),
                world((1, 1, 1), services=services, protocol="udp"),
                {"services": services},
            )
            for contender in _CONTENDERS
        ]
        return observe(self.name, setups, scale, progress)
