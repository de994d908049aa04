"""From the chances of successive rules to weights."""

from collections.abc import Sequence

from nfqproxy.control.annotations import MAX_WEIGHT

_TOLERANCE = 2e-5
"""kube-proxy before v1.19 wrote five digits, xt_statistic keeps 31 bits."""
_LARGEST_SUM = 1000
"""Weights of at most this sum are looked for before chances are only scaled."""
_SCALE = 1_000_000


def is_out_of_order(chances: Sequence[float]) -> bool:
    """Whether these are kube-proxy's 1/n ... 1/2, 1, but not in that order (a listing that was sorted)."""
    return not _is_uniform(chances) and _is_uniform(sorted(chances))


def weights(chances: Sequence[float]) -> list[int]:
    """The least weights by which a draw gives what these rules, tried in turn, give.

    ``chances``: of what reaches each rule, 0 to 1. What passes all of them counts for nothing. All 1
    for kube-proxy's 1/n, 1/(n-1), ..., 1.
    """
    if _is_uniform(chances):
        return [1] * len(chances)
    rest, shares = 1.0, []
    for chance in chances:
        shares.append(rest * chance)
        rest *= 1 - chance
    total = sum(shares)
    if not total:
        return [0] * len(chances)
    shares = [share / total for share in shares]
    for whole in range(1, _LARGEST_SUM + 1) if len(shares) <= _LARGEST_SUM else ():
        if all(abs(share * whole - round(share * whole)) < _TOLERANCE * whole for share in shares):
            found = [round(share * whole) for share in shares]
            # A share too small to be told from none is found with a larger sum, or below.
            if all(
                (weight > 0) == (share > 0) for weight, share in zip(found, shares, strict=True)
            ):
                return found
    return [min(MAX_WEIGHT, max(1, round(share * _SCALE))) if share else 0 for share in shares]


def _is_uniform(chances: Sequence[float]) -> bool:
    count = len(chances)
    return all(
        abs(chance - 1 / (count - index)) < _TOLERANCE for index, chance in enumerate(chances)
    )
