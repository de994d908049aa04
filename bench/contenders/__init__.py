"""What is measured: one class each, registered under a hyphenated name.

A contender serves the Service of a :class:`~bench.world.World` and says which processes do it.
Adding one is a subclass of :class:`~bench.contenders.base.Contender` and a line in the table below.
"""

from bench.contenders.base import Contender, Placement, Serving
from bench.contenders.kernel import IptablesDnat, NoService
from bench.contenders.proxy import MarkPath, NetfilterqueueReader, NetlinkReader
from bench.contenders.reference import CReference
from nfqproxy.errors import InputError

__all__ = ["CONTENDERS", "Contender", "Placement", "Serving", "named"]

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        NetlinkReader,
        MarkPath,
        NetfilterqueueReader,
        CReference,
        IptablesDnat,
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
