"""Weighted random: each pick is independent, in exact proportion to the weights.

Walker's alias method in Vose's stable form (M. D. Vose, "A linear algorithm for generating random
numbers with a given distribution", IEEE TSE 17(9), 1991): O(n) to build, O(1) to pick, one uniform
number a pick. The table is built in integers, so that no weight is rounded; what remains is the 53 bit
grain of the uniform number itself.
"""

from collections.abc import Callable, Sequence
from random import Random


class WeightedRandom:
    """See the module. Equal weights and a single backend take shorter paths with the same result."""

    __slots__ = ("_alias", "_keep", "_random", "_size", "_weights", "pick")

    pick: Callable[[], int]

    def __init__(self) -> None:
        self._weights: tuple[int, ...] = ()
        self._size = 0
        self._random: Callable[[], float] = Random(0).random
        # _keep[i] is i + the share of column i that stays with i, so that one comparison decides.
        self._keep: list[float] = []
        self._alias: list[int] = []
        self.pick = self._pick_none

    def update(self, weights: Sequence[int], rng: Random) -> None:
        """Build the table for ``weights``; O(n)."""
        self._weights = tuple(weights)
        self._random = rng.random
        positive = [index for index, weight in enumerate(weights) if weight > 0]
        self._size = len(weights)
        if not positive:
            self.pick = self._pick_none
        elif len(positive) == 1:
            only = positive[0]
            self.pick = lambda: only
        elif len(set(weights)) == 1:
            self.pick = self._pick_uniform
        else:
            self._build()
            self.pick = self._pick_alias

    def probabilities(self) -> tuple[float, ...]:
        """Weight over the sum of weights."""
        total = sum(self._weights)
        return tuple(weight / total if total else 0.0 for weight in self._weights)

    def _build(self) -> None:
        size, total = self._size, sum(self._weights)
        # Column heights scaled by size: the mean column is exactly ``total`` high.
        heights = [weight * size for weight in self._weights]
        small = [index for index, height in enumerate(heights) if height < total]
        large = [index for index, height in enumerate(heights) if height >= total]
        keep = [total] * size
        alias = list(range(size))
        while small:
            low, high = small.pop(), large[-1]
            keep[low] = heights[low]
            alias[low] = high
            heights[high] -= total - heights[low]
            if heights[high] < total:
                small.append(large.pop())
        self._keep = [index + share / total for index, share in enumerate(keep)]
        self._alias = alias

    def _pick_none(self) -> int:
        return -1

    def _pick_uniform(self) -> int:
        return int(self._random() * self._size)

    def _pick_alias(self) -> int:
        point = self._random() * self._size
        column = int(point)
        return column if point < self._keep[column] else self._alias[column]
