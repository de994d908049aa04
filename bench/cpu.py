"""The experiment ``cpu``: CPU per new TCP connection, contenders interleaved round by round."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.contenders import Contender, Placement
from bench.flows import Sample, measure
from bench.load import Load
from bench.native import program
from bench.stands import Setup, WrongResultError, checked, interleaved, standing
from bench.world import check_table_room, world
from nfqproxy.errors import InputError

__all__ = ["Config", "Sample", "WrongResultError", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to run."""

    connections: int
    """Connections per contender and round."""
    rounds: int
    seed: int
    """Of the order of contenders; the workers' own draws are not seeded."""
    in_flight: int
    """Most packets that wait in the queue before more are sent."""
    rate: int
    """SYNs per second at most; 0: as fast as they are taken."""
    weights: tuple[int, ...]
    """One backend per weight."""
    placement: Placement


def run(
    contenders: list[Contender], config: Config, progress: Callable[[str], None]
) -> list[Sample]:
    """Runs the experiment; ``progress`` is called with a line before each step.

    Everything made on the machine is removed on the way out, whatever ends the run.
    """
    for contender in checked(contenders):
        if contender.is_relay:
            raise InputError(
                f"{contender.name} ends connections itself and cannot serve SYNs alone: choose it "
                "for experiments with real servers"
            )
    check_table_room(config.connections)
    program("flood")
    load = Load(
        connections=config.connections,
        cpu=config.placement.sender,
        in_flight=config.in_flight,
        rate=config.rate,
    )
    setups = [Setup(contender, world(config.weights)) for contender in contenders]
    with standing(setups, config.placement, progress) as stands:
        return interleaved(
            stands,
            config.rounds,
            config.seed,
            progress,
            lambda stand, number: measure(stand, load, round_number=number),
        )
