"""Whether the kernel keeps up with the Services: what kube-proxy calls a healthy proxy (SEMANTICS 2.17)."""

from collections.abc import Callable

__all__ = ["SyncHealth"]

LIMIT_S = 60.0
"""Longest time a change may wait to be carried out: kube-proxy's 2 x syncPeriod."""


class SyncHealth:
    """Healthy unless a change waits longer than ``LIMIT_S``; healthy at the start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._newest = 0
        self._waiting_since: float | None = None

    def queued(self) -> int:
        """A change has come; returns its number for ``done``."""
        if self._waiting_since is None:
            self._waiting_since = self._clock()
        self._newest += 1
        return self._newest

    def done(self, number: int) -> None:
        """That change, and all before it, are carried out; later ones may still wait."""
        if number == self._newest:
            self._waiting_since = None

    @property
    def is_healthy(self) -> bool:
        """False when a change has waited too long."""
        return self._waiting_since is None or self._clock() - self._waiting_since <= LIMIT_S
