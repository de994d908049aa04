"""What is measured: one class each, registered under a hyphenated name.

A contender serves the Service of a :class:`~bench.world.World` and says which processes do it.
Adding one is a subclass of :class:`~bench.contenders.base.Contender` and a line in the table below.
"""

from bench.contenders.base import Contender, Placement, Serving
from bench.contenders.kernel import IptablesDnat, NoService
from bench.contenders.kubeproxy import KubeProxyIptables, KubeProxyNftables
from bench.contenders.proxy import MarkPath, NetfilterqueueReader, NetlinkReader, Nfqproxy, Overlay
from bench.contenders.reference import CReference
from bench.contenders.relay import Haproxy, NginxStream
from nfqproxy.errors import InputError

__all__ = [
    "CONTENDERS",
    "CReference",
    "Contender",
    "Haproxy",
    "IptablesDnat",
    "KubeProxyIptables",
    "KubeProxyNftables",
    "MarkPath",
    "NetfilterqueueReader",
    "Nfqproxy",
    "NginxStream",
    "Overlay",
    "Placement",
    "Serving",
    "named",
]

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Nfqproxy,
        NetlinkReader,
        MarkPath,
        Overlay,
        NetfilterqueueReader,
        CReference,
        IptablesDnat,
        KubeProxyIptables,
        KubeProxyNftables,
        Haproxy,
        NginxStream,
        NoService,
    )
}


def named(name: str) -> Contender:
    """A new contender; :class:`InputError` lists the known names."""
    try:
        return CONTENDERS[name]()
    except KeyError:
        known = ", ".join(CONTENDERS)
        raise InputError(f"no contender is named {name!r}: choose from {known}") from None
