"""The experiment ``cpu``: CPU per new TCP connection, contenders interleaved round by round.

Every contender has a world of its own that stands for the whole run. A round loads each of them
once with the same SYNs, in an order drawn anew from the seed, so that a disturbance of the machine
does not fall on one contender only. A round counts only if every SYN became exactly one right
conntrack entry and arrived at the right backend, the shares fit the weights, every queued packet
passed userspace and nothing was dropped: :func:`_verify` raises otherwise.
"""

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench import native
from bench.clocks import (
    ProcessTime,
    busy_ns,
    kernel_thread_times,
    machine_time,
    process_time,
    since,
)
from bench.contenders import Contender, Placement, Serving
from bench.load import Sent, send
from bench.world import Counters, World, check_table_room, world
from nfqproxy.errors import NfqproxyError

_ARRIVAL_S = 2.0
_STATUS_S = 3.0
# Bound on the deviation of a share, in standard deviations of the binomial law: a true weighted
# random passes 99.999 of 100 such checks, a wrong weight of a few percent does not.
_SHARE_SIGMAS = 4.5


class WrongResultError(NfqproxyError):
    """Connections went wrong, so there is no cost to report."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One contender in one round; times are of the whole round, in ns."""

    contender: str
    round: int
    worker: ProcessTime
    other_ns: int
    """Processes of the contender that see no packets (the supervisor)."""
    deferred_ns: int
    """Kernel workers and softirq threads of the whole machine."""
    machine_ns: int
    """Busy time of all CPUs, whoever used them."""
    sent: Sent
    shares: dict[str, int]
    """Connections by backend."""

    @property
    def worker_us(self) -> float:
        """Worker CPU per connection."""
        return self.worker.run_ns / self.sent.connections / 1000

    @property
    def sender_us(self) -> float:
        """CPU per connection of the generator and of the kernel's work inside its calls."""
        return self.sent.cpu_ns / self.sent.connections / 1000

    @property
    def other_us(self) -> float:
        """CPU per connection of the contender's other processes."""
        return self.other_ns / self.sent.connections / 1000

    @property
    def deferred_us(self) -> float:
        """CPU per connection of kernel threads: work put off by somebody's call."""
        return self.deferred_ns / self.sent.connections / 1000

    @property
    def machine_us(self) -> float:
        """Busy time of the machine per connection."""
        return self.machine_ns / self.sent.connections / 1000

    @property
    def path_us(self) -> float:
        """CPU per connection of all that take part; unlike `machine_us` no other programs'."""
        return self.worker_us + self.sender_us + self.other_us + self.deferred_us


@dataclass(slots=True)
class _Stand:
    """A contender at work in its world."""

    contender: Contender
    world: World
    serving: Serving
    installed: int
    """Entries that its workers had made before the next load."""


def run(
    contenders: list[Contender], config: Config, progress: Callable[[str], None]
) -> list[Sample]:
    """Runs the experiment; ``progress`` is called with a line before each step.

    Everything made on the machine is removed on the way out, whatever ends the run.
    """
    check_table_room(config.connections)
    native.program("synflood")
    for contender in contenders:
        contender.check()
    chance = random.Random(config.seed)
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        stands: list[_Stand] = []
        for contender in contenders:
            progress(f"start {contender.name}")
            place = stack.enter_context(world(config.weights))
            serving = stack.enter_context(contender.serve(place, config.placement))
            stand = _Stand(contender, place, serving, serving.installed() or 0)
            stands.append(stand)
            # The first load meets cold caches, unresolved symbols, modules not yet imported.
            _measure(stand, config, round_number=0)
        for number in range(1, config.rounds + 1):
            for stand in chance.sample(stands, len(stands)):
                progress(f"round {number} of {config.rounds}: {stand.contender.name}")
                samples.append(_measure(stand, config, round_number=number))
    return samples


