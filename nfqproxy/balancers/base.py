"""The contract of a balancer."""

from collections.abc import Sequence
from random import Random
from typing import Protocol


class Balancer(Protocol):
    """Chooses one of the backends it was last given.

    ``pick`` returns an index into the sequence of the last ``update``, or -1 when no backend has a
    positive weight. It is called once per new connection and must not block, log or raise.
    """

    def update(self, weights: Sequence[int], rng: Random) -> None:
        """Take the backends' weights (>= 0, 0 is never picked), in the plan's order."""
        ...

    def pick(self) -> int:
        """Index of the chosen backend, -1 for none."""
        ...

    def probabilities(self) -> tuple[float, ...]:
        """The chance of each backend at the next pick, as ``explain`` shows it; sums to 1 or is all 0."""
        ...
