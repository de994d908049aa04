"""Exactly one verdict a packet, whatever goes wrong; errors no kernel can be made to give on demand.

The conntrack socket here answers by script: a full table (ENOMEM) or an error of unknown meaning cannot be
provoked in a namespace. What the real kernel does is tested in tests/kernel.
"""

import errno
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from nfqproxy.core.dataplane import Dataplane, QueuedPacket
from nfqproxy.errors import KernelError
from nfqproxy.model import MarkMask
from nfqproxy.wire import ctnetlink
from nfqproxy.worker.data_paths import CtnetlinkPath, MarkPath
from nfqproxy.worker.engine import Engine
from nfqproxy.worker.readers import BATCH, Answer
from tests.unit.core.test_dataplane import make, marking, one_plan, syn
from tests.unit.core.test_existing import entry as existing_entry


class Verdicts:
    """A reader that hands out given batches and keeps the answers."""

    overruns = 0
    verdict_errors = 0
    holds_packets = False

    def __init__(self, *batches: list[QueuedPacket]) -> None:
        self._batches = list(batches)
        self.accepted: list[int] = []
        self.dropped: list[int] = []
        self.marked: dict[int, int] = {}
        self.arrived_with: dict[int, int] = {}

    def read(self) -> list[QueuedPacket]:
        return self._batches.pop(0) if self._batches else []

    def marks(self) -> dict[int, int]:
        return self.arrived_with

    def answer(self, packets: Sequence[QueuedPacket], answer: Answer) -> None:
        self.dropped += answer.dropped
        self.accepted += [packet[0] for packet in packets if packet[0] not in answer.dropped]
        self.marked.update(answer.marks)


class Scripted:
    """A conntrack socket whose answers are given; raises those that are exceptions."""

    overruns = 0

    def __init__(self, *outcomes: Any, find: Any = None) -> None:
        self._outcomes = list(outcomes)
        self._find = find
        self.deleted: list[object] = []

    def create(self, entries: Sequence[bytes]) -> list[tuple[bytes, int]]:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return [(entries[number - 1], code) for number, code in outcome]

    def delete(self, entry: object) -> None:
        self.deleted.append(entry)

    def find(self, original: object) -> object:
        if isinstance(self._find, Exception):
            raise self._find
        return self._find


def run(
    conntrack: Scripted, dataplane: Dataplane | None = None, ports: Sequence[int] = (1, 2, 3)
) -> tuple[Engine, Verdicts]:
    reader = Verdicts([syn(port) for port in ports])
    dataplane = dataplane or make(one_plan())
    path = CtnetlinkPath(dataplane, conntrack)  # type: ignore[arg-type]
    engine = Engine(reader, dataplane, conntrack, path)  # type: ignore[arg-type]
    engine.run_ready()
    return engine, reader


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOBUFS, errno.EINVAL, errno.EPERM])
def test_a_failed_entry_is_counted_by_its_name_and_the_packet_passes(code: int) -> None:
    engine, reader = run(Scripted([(2, code)]))
    assert reader.accepted == [1, 2, 3]
    assert engine.installed == 2
    assert engine.counters() == {f"error_{errno.errorcode[code]}": 1}


def test_an_errno_without_a_name_is_counted_too() -> None:
    engine, reader = run(Scripted([(1, 4000)]))
    assert reader.accepted == [1, 2, 3]
    assert engine.counters() == {"error_4000": 1}


def test_a_socket_that_fails_costs_no_verdict() -> None:
    engine, reader = run(Scripted(OSError(errno.ENOBUFS, "no buffer space")))
    assert reader.accepted == [1, 2, 3]
    assert engine.counters() == {"batch_errors": 1}


def test_a_decision_that_raises_costs_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    dataplane = make(one_plan())
    monkeypatch.setattr(dataplane, "assemble", lambda packets: 1 / 0)
    engine, reader = run(Scripted(), dataplane)
    assert reader.accepted == [1, 2, 3]
    assert engine.counters() == {"batch_errors": 1}


@pytest.mark.parametrize("failure", [KernelError("look", errno.EIO), OSError(errno.ENOBUFS, "")])
def test_mending_that_fails_costs_no_verdict(failure: Exception) -> None:
    engine, reader = run(Scripted([(1, errno.EEXIST), (3, errno.EEXIST)], find=failure))
    assert reader.accepted == [1, 2, 3]
    assert engine.counters() == {"mend_errors": 2}


def test_an_entry_that_has_just_gone_is_made_at_the_second_try() -> None:
    engine, reader = run(Scripted([(1, errno.EEXIST)], [], find=None))
    assert reader.accepted == [1, 2, 3]
    assert engine.installed == 3
    assert engine.counters() == {"vanished": 1}