def _measure(stand: _Stand, config: Config, *, round_number: int) -> Sample:
    """One load on one contender, verified; leaves its conntrack table empty."""
    place, serving = stand.world, stand.serving
    counters = place.counters()
    arrived = place.sink_packets()
    deferred = kernel_thread_times()
    worker = process_time(serving.workers)
    other = process_time(serving.others)
    machine = machine_time()
    try:
        sent = send(
            place,
            connections=config.connections,
            in_flight=config.in_flight,
            rate=config.rate,
            cpu=config.placement.sender,
        )
    except NfqproxyError as error:
        raise WrongResultError(
            f"{stand.contender.name}, round {round_number}: {error}\n{serving.complaints()}".strip()
        ) from error
    machine_after = machine_time()
    worker = process_time(serving.workers) - worker
    other = process_time(serving.others) - other
    sample = Sample(
        contender=stand.contender.name,
        round=round_number,
        worker=worker,
        other_ns=other.run_ns,
        deferred_ns=since(deferred, kernel_thread_times()),
        machine_ns=busy_ns(machine, machine_after),
        sent=sent,
        shares=_arrivals(stand, arrived, config.connections),
    )
    _verify(stand, sample, config, counters)
    place.flush()
    return sample


def _arrivals(stand: _Stand, before: dict[str, int], expected: int) -> dict[str, int]:
    """Packets at each backend since ``before``; waits a little for the last ones."""
    deadline = time.monotonic() + _ARRIVAL_S
    while True:
        now = stand.world.sink_packets()
        arrived = {backend: now[backend] - before[backend] for backend in now}
        wanted = expected if stand.contender.shares(stand.world.backends) else 0
        if sum(arrived.values()) >= wanted or time.monotonic() > deadline:
            return arrived
        time.sleep(0.02)


def _verify(stand: _Stand, sample: Sample, config: Config, before: Counters) -> None:
    """Raises :class:`WrongResultError` with every finding, if there is one."""
    contender, place = stand.contender, stand.world
    shares = contender.shares(place.backends)
    expected = config.connections if shares else 0
    entries = place.entries()
    counters = place.counters()
    queued = counters.queued - before.queued
    findings: list[str] = []
    if sum(sample.shares.values()) != expected:
        findings.append(f"{sum(sample.shares.values())} of {expected} SYNs arrived at a backend")
    if entries.clients != expected or sum(entries.translated.values()) != expected:
        findings.append(
            f"conntrack holds {sum(entries.translated.values())} right entries of "
            f"{entries.clients} clients, not {expected}"
        )
    if entries.astray:
        findings.append(f"{entries.astray} entries are not translated to a backend")
    for backend, count in sample.shares.items():
        if entries.translated.get(backend, 0) != count:
            findings.append(
                f"{backend} got {count} SYNs but has {entries.translated.get(backend, 0)} entries"
            )
        share = shares.get(backend, 0.0)
        bound = _SHARE_SIGMAS * (expected * share * (1 - share)) ** 0.5
        if abs(count - expected * share) > bound:
            findings.append(f"{backend} got {count} SYNs, its weight says {expected * share:.0f}")
    if counters.dropped != before.dropped:
        findings.append(f"queues or conntrack dropped {counters.dropped - before.dropped} packets")
    if queued != (expected if contender.is_queued else 0):
        findings.append(f"{queued} packets passed the queue for {expected} connections")
    if contender.is_queued:
        stand.installed, made = _installed(stand, expected)
        if made is not None and made != expected:
            findings.append(f"the workers count {made} entries, not {expected}")
    if findings:
        said = stand.serving.complaints()
        raise WrongResultError(
            f"{contender.name}, round {sample.round}: {'; '.join(findings)}. No cost is reported: "
            f"repeat with fewer --in-flight if packets were dropped."
            + (f"\n{said}" if said else "")
        )


def _installed(stand: _Stand, expected: int) -> tuple[int, int | None]:
    """What the workers count in all, and since the last load; counts may come a moment late."""
    deadline = time.monotonic() + _STATUS_S
    while True:
        now = stand.serving.installed()
        if now is None:
            return 0, None
        if now - stand.installed >= expected or time.monotonic() > deadline:
            return now, now - stand.installed
        time.sleep(0.1)
