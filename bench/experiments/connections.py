"""New TCP connections: how many a second, and what one costs, at each number of Services.

The load is SYNs to sinks, as fast as they are taken. The contenders ``c`` and ``dnat`` serve the
measured Service alone at every number: they are the floors, not tables.
"""

from collections.abc import Callable

from bench.contenders import (
    CReference,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    MarkPath,
    NetfilterqueueReader,
    Nfqproxy,
    Overlay,
)
from bench.experiments.programming import most
from bench.flows import observe
from bench.observation import Observation, Scale
from bench.stands import Setup
from bench.world import world

_CONTENDERS = (Nfqproxy, CReference, IptablesDnat, KubeProxyIptables, KubeProxyNftables)
_VARIANTS = (MarkPath, Overlay, NetfilterqueueReader)
"""nfqproxy's other data path, mode and reader: at the least Services, and at the bars' number."""


class Connections:
    """Metrics ``rate``, ``worker_cpu``, ``path_cpu``; parameter ``services``."""

    name = "connections"
    title = "New TCP connections: how many per second, and CPU per connection?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if connections went wrong."""
        setups = [
            Setup(contender(), world((1, 1, 1), services=services), {"services": services})
            for services in scale.services
            for contender in _CONTENDERS
        ]
        setups += [
            Setup(contender(), world((1, 1, 1), services=services), {"services": services})
            for services in sorted({min(scale.services), most(scale)})
            for contender in _VARIANTS
        ]
        return observe(self.name, setups, scale, progress)
