"""Class of a packet's source address: pod, this node, elsewhere (SEMANTICS 2.4, detector ClusterCIDR)."""

from collections.abc import Iterable
from ipaddress import ip_network

from nfqproxy.model import ClientClass

_LOOPBACK_V4 = 127
_MAX_REMEMBERED = 65536


class SourceClassifier(dict[bytes, ClientClass]):
    """Packed address -> class. A dict whose misses are computed, so that a hit costs one look-up.

    Bounded: it forgets everything when it has seen 65,536 addresses, which a SYN flood with forged
    sources can bring about, and which costs one slower look-up per address afterwards.
    """

    def __init__(self, cluster_cidrs: Iterable[str], node_addresses: Iterable[bytes]) -> None:
        super().__init__()
        networks = [ip_network(cidr) for cidr in cluster_cidrs]
        self._prefixes = [
            (
                network.network_address.packed,
                int.from_bytes(network.network_address.packed),
                network.max_prefixlen - network.prefixlen,
            )
            for network in networks
        ]
        self._local = frozenset(node_addresses)

    def __missing__(self, address: bytes) -> ClientClass:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        self[address] = found = self._classify(address)
        return found

    def _classify(self, address: bytes) -> ClientClass:
        value = int.from_bytes(address)
        for packed, network, host_bits in self._prefixes:
            if len(packed) == len(address) and value >> host_bits == network >> host_bits:
                return ClientClass.POD
        if address in self._local or (len(address) == 4 and address[0] == _LOOPBACK_V4):
            return ClientClass.NODE
        return ClientClass.EXTERNAL
