"""Experiments that measure nothing, for the commands around them."""

from collections.abc import Callable
from typing import ClassVar

from bench.observation import Observation, Scale
from bench.stands import WrongResultError
from nfqproxy.errors import NfqproxyError
from tests.unit.bench.samples import observe


class Fake:
    """Yields the figures of ``observations``."""

    name = "connections"
    title = "fake"
    observations: ClassVar[list[Observation]] = []

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        progress(f"seed {scale.seed}")
        return self.observations


class Steady(Fake):
    """nfqproxy at 1.5 times C."""

    observations: ClassVar[list[Observation]] = [
        *observe([6.0] * 4, services=1),
        *observe([4.0] * 4, contender="c", services=1),
    ]


class Slow(Fake):
    """nfqproxy at 3 times C."""

    observations: ClassVar[list[Observation]] = [
        *observe([12.0] * 4, services=1),
        *observe([4.0] * 4, contender="c", services=1),
    ]


class Wrong(Fake):
    """Finds that connections went wrong."""

    name = "wrong"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        raise NfqproxyError("3 of 9 connections were lost")


class Partly(Fake):
    """One contender went wrong, the other did not."""

    name = "partly"
    observations: ClassVar[list[Observation]] = observe([1.0], experiment="partly")

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        raise WrongResultError("c lost 3", self.observations)


class Crashed(Fake):
    """Meets a mistake in the program."""

    name = "crashed"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        raise KeyError("end")


class Twice(Fake):
    """Observes the same thing twice."""

    name = "twice"
    observations: ClassVar[list[Observation]] = observe([1.0], experiment="twice") * 2


class Empty(Fake):
    """Observes nothing."""

    name = "empty"


class Interrupted(Fake):
    """Ctrl-C comes."""

    name = "interrupted"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        raise KeyboardInterrupt
