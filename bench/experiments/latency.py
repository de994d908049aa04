"""What a client waits for: connect() and the first answer of a real server, idle and at half load.

The client is ``c/calls.c``: a new connection each millisecond, one at a time, closed by a reset. At
load ``half`` new connections come beside it, half as many per second as the same contender took when it
was driven as fast as it could (found in the warm-up): SYNs to the same Service that the backends' pods
drop on arrival, in batches of eight. Userspace proxies cannot stand SYNs without a client behind them,
so their load is real calls by four more clients.

``connect`` of a userspace proxy ends in the proxy itself, before it has asked any backend: compare it by
``answer``, the time from the start of connect() to the first bytes of the answer. All contenders
hold the largest number of Services up to 5,000, but ``c``, ``dnat`` and the userspace proxies know the measured
one alone.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from bench.clients import FIRST_PORT, MAX_CALLS, Calls, calling, outlast, spare_cpu, web_servers
from bench.contenders import (
    CReference,
    Haproxy,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Nfqproxy,
    NginxStream,
    Placement,
)
from bench.experiments.programming import most
from bench.flows import measure, uneven
from bench.load import Load, sending
from bench.native import program
from bench.observation import Observation, Scale
from bench.stands import Setup, Stand, WrongResultError, checked, observations
from bench.world import World, check_table_room, table_room, world
from nfqproxy.errors import NfqproxyError

_CONTENDERS = (
    Nfqproxy,
    CReference,
    IptablesDnat,
    KubeProxyIptables,
    KubeProxyNftables,
    Haproxy,
    NginxStream,
)
_QUANTILES = (0.5, 0.9, 0.99, 0.999)
_RATE = 1000
_WARM_UP_S = 0.1
_LOAD = 0.5
_LOAD_BATCH = 8
_LOAD_CLIENTS, _LOAD_CALLS = 4, 10_000
# In one load, if conntrack holds as many beside the probes; a faster contender is loaded for a shorter time.
_MOST_SYNS = 150_000


class Latency:
    """Metrics ``connect``, ``answer`` in us; parameters ``quantile``, ``load``, ``services``.

    ``load`` is ``idle`` or ``half``.
    """

    name = "latency"
    title = "How long does connect() take, idle and at half load?"

    def __init__(self) -> None:
        self._capacity: dict[str, float] = {}

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """Raises NfqproxyError if a call failed or a connection went wrong."""
        self._capacity.clear()
        services = most(scale)
        contenders = checked(contender() for contender in _CONTENDERS)
        check_table_room(scale.connections + 2 * MAX_CALLS)
        for name in ("flood", "calls"):
            program(name)
        setups = [
            Setup(
                contender,
                world((1, 1, 1), services=services, has_pods=True),
                {"services": services},
            )
            for contender in contenders
        ]

        def measured(stand: Stand, number: int) -> list[Observation]:
            seconds = scale.seconds
            if number == 0:
                seconds = min(seconds, _WARM_UP_S)
                self._capacity[stand.contender.name] = _capacity(stand, scale.connections)
            idle = _probe(stand, number, seconds, 0.0)
            rate = self._capacity[stand.contender.name] * _LOAD
            loaded = _probe(stand, number, seconds, rate)
            return [
                stand.observation(
                    self.name, metric, "us", value / 1000, number, quantile=quantile, load=load
                )
                for load, calls in (("idle", idle), ("half", loaded))
                for metric, times in (("connect", calls.connect_ns), ("answer", calls.answer_ns))
                for quantile, value in _quantiles(times)
            ]

        return observations(setups, scale, progress, measured, _servers)


@contextlib.contextmanager
def _servers(place: World, placement: Placement) -> Iterator[None]:
    # The worker's CPU belongs to what is measured, so servers rather wait for the clients.
    with web_servers(place, spare_cpu(placement, otherwise=placement.sender)):
        outlast(place)
        yield


def _capacity(stand: Stand, connections: int) -> float:
    """New connections per second when driven as fast as they are taken."""
    if not stand.contender.is_relay:
        load = Load(connections=connections, cpu=stand.placement.sender)
        return measure(stand, load, round_number=0).sent.per_second
    with _clients(stand, _WARM_UP_S, 0) as results:
        return sum(len(result()) for result in results) / _WARM_UP_S


@contextlib.contextmanager
def _clients(stand: Stand, seconds: float, rate: float) -> Iterator[list[Callable[[], Calls]]]:
    """Several clients that together make ``rate`` calls per second."""
    with contextlib.ExitStack() as stack:
        each = math.ceil(rate / _LOAD_CLIENTS)
        yield [
            stack.enter_context(
                calling(
                    stand.world,
                    cpu=stand.placement.sender,
                    seconds=seconds,
                    rate=each,
                    calls=_LOAD_CALLS,
                    first_port=FIRST_PORT + MAX_CALLS + index * _LOAD_CALLS,
                )
            )
            for index in range(_LOAD_CLIENTS)
        ]


def _probe(stand: Stand, number: int, seconds: float, rate: float) -> Calls:
    """The probing client's calls beside a load of ``rate`` new connections a second, verified."""
    place, cpu = stand.world, stand.placement.sender
    before = place.counters()
    syns = 0
    try:
        with contextlib.ExitStack() as stack:
            ends: list[Callable[[], object]] = []
            if rate and stand.contender.is_relay:
                ends += stack.enter_context(_clients(stand, seconds, rate))
            elif rate:
                room = table_room() - MAX_CALLS
                seconds = min(seconds, min(_MOST_SYNS, room) / rate)
                syns = math.ceil(rate * seconds)
                load = Load(connections=syns, cpu=cpu, rate=math.ceil(rate), batch=_LOAD_BATCH)
                ends.append(stack.enter_context(sending(place, load, number)))
            probe = calling(place, cpu=cpu, seconds=seconds, rate=_RATE, calls=MAX_CALLS)
            calls = stack.enter_context(probe)()
            for end in ends:
                end()
    except NfqproxyError as error:
        raise WrongResultError(
            f"{stand}, round {number}: {error}\n{stand.serving.complaints()}".strip()
        ) from error
    _verify(stand, number, calls, syns, before.dropped, sum(before.queued.values()))
    place.flush()
    return calls


def _verify(stand: Stand, number: int, calls: Calls, syns: int, dropped: int, queued: int) -> None:
    """Every call at a right backend, one entry and, where due, one queued packet each."""
    place = stand.world
    shares = stand.contender.shares(place.backends)
    after = place.counters()
    findings = uneven(shares, {backend: calls.backends[backend] for backend in shares})
    if strange := calls.backends.keys() - shares.keys():
        findings.append(f"{', '.join(strange)} answered and is no backend")
    if after.dropped != dropped:
        findings.append(f"queues or conntrack dropped {after.dropped - dropped} packets")
    if not stand.contender.is_relay:
        entries = place.entries()
        flows = len(calls) + syns
        if entries.astray or sum(entries.translated.values()) != flows:
            findings.append(
                f"conntrack holds {sum(entries.translated.values())} right and {entries.astray} "
                f"wrong entries for {flows} connections"
            )
        passed = sum(after.queued.values()) - queued
        if passed != (flows if stand.contender.is_queued else 0):
            findings.append(f"{passed} packets passed the queue for {flows} connections")
    if findings:
        raise WrongResultError(f"{stand}, round {number}: {'; '.join(findings)}")


def _quantiles(times: Sequence[int]) -> Iterator[tuple[float, int]]:
    ordered = sorted(times)
    for quantile in _QUANTILES:
        yield quantile, ordered[math.ceil(quantile * len(ordered)) - 1]
