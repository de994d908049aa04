"""Slots of the kernel fallback: how few equal draws stand for backends of unequal weight.

The fallback knows no weights, only slots that are drawn uniformly; a backend with weight 5 of 10 owns
5 of 10 slots. Pure arithmetic.
"""

from collections.abc import Sequence

from nfqproxy.model import Backend

__all__ = ["MAX_SLOTS", "slots"]

MAX_SLOTS = 64
"""Slots a frontend can have at most; the fallback's table holds one chain per count up to it."""

SHARE_TOLERANCE = 0.05
"""A slot count is good enough when no backend's share is off by more than this part of itself."""


def slots(backends: Sequence[Backend]) -> tuple[int, ...]:
    """Return the backend index of every slot, grouped by backend; empty without a positive weight.

    The count is the smallest that gives each backend its share to within ``SHARE_TOLERANCE`` of
    that share, else the best there is. Slots are dealt by largest remainder; every backend of
    positive weight gets at least one as long as there are no more than ``MAX_SLOTS`` of them.
    Beyond that the heaviest (of equal ones, the first) are served.
    """
    positive = [index for index, backend in enumerate(backends) if backend.weight > 0]
    if not positive:
        return ()
    if len(positive) > MAX_SLOTS:
        positive = sorted(positive, key=lambda index: (-backends[index].weight, index))[:MAX_SLOTS]
        positive.sort()
    weights = [backends[index].weight for index in positive]
    if min(weights) == max(weights):
        return tuple(positive)
    total = sum(weights)
    best: list[int] = []
    best_error = float("inf")
    for count in range(len(weights), MAX_SLOTS + 1):
        dealt = _deal(weights, total, count)
        error = max(
            abs(share * total - weight * count) / (weight * count)
            for share, weight in zip(dealt, weights, strict=True)
        )
        if error < best_error:
            best, best_error = dealt, error
            if error <= SHARE_TOLERANCE:
                break
    return tuple(index for index, share in zip(positive, best, strict=True) for _ in range(share))


def _deal(weights: Sequence[int], total: int, count: int) -> list[int]:
    """Deal ``count`` slots in proportion to ``weights``, at least one each, by largest remainder.

    Those that would get none are given one first; the rest share what is left in proportion.
    """
    dealt = [0] * len(weights)
    rest = list(range(len(weights)))
    while True:
        small = [index for index in rest if weights[index] * count < total]
        if not small:
            break
        for index in small:
            dealt[index] = 1
            total -= weights[index]
        count -= len(small)
        rest = [index for index in rest if dealt[index] == 0]
    for index in rest:
        dealt[index] = weights[index] * count // total
    left = count - sum(dealt[index] for index in rest)
    by_remainder = sorted(rest, key=lambda index: (-(weights[index] * count % total), index))
    for index in by_remainder[:left]:
        dealt[index] += 1
    return dealt
