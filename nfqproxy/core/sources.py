"""Class of a packet's source: pod, this node, elsewhere (SEMANTICS 2.4).

Two detectors look at the source address (ClusterCIDR, NodeCIDR), two at the interface a packet came in
by (BridgeInterface, InterfaceNamePrefix). :class:`SourceClasses` knows all four; what it hands out for
an interface is a mapping, so that the packet path pays one look-up whatever the detector. For the two
by interface :class:`PodArrivals` remembers which interfaces are the pods'.
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Protocol

from nfqproxy.model import ClientClass, PodDetector

_LOOPBACK_V4 = 127
_LOOPBACK_V6 = bytes(15) + b"\1"
_MAX_REMEMBERED = 65536


def _prefixes(cidrs: Iterable[str]) -> list[tuple[int, int, int]]:
    """(address length in bytes, network bits, host bits to shift away) of each network."""
    found = []
    for cidr in cidrs:
        network = ip_network(cidr)
        host_bits = network.max_prefixlen - network.prefixlen
        packed = network.network_address.packed
        found.append((len(packed), int.from_bytes(packed) >> host_bits, host_bits))
    return found


class AllowedSources(dict[bytes, bool]):
    """Packed address -> may it connect; computed at the first look, bounded like SourceClassifier."""

    def __init__(self, cidrs: Iterable[str]) -> None:
        super().__init__()
        self._prefixes = _prefixes(cidrs)

    def __missing__(self, address: bytes) -> bool:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        value, length = int.from_bytes(address), len(address)
        self[address] = found = any(
            size == length and value >> host_bits == network
            for size, network, host_bits in self._prefixes
        )
        return found


class SourceClassifier(dict[bytes, ClientClass]):
    """Packed address -> class. A dict whose misses are computed, so that a hit costs one look-up.

    Bounded: it forgets everything when it has seen 65,536 addresses, which a SYN flood with forged
    sources can bring about, and which costs one slower look-up per address afterwards.
    """

    def __init__(self, cluster_cidrs: Iterable[str], node_addresses: Iterable[bytes]) -> None:
        super().__init__()
        self._prefixes = _prefixes(cluster_cidrs)
        self._local = frozenset(node_addresses)

    def __missing__(self, address: bytes) -> ClientClass:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        self[address] = found = self._classify(address)
        return found

    def _classify(self, address: bytes) -> ClientClass:
        value, length = int.from_bytes(address), len(address)
        for size, network, host_bits in self._prefixes:
            if size == length and value >> host_bits == network:
                return ClientClass.POD
        is_loopback = address[0] == _LOOPBACK_V4 if length == 4 else address == _LOOPBACK_V6
        if is_loopback or address in self._local:
            return ClientClass.NODE
        return ClientClass.EXTERNAL


class _AllPods(dict[bytes, ClientClass]):
    def __missing__(self, address: bytes) -> ClientClass:
        return ClientClass.POD


class SourceClasses:
    """The classes of sources on one node, by the interface a packet came in by.

    ``node_addresses``: the packed addresses of this node.
    """

    def __init__(self, detector: PodDetector, node_addresses: Iterable[bytes]) -> None:
        self.detector = detector
        """What tells pods."""
        self._bridge = detector.bridge_interface
        self._prefix = detector.interface_name_prefix
        self.by_address: Mapping[bytes, ClientClass] = SourceClassifier(
            detector.cluster_cidrs, node_addresses
        )
        """Packed address -> class, of packets that came in by no interface of pods."""
        self.pods: Mapping[bytes, ClientClass] = _AllPods()
        """The same of the others."""

    def is_pod_interface(self, interface: str) -> bool:
        """Whether the detector counts all that arrives by this interface as pods."""
        if self._bridge:
            return interface == self._bridge
        return bool(self._prefix) and interface.startswith(self._prefix)

    def arriving_by(self, interface: str | None) -> Mapping[bytes, ClientClass]:
        """Packed source address -> class; ``interface`` None: sent by a process of this node.

        As with iptables' ``-i``, what a process sends arrives by no interface.
        """
        if interface is not None and self.is_pod_interface(interface):
            return self.pods
        return self.by_address


class Interfaces(Protocol):
    """The interfaces by which queued packets came in; a name belongs to an index for a while only."""

    def changed(self) -> bool:
        """True when an interface has come, gone or been renamed since the last call."""
        ...

    def name(self, arrival: int) -> str | None:
        """The present name of the interface of a packet's ``arrival``.

        Empty for what a process of this node sends; None when that interface has gone.
        """
        ...


class PodArrivals(dict[int, bool]):
    """``arrival`` of a queued packet -> did it come in by an interface of pods. Misses are computed.

    To be refreshed before each batch. A change of any interface empties it: indices are given out anew
    and names change hands, and an old answer would let a stranger pass for a pod. The kernel tells of a
    change before the first packet can come in by the new interface, so a batch read before the refresh
    is judged by names at least as new as its packets; packets of an interface that went down meanwhile
    are dropped by the queue itself (nfqnl_dev_drop).
    """

    def __init__(self, classes: SourceClasses, interfaces: Interfaces) -> None:
        super().__init__()
        self._is_pod_interface = classes.is_pod_interface
        self._interfaces = interfaces

    def refresh(self) -> None:
        """Forget everything if an interface has changed."""
        if self._interfaces.changed():
            self.clear()

    def __missing__(self, arrival: int) -> bool:
        name = self._interfaces.name(arrival)
        if name is None:
            return False
        self[arrival] = found = self._is_pod_interface(name)
        return found
