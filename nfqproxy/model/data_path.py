"""How a worker's decision reaches the kernel, and the bits of the packet mark that carry it."""

from enum import StrEnum
from functools import cached_property

DEFAULT_MARK_MASK = 0x3F7F
"""All that well-known neighbours leave free: kube-proxy has 0x8000 and 0x4000, Calico by default
0xffff0000, the CNI of AWS 0x80."""
MIN_MARK_BITS = 3
_MARK_BITS = 32


class DataPath(StrEnum):
    """What a worker does with its decision."""

    CTNETLINK = "ctnetlink"
    """Queued before conntrack; the worker creates the conntrack entry, NAT included, by ctnetlink."""
    MARK = "mark"
    """Queued behind conntrack; the worker's verdict marks the packet, and a nat rule translates by it."""


class MarkMask:
    """The bits of a packet's mark that are ours; all others belong to neighbours and are kept.

    The highest bit asks for masquerade, the next one for the source to be kept; whatever carries one of
    the two has been decided, so that no nat rule of others is asked. The rest hold a number: which backend
    of the packet's frontend. Raises ValueError for fewer than three bits, or more than a mark has.
    """

    def __init__(self, mask: int = DEFAULT_MARK_MASK) -> None:
        bits = [1 << place for place in range(_MARK_BITS) if mask >> place & 1]
        if not 0 < mask < 1 << _MARK_BITS or len(bits) < MIN_MARK_BITS:
            raise ValueError(
                f"{mask:#x} is no mask of {MIN_MARK_BITS} to {_MARK_BITS} bits; give one such as"
                f" {DEFAULT_MARK_MASK:#x}"
            )
        self.mask = mask
        self.masquerade = bits[-1]
        self.keep = bits[-2]
        self.numbers = mask & ~(self.masquerade | self.keep)
        """The bits that hold the number of a backend."""
        self._number_bits = bits[:-2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MarkMask) and other.mask == self.mask

    def __hash__(self) -> int:
        return hash(self.mask)

    def __repr__(self) -> str:
        return f"MarkMask({self.mask:#x})"

    @cached_property
    def capacity(self) -> int:
        """Backends of one frontend that can be told apart: 0 means none."""
        return (1 << len(self._number_bits)) - 1

    def marked(self, number: int) -> int:
        """The bits that stand for ``number``, 1 to ``capacity``; the mask may have gaps."""
        if not 1 <= number <= self.capacity:
            raise ValueError(f"number {number} is not within 1..{self.capacity}")
        return sum(bit for place, bit in enumerate(self._number_bits) if number >> place & 1)
