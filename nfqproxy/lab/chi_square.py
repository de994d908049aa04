"""Pearson's chi-square test: how likely is a spread at least this far from the weights by chance?

The p-value is the regularized upper incomplete gamma function Q(k/2, x/2) (NIST DLMF 8.2.4), by
its power series (DLMF 8.11.4) where x < a + 1 and by Legendre's continued fraction (DLMF 8.9.2,
evaluated with the modified Lentz method) elsewhere; each converges quickly on its side.
"""

import math
from collections.abc import Sequence

from msgspec import Struct

__all__ = ["ChiSquare", "chi_square", "upper_gamma"]

_EPSILON = 1e-15
_TINY = 1e-300
_ITERATIONS = 10_000


class ChiSquare(Struct, frozen=True, kw_only=True):
    """Result of the test."""

    statistic: float
    degrees: int
    """Degrees of freedom: categories of positive weight less one."""
    p_value: float
    """1: as expected; small: not by chance."""


def upper_gamma(a: float, x: float) -> float:
    """Q(a, x), for a > 0 and x >= 0; ValueError otherwise."""
    if a <= 0 or x < 0:
        raise ValueError(f"Q(a, x) needs a > 0 and x >= 0, not a={a} x={x}")
    if x == 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _ITERATIONS):
            term *= x / (a + n)
            total += term
            if term < total * _EPSILON:
                break
        return max(0.0, 1.0 - scale * total)
    b = x + 1 - a
    c = 1 / _TINY
    d = 1 / b
    fraction = d
    for n in range(1, _ITERATIONS):
        numerator = -n * (n - a)
        b += 2
        d = numerator * d + b
        d = 1 / (d if abs(d) > _TINY else _TINY)
        c = b + numerator / c
        c = c if abs(c) > _TINY else _TINY
        fraction *= d * c
        if abs(d * c - 1) < _EPSILON:
            break
    return scale * fraction


def chi_square(observed: Sequence[int], weights: Sequence[float]) -> ChiSquare:
    """Test counts against weights of the same order.

    A count where the weight is 0 has p-value 0: it cannot happen by chance. ValueError when the
    lengths differ or there is nothing to test.
    """
    if len(observed) != len(weights):
        raise ValueError(f"{len(observed)} counts for {len(weights)} weights")
    total, weight_sum = sum(observed), sum(weights)
    if total == 0 or weight_sum <= 0 or min(weights) < 0:
        raise ValueError("the test needs at least one observation and one positive weight")
    degrees = sum(1 for weight in weights if weight > 0) - 1
    statistic = 0.0
    for count, weight in zip(observed, weights, strict=True):
        expected = total * weight / weight_sum
        if expected > 0:
            statistic += (count - expected) ** 2 / expected
        elif count > 0:
            return ChiSquare(statistic=math.inf, degrees=degrees, p_value=0.0)
    p_value = upper_gamma(degrees / 2, statistic / 2) if degrees > 0 else 1.0
    return ChiSquare(statistic=statistic, degrees=degrees, p_value=p_value)
