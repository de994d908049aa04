"""One load of new flows on one contender, measured and verified.

A load counts only if every flow became exactly one right conntrack entry and arrived at the right
backend, the shares fit the weights, every flow's first packet passed userspace where it should, and
nothing was dropped: :func:`measure` raises otherwise.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.clocks import (
    ProcessTime,
    busy_ns,
    kernel_thread_times,
    machine_time,
    process_time,
    since,
)
from bench.load import Load, Sent, send
from bench.native import program
from bench.observation import Observation, Scale
from bench.stands import Setup, Stand, WrongResultError, checked, observations
from bench.world import check_table_room
from nfqproxy.errors import NfqproxyError

_ARRIVAL_S = 2.0
_STATUS_S = 3.0
# Bound on the deviation of a share, in standard deviations of the binomial law: a true weighted
# random fails one of 1.7 million such checks, a wrong weight of a few percent does not.
_SHARE_SIGMAS = 5.0


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
    queued: dict[int, int]
    """Packets that were given to userspace, by queue."""
    installed: int | None
    """Entries that the workers count; None: nobody counts."""

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


def observe(
    experiment: str,
    setups: Sequence[Setup],
    scale: Scale,
    progress: Callable[[str], None],
    *,
    also: Callable[[Stand, Sample], list[Observation]] = lambda stand, sample: [],
) -> list[Observation]:
    """Rate and CPU time per new flow of every setup, round by round.

    ``rate`` is flows per second as fast as they are taken; ``worker_cpu`` the worker processes' time,
    of contenders that have one; ``path_cpu`` that of all that take part, the load included.
    """
    checked(setup.contender for setup in setups)
    check_table_room(scale.connections)
    program("flood")

    def measured(stand: Stand, number: int) -> list[Observation]:
        load = Load(connections=scale.connections, cpu=stand.placement.sender)
        sample = measure(stand, load, round_number=number)
        values = [("rate", "1/s", sample.sent.per_second), ("path_cpu", "us", sample.path_us)]
        if stand.serving.workers:
            values.append(("worker_cpu", "us", sample.worker_us))
        return [
            *(stand.observation(experiment, *value, number) for value in values),
            *also(stand, sample),
        ]

    return observations(setups, scale, progress, measured)


def measure(stand: Stand, load: Load, *, round_number: int, may_fall_back: bool = False) -> Sample:
    """One load on one contender, verified; leaves its conntrack table empty.

    ``may_fall_back``: more may come than userspace takes, and the kernel's fallback serves the rest.
    """
    place, serving = stand.world, stand.serving
    counters = place.counters()
    arrived = place.sink_packets()
    deferred = kernel_thread_times()
    worker = process_time(serving.workers)
    other = process_time(serving.others)
    machine = machine_time()
    try:
        sent = send(place, load, round_number)
    except NfqproxyError as error:
        raise WrongResultError(
            f"{stand}, round {round_number}: {error}\n{serving.complaints()}".strip()
        ) from error
    machine_after = machine_time()
    worker = process_time(serving.workers) - worker
    other = process_time(serving.others) - other
    deferred_ns = since(deferred, kernel_thread_times())
    shares = arrivals(stand, arrived, load.connections)
    after = place.counters()
    sample = Sample(
        contender=stand.contender.name,
        round=round_number,
        worker=worker,
        other_ns=other.run_ns,
        deferred_ns=deferred_ns,
        machine_ns=busy_ns(machine, machine_after),
        sent=sent,
        shares=shares,
        queued={
            queue: count - counters.queued.get(queue, 0) for queue, count in after.queued.items()
        },
        installed=_installed(stand, 0 if may_fall_back else load.connections),
    )
    findings = [*_findings(stand, sample, after.dropped - counters.dropped)]
    findings += [] if may_fall_back else _bypassed(stand, sample)
    if findings:
        said = serving.complaints()
        raise WrongResultError(
            f"{stand}, round {round_number}: {'; '.join(findings)}. No cost is reported: "
            f"repeat with fewer --in-flight if packets were dropped."
            + (f"\n{said}" if said else "")
        )
    place.flush()
    return sample


def arrivals(stand: Stand, before: dict[str, int], expected: int) -> dict[str, int]:
    """Packets at each backend since ``before``; waits a little for the last ones."""
    deadline = time.monotonic() + _ARRIVAL_S
    while True:
        now = stand.world.sink_packets()
        arrived = {backend: now[backend] - before[backend] for backend in now}
        wanted = expected if stand.contender.shares(stand.world.backends) else 0
        if sum(arrived.values()) >= wanted or time.monotonic() > deadline:
            return arrived
        time.sleep(0.02)


def _findings(stand: Stand, sample: Sample, dropped: int) -> list[str]:
    """What is wrong with entries, arrivals and shares."""
    shares = stand.contender.shares(stand.world.backends)
    expected = sample.sent.connections if shares else 0
    entries = stand.world.entries()
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
    if dropped:
        findings.append(f"queues or conntrack dropped {dropped} packets")
    return findings + uneven(shares, sample.shares)


def uneven(shares: dict[str, float], counts: dict[str, int]) -> list[str]:
    """A sentence for each backend whose count does not fit its share of all."""
    total = sum(counts.values())
    findings = []
    for backend, count in counts.items():
        share = shares.get(backend, 0.0)
        bound = _SHARE_SIGMAS * (total * share * (1 - share)) ** 0.5
        if abs(count - total * share) > bound:
            findings.append(f"{backend} got {count} SYNs, its weight says {total * share:.0f}")
    return findings


def _bypassed(stand: Stand, sample: Sample) -> list[str]:
    """Whether userspace saw more or fewer packets than it should."""
    expected = sample.sent.connections if stand.contender.is_queued else 0
    queued = sum(sample.queued.values())
    findings = []
    if queued != expected:
        findings.append(
            f"{queued} packets passed the queue for {sample.sent.connections} connections"
        )
    if stand.contender.is_queued and sample.installed not in (None, expected):
        findings.append(f"the workers count {sample.installed} entries, not {expected}")
    return findings


def _installed(stand: Stand, expected: int) -> int | None:
    """What the workers count since the last load; counts may come a moment late.

    Waits until ``expected`` are there or, where that is not known, 0, until two answers are the same.
    """
    deadline = time.monotonic() + _STATUS_S
    last = None
    while True:
        now = stand.serving.installed()
        if now is None:
            return None
        made = now - stand.installed
        if (made >= expected and (expected or now == last)) or time.monotonic() > deadline:
            stand.installed = now
            return made
        last = now
        time.sleep(0.1)
