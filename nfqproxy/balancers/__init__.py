"""Balancers: one algorithm each, pure, fed with weights, asked for picks.

Here belongs what chooses one backend among candidates. Never here: which backends are candidates
(``core``), packets, clocks, sockets. A balancer works unchanged in the worker, in ``explain`` and in
the simulator.
"""

from collections.abc import Callable

from nfqproxy.balancers.base import Balancer
from nfqproxy.balancers.weighted_random import WeightedRandom
from nfqproxy.errors import InputError

__all__ = ["DEFAULT", "Balancer", "WeightedRandom", "create", "names"]

DEFAULT = "weighted-random"

_REGISTRY: dict[str, Callable[[], Balancer]] = {"weighted-random": WeightedRandom}


def names() -> tuple[str, ...]:
    """The known balancer names, sorted."""
    return tuple(sorted(_REGISTRY))


def create(name: str) -> Balancer:
    """A new balancer; InputError names the known ones when ``name`` is not among them."""
    try:
        return _REGISTRY[name]()
    except KeyError:
        raise InputError(f"unknown balancer {name!r}; known are: {', '.join(names())}") from None
