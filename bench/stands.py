"""Contenders at work side by side: each in a world of its own, all standing for the whole run.

A round measures each of them once, in an order drawn anew from the seed, so that a disturbance of
the machine does not fall on one contender only. One unreported round comes before: the first load
meets cold caches, unresolved symbols, modules not yet imported.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from bench.contenders import Contender, Placement, Serving
from bench.observation import Observation, Parameter, Scale
from bench.world import World
from nfqproxy.errors import NfqproxyError

T = TypeVar("T")


class WrongResultError(NfqproxyError):
    """Connections went wrong, so there is nothing to report."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A contender, the world it shall serve, and what of both is varied."""

    contender: Contender
    world: AbstractContextManager[World]
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(slots=True)
class Stand:
    """A contender at work in its world."""

    contender: Contender
    world: World
    serving: Serving
    placement: Placement
    parameters: dict[str, Parameter]
    installed: int
    """Entries that its workers had made before the next load."""

    def __str__(self) -> str:
        varied = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.contender.name} ({varied})" if varied else self.contender.name

    def observation(
        self,
        experiment: str,
        metric: str,
        unit: str,
        value: float,
        round_number: int,
        **parameters: Parameter,
    ) -> Observation:
        """A value measured here; ``parameters`` beside those of the stand."""
        return Observation(
            experiment=experiment,
            contender=self.contender.name,
            metric=metric,
            unit=unit,
            value=value,
            round=round_number,
            parameters={**self.parameters, **parameters},
        )


def two_cpus() -> Placement:
    """The load on the first CPU this process may use, workers on the last."""
    cpus = sorted(os.sched_getaffinity(0))
    return Placement(sender=cpus[0], worker=cpus[-1])


@contextlib.contextmanager
def standing(
    setups: Iterable[Setup],
    placement: Placement,
    progress: Callable[[str], None],
    furnish: Callable[[World, Placement], AbstractContextManager[object]] | None = None,
) -> Iterator[list[Stand]]:
    """Every setup at work; all is removed at the end, whatever ends it.

    ``furnish`` starts what a world needs before its contender (servers).
    """
    with contextlib.ExitStack() as stack:
        stands: list[Stand] = []
        for setup in setups:
            place = stack.enter_context(setup.world)
            stand = Stand(setup.contender, place, Serving(), placement, dict(setup.parameters), 0)
            progress(f"start {stand}")
            if furnish:
                stack.enter_context(furnish(place, placement))
            stand.serving = stack.enter_context(setup.contender.serve(place, placement))
            stand.installed = stand.serving.installed() or 0
            stands.append(stand)
        yield stands


def interleaved(
    stands: list[Stand],
    rounds: int,
    seed: int,
    progress: Callable[[str], None],
    measure: Callable[[Stand, int], T],
) -> list[T]:
    """Measures every stand once a round; ``measure`` gets the number of the round, 0 to warm up."""
    for stand in stands:
        progress(f"warm up {stand}")
        measure(stand, 0)
    chance = random.Random(seed)
    measured: list[T] = []
    for number in range(1, rounds + 1):
        for stand in chance.sample(stands, len(stands)):
            progress(f"round {number} of {rounds}: {stand}")
            measured.append(measure(stand, number))
    return measured


def checked(contenders: Iterable[Contender]) -> list[Contender]:
    """The contenders, once this host is known to be able to run each."""
    chosen = list(contenders)
    for contender in chosen:
        contender.check()
    return chosen


def observations(
    setups: Iterable[Setup],
    scale: Scale,
    progress: Callable[[str], None],
    measure: Callable[[Stand, int], list[Observation]],
    furnish: Callable[[World, Placement], AbstractContextManager[object]] | None = None,
) -> list[Observation]:
    """Stands up all setups and measures them round by round."""
    with standing(setups, two_cpus(), progress, furnish) as stands:
        rounds = interleaved(stands, scale.rounds, scale.seed, progress, measure)
        return [observation for one in rounds for observation in one]
