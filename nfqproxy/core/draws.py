"""Draws on which all workers of a proxy agree without a word between them.

Packets of one flow, or connections of one client, may meet several workers at the same moment. Where they must get
one backend, each worker draws by a key that both packets share (the flow, the client) and by what only the workers
of one proxy know: the same key, the same draw. Two draws by different keys are as independent as any.
"""

from random import Random
from zlib import crc32

_MASK = (1 << 64) - 1


class SharedDraws(Random):
    """Random numbers that follow from the key told last, the same in each process with the same ``seed``.

    SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014): every
    state gives a well-mixed number, so that a key may be made a state by a plain checksum.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed
        self._state = seed & _MASK

    def about(self, key: bytes, period: int) -> None:
        """Draw by this key from now on; in another period the same key gives other draws."""
        self._state = (crc32(key) | period << 32) + self._seed & _MASK

    def random(self) -> float:
        """Uniform in [0, 1), with the 53 bits of ``random.random``."""
        self._state = state = self._state + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        return ((state ^ state >> 31) >> 11) * 2.0**-53
