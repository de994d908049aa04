"""What every contender has in common."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from bench.world import Backend, World
from nfqproxy.errors import NfqproxyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which CPU does what; the same number twice on a machine with one CPU."""

    sender: int
    """Load generator, supervisors and the bench itself."""
    worker: int
    """The processes under measurement."""


class Serving:
    """A contender at work; kernel contenders have no processes."""

    workers: tuple[int, ...] = ()
    """Pids whose CPU time is the measure."""
    others: tuple[int, ...] = ()
    """Pids that belong to the contender but do not see packets (a supervisor)."""

    def installed(self) -> int | None:
        """Entries that the workers say they made since they started; None: cannot be asked."""
        return None

    def complaints(self) -> str:
        """What its processes said last, for an error message."""
        return ""


class Contender(ABC):
    """One way to serve the Service."""

    name: ClassVar[str]
    title: ClassVar[str]
    """A line for the report: what it is."""
    is_queued: ClassVar[bool] = True
    """Whether the first packet of every flow must go through a queue to userspace."""
    has_processes: ClassVar[bool] = True
    """Whether it is more than rules in the kernel."""
    is_relay: ClassVar[bool] = False
    """Whether it ends connections and opens others, so that conntrack has no part in it."""

    def check(self) -> None:  # noqa: B027  most need nothing
        """Raises :class:`~nfqproxy.errors.HostError` if this host cannot run it."""

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        """Share of the connections that each backend must get; empty: none connects."""
        total = sum(backend.weight for backend in backends)
        return {str(backend): backend.weight / total for backend in backends}

    @abstractmethod
    def serve(self, world: World, placement: Placement) -> AbstractContextManager[Serving]:
        """Serves the world's Service until the context ends; ready when it is entered."""


class StartError(NfqproxyError):
    """A contender did not come up."""