def test_a_clash_of_reply_tuples_is_left_to_what_stands_behind() -> None:
    engine, reader = run(Scripted([(1, errno.EEXIST)], [(1, errno.EEXIST)], find=None))
    assert reader.accepted == [1, 2, 3]
    assert engine.installed == 2
    assert engine.counters() == {"vanished_failed": 1}


# Data path ``mark``.

KEEP = 0x1000
NEIGHBOURS = 0x40005000
"""Bits of others, and our keep bit, by which the rules say that the entry is confirmed."""


def entry(backend: str = "10.244.1.11", *, state: int, is_dnat: bool = True) -> ctnetlink.Entry:
    """An entry that leads to a backend."""
    made = existing_entry(state=state, status=ctnetlink.IPS_DST_NAT if is_dnat else 0)
    return replace(made, reply=replace(made.reply, src=ip_address(backend).packed))


def run_marks(
    arrived_with: dict[int, int] | None = None, *, find: Any = None
) -> tuple[Engine, Verdicts, Scripted]:
    reader, conntrack = Verdicts([syn(port) for port in (1, 2, 3)]), Scripted(find=find)
    reader.arrived_with = arrived_with or {}
    dataplane = marking(one_plan((1,)))
    path = MarkPath(dataplane, conntrack, mask=MarkMask(), reader=reader)  # type: ignore[arg-type]
    engine = Engine(reader, dataplane, conntrack, path)  # type: ignore[arg-type]
    engine.run_ready()
    return engine, reader, conntrack


def test_marks_keep_the_bits_of_others() -> None:
    engine, reader, _ = run_marks({2: 0x4000C080})
    assert reader.marked == {1: 1 | KEEP, 2: 0x4000C080 | 1 | KEEP, 3: 1 | KEEP}
    assert (reader.accepted, reader.dropped, engine.installed) == ([1, 2, 3], [], 3)


def test_bits_of_ours_that_came_along_do_not_stay() -> None:
    _, reader, _ = run_marks({2: 0x4F7F})
    assert reader.marked[2] == 0x4000 | 1 | KEEP


@pytest.mark.parametrize(
    ("found", "counted"),
    [
        (entry(state=ctnetlink.TCP_CONNTRACK_SYN_SENT), "retransmit"),
        (entry(state=ctnetlink.TCP_CONNTRACK_ESTABLISHED), "alive"),
    ],
)
def test_a_late_packet_goes_with_its_entry(found: ctnetlink.Entry, counted: str) -> None:
    engine, reader, conntrack = run_marks({1: NEIGHBOURS}, find=found)
    assert reader.marked == {1: NEIGHBOURS & ~KEEP, 2: 1 | KEEP, 3: 1 | KEEP}
    assert (reader.accepted, engine.installed) == ([1, 2, 3], 2)
    assert (engine.counters(), conntrack.deleted) == ({counted: 1}, [])


@pytest.mark.parametrize(
    ("found", "counted"),
    [
        (entry("10.244.9.9", state=ctnetlink.TCP_CONNTRACK_SYN_SENT), "backend_gone"),
        (
            entry("10.96.0.80", state=ctnetlink.TCP_CONNTRACK_SYN_SENT, is_dnat=False),
            "poisoned",
        ),
    ],
)
def test_an_entry_that_leads_nowhere_goes_with_its_packet(
    found: ctnetlink.Entry, counted: str
) -> None:
    engine, reader, conntrack = run_marks({1: NEIGHBOURS}, find=found)
    assert (reader.accepted, reader.dropped, engine.installed) == ([2, 3], [1], 2)
    assert (engine.counters(), conntrack.deleted) == ({counted: 1}, [found])


@pytest.mark.parametrize("find", [None, KernelError("look up", errno.EPERM)])
def test_a_late_packet_whose_entry_is_not_found_passes_with_others_bits(find: Any) -> None:
    engine, reader, _ = run_marks({1: NEIGHBOURS}, find=find)
    assert reader.accepted == [1, 2, 3]
    assert reader.marked[1] == NEIGHBOURS & ~KEEP
    assert engine.counters() == ({"mend_errors": 1} if find else {})


def test_under_load_the_event_loop_gets_its_turn_and_nothing_is_left() -> None:
    batches = [[syn(port) for port in range(1, BATCH + 1)] for _ in range(5)]
    reader = Verdicts(*batches, [syn(1)])
    dataplane, conntrack = make(one_plan()), Scripted(*[[]] * 6)
    path = CtnetlinkPath(dataplane, conntrack)  # type: ignore[arg-type]
    engine = Engine(reader, dataplane, conntrack, path)  # type: ignore[arg-type]
    assert engine.run_ready(), "full batches were read: more may wait"
    assert BATCH < engine.packets < 5 * BATCH
    assert not engine.run_ready()
    assert engine.packets == 5 * BATCH + 1
