"""Contenders at work side by side: each in a world of its own, all standing for the whole run.

A round measures each of them once, in an order drawn anew from the seed, so that a disturbance of
the machine does not fall on one contender only. One unreported round comes before: the first load
meets cold caches, unresolved symbols, modules not yet imported.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from bench.contenders import Contender, Placement, Serving
from bench.observation import Observation, Parameter, Scale
from bench.world import World
from nfqproxy.errors import NfqproxyError

T = TypeVar("T")


class WrongResultError(NfqproxyError):
    """Connections went wrong, so there is nothing to report of whoever handled them."""

    def __init__(self, message: str, kept: Sequence[Observation] = ()) -> None:
        super().__init__(message)
        self.kept = kept
        """What was measured of contenders with which nothing went wrong."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A contender, the world it shall serve, and what of both is varied."""

    contender: Contender
    world: AbstractContextManager[World]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    every: int = 1
    """Measured in every so many-th round, from the first on: 1 is in all."""


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
    every: int = 1
    """See :class:`Setup`."""

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
        # Those without processes first: to load thousands of rules keeps the kernel busy for a minute.
        for setup in sorted(setups, key=lambda setup: setup.contender.has_processes):
            place = stack.enter_context(setup.world)
            stand = Stand(setup.contender, place, Serving(), placement, dict(setup.parameters), 0)
            progress(f"start {stand}")
            if furnish:
                stack.enter_context(furnish(place, placement))
            stand.serving = stack.enter_context(setup.contender.serve(place, placement))
            stand.installed = stand.serving.installed() or 0
            stand.every = setup.every
            stands.append(stand)
        yield stands


def interleaved(
    stands: list[Stand],
    rounds: int,
    seed: int,
    progress: Callable[[str], None],
    measure: Callable[[Stand, int], T],
) -> list[T]:
    """Measures every stand once a round; ``measure`` gets the number of the round, 0 to warm up.

    Of two rounds the second takes the stands in the opposite order of the first, so that a machine that
    grows slower favours nobody.
    """
    for stand in stands:
        progress(f"warm up {stand}")
        measure(stand, 0)
    chance = random.Random(seed)
    measured: list[T] = []
    order: list[Stand] = []
    for number in range(1, rounds + 1):
        order = chance.sample(stands, len(stands)) if number % 2 else order[::-1]
        for stand in order:
            if (number - 1) % stand.every:
                continue
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
    *,
    turns: int = 1,
) -> list[Observation]:
    """Stands up all setups and measures them round by round, ``turns`` times the scale's rounds.

    A stand with which a connection goes wrong is measured no more and gives no values; the others go on,
    and the :class:`WrongResultError` at the end has theirs.
    """
    wrong: dict[str, str] = {}

    def guarded(stand: Stand, number: int) -> list[tuple[str, Observation]]:
        if str(stand) in wrong:
            return []
        try:
            return [(str(stand), each) for each in measure(stand, number)]
        except WrongResultError as error:
            wrong[str(stand)] = str(error)
        except NfqproxyError as error:
            said = stand.serving.complaints()
            wrong[str(stand)] = f"{stand}, round {number}: {error}\n{said}".strip()
        return []

    with standing(setups, two_cpus(), progress, furnish) as stands:
        rounds = interleaved(stands, scale.rounds * turns, scale.seed, progress, guarded)
    found = [each for one in rounds for name, each in one if name not in wrong]
    if wrong:
        raise WrongResultError("; ".join(wrong.values()), found)
    return found
