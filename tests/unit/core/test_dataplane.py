"""The packet path: equal to the obvious reference for any plan and packet, and robust by itself."""

import gc
import struct
from ipaddress import ip_address
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nfqproxy.core.dataplane import Dataplane, QueuedPacket, Target
from nfqproxy.core.marks import FrontendMarks
from nfqproxy.core.sources import SourceClasses
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    ClientClass,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    PodDetector,
    Protocol,
    TrafficPolicy,
    Verdict,
)
from nfqproxy.wire import ctnetlink, nlmsg
from tests.unit.core import reference

CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")
NODE = ("192.0.2.1", "2001:db8:2::1")
SOURCES = {4: bytes([192, 0, 2, 1]), 16: ip_address("2001:db8:2::1").packed}
ROUTELESS = ip_address("10.244.9.9").packed


def masquerade_source(address: bytes) -> bytes | None:
    return None if address == ROUTELESS else SOURCES[len(address)]


def classes(**detector: str) -> SourceClasses:
    by = PodDetector(**detector) if detector else PodDetector(cluster_cidrs=CIDRS)
    return SourceClasses(by, [ip_address(address).packed for address in NODE])


class Names:
    """Interfaces 1 and 2 are there, by other names after ``rename``; 0 is a process of the node."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {0: "", 1: "eth0", 2: "veth2"}
        self.asked: list[int] = []
        self._is_new = True

    def rename(self, **names: str) -> None:
        self.names = {0: "", **{int(number[2:]): name for number, name in names.items()}}
        self._is_new = True

    def changed(self) -> bool:
        was, self._is_new = self._is_new, False
        return was

    def name(self, arrival: int) -> str | None:
        self.asked.append(arrival)
        return self.names.get(arrival)


def ipv4(src: str, dst: str, sport: int, dport: int, protocol: int, options: int = 0) -> bytes:
    length = 20 + options
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | length // 4,
        0,
        length + 20,
        7,
        0x4000,
        64,
        protocol,
        0,
        ip_address(src).packed,
        ip_address(dst).packed,
    )
    return header + b"\x01" * options + struct.pack("!HH16x", sport, dport)


def ipv6(src: str, dst: str, sport: int, dport: int, protocol: int, extension: bool) -> bytes:
    inner = struct.pack("!HH16x", sport, dport)
    following = protocol
    if extension:  # one destination options header: next header, length 0 (8 bytes), PadN
        inner = bytes([protocol, 0, 1, 4, 0, 0, 0, 0]) + inner
        following = 60
    addresses = ip_address(src).packed + ip_address(dst).packed
    return struct.pack("!IHBB", 6 << 28, len(inner), following, 64) + addresses + inner


VIPS4 = ["10.96.0.80", "10.96.0.81", "192.0.2.1"]
VIPS6 = ["fd00:10:96::80", "fd00:10:96::81"]
BACKENDS4 = ["10.244.1.11", "10.244.1.12", "10.244.9.9", "192.0.2.7"]
BACKENDS6 = ["fd00:10:244:1::11", "fd00:10:244:1::12", "2001:db8:2::7"]
CLIENTS4 = ["192.0.2.10", "10.244.1.11", "10.244.1.12", "192.0.2.1", "127.0.0.1", "192.0.2.7"]
CLIENTS6 = ["2001:db8:2::10", "fd00:10:244:1::11", "2001:db8:2::1", "::1"]
PORTS = [80, 53]
RANGES = ["192.0.2.0/24", "10.244.1.11/32", "0.0.0.0/0", "2001:db8:2::/64", "fd00:10:244:1::/64"]


@st.composite
def plans(draw: st.DrawFn) -> dict[FrontendKey, FrontendPlan]:
    found = {}
    for _ in range(draw(st.integers(1, 4))):
        six = draw(st.booleans())
        key = FrontendKey(
            draw(st.sampled_from(list(Protocol))),
            draw(st.sampled_from(VIPS6 if six else VIPS4)),
            draw(st.sampled_from(PORTS)),
        )
        sets = tuple(
            CandidateSet(
                backends=tuple(
                    Backend(
                        address=address,
                        port=draw(st.sampled_from([8080, 53])),
                        weight=draw(st.integers(0, 5)),
                        in_pod_network=draw(st.booleans()),
                    )
                    for address in draw(
                        st.lists(st.sampled_from(BACKENDS6 if six else BACKENDS4), max_size=4)
                    )
                )
            )
            for _ in range(2)
        )
        actions = tuple(
            Action(
                verdict=draw(st.sampled_from(list(Verdict))),
                candidates=draw(st.integers(0, 1)),
                masquerade=draw(st.booleans()),
            )
            for _ in ClientClass
        )
        found[key] = FrontendPlan(
            key=key,
            kind=FrontendKind.CLUSTER_IP,
            namespace="default",
            service="web",
            port_name="",
            policy=TrafficPolicy.CLUSTER,
            allowed_sources=draw(
                st.one_of(
                    st.none(),
                    st.lists(st.sampled_from(RANGES), max_size=2).map(tuple),
                )
            ),
            candidate_sets=sets,
            actions=(actions[0], actions[1], actions[2]),
        )
    return found


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    sport, dport = draw(st.integers(1, 65535)), draw(st.sampled_from([*PORTS, 81]))
    protocol = draw(st.sampled_from([6, 17, 132, 47]))
    if draw(st.booleans()):
        clients, vips = st.sampled_from(CLIENTS6), st.sampled_from(VIPS6)
        packet = ipv6(draw(clients), draw(vips), sport, dport, protocol, draw(st.booleans()))
    else:
        clients, vips = st.sampled_from(CLIENTS4), st.sampled_from(VIPS4)
        options = draw(st.sampled_from([0, 0, 0, 4]))
        packet = ipv4(draw(clients), draw(vips), sport, dport, protocol, options)
    if draw(st.integers(0, 9)) == 0:
        # Cut before the ports; the fast path does not look at what follows them, the codec does.
        return packet[: draw(st.integers(0, 19))]
    return packet


@settings(max_examples=300, deadline=None)
@given(
    plans(),
    st.lists(st.tuples(st.integers(0, 2), payloads()), max_size=12),
    st.integers(0, 3),
    st.booleans(),
)
def test_equals_the_reference(
    table: dict[FrontendKey, FrontendPlan],
    packets: list[tuple[int, bytes]],
    seed: int,
    by_interface: bool,
) -> None:
    queued = [(index + 1, *packet) for index, packet in enumerate(packets)]
    dataplane = Dataplane(
        rng=Random(seed),
        classes=classes(interface_name_prefix="veth") if by_interface else classes(),
        interfaces=Names(),
        masquerade_source=masquerade_source,
    )
    dataplane.upsert(table.values())
    expected = reference.assemble(
        queued,
        table,
        seed=seed,
        cidrs=() if by_interface else CIDRS,
        node=NODE,
        pod_interfaces=(2,) if by_interface else (),
        masquerade_source=masquerade_source,
    )
    assert dataplane.assemble(queued) == expected


@settings(max_examples=300, deadline=None)
@given(
    plans(),
    st.lists(st.tuples(st.integers(0, 2), payloads()), max_size=12),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_mark_equals_the_reference(
    table: dict[FrontendKey, FrontendPlan],
    packets: list[tuple[int, bytes]],
    seed: int,
    skip: int,
) -> None:
    """Some backends have no mark; every packet comes twice in a row, as twins do."""
    queued = [
        (2 * index + twin, *packet) for index, packet in enumerate(packets) for twin in range(2)
    ]
    dataplane = Dataplane(
        rng=Random(seed),
        classes=classes(),
        interfaces=Names(),
        masquerade_source=masquerade_source,
    )
    dataplane.upsert(table.values())
    numbers = {
        (key, ip_address(backend.address).packed, backend.port): 1 + number
        for key, plan in table.items()
        for number, backend in enumerate(
            dict.fromkeys(b for candidates in plan.candidate_sets for b in candidates.backends)
        )
        if number % 4 != skip
    }
    dataplane.set_marks(
        FrontendMarks(
            key,
            {
                mark: (str(ip_address(address)), port)
                for (of, address, port), mark in numbers.items()
                if of == key
            },
        )
        for key in table
    )
    expected = reference.mark(queued, table, numbers, seed=seed, cidrs=CIDRS, node=NODE)
    assert dataplane.mark(queued, 1000.0) == expected


def one_plan(
    weights: tuple[int, ...] = (5, 3, 2), *, masquerade: bool = False, first: int = 11
) -> FrontendPlan:
    action = Action(verdict=Verdict.BACKEND, masquerade=masquerade)
    return FrontendPlan(
        key=FrontendKey(Protocol.TCP, "10.96.0.80", 80),
        kind=FrontendKind.CLUSTER_IP,
        namespace="default",
        service="web",
        port_name="",
        policy=TrafficPolicy.CLUSTER,
        candidate_sets=(
            CandidateSet(
                backends=tuple(
                    Backend(address=f"10.244.1.{first + index}", port=8080, weight=weight)
                    for index, weight in enumerate(weights)
                )
            ),
            CandidateSet(backends=()),
        ),
        actions=(action, action, action),
    )


def syn(sport: int, client: str = "192.0.2.10") -> tuple[int, int, bytes]:
    return sport, 0, ipv4(client, "10.96.0.80", sport, 80, 6)


def make(*plans: FrontendPlan) -> Dataplane:
    dataplane = Dataplane(
        rng=Random(1), classes=classes(), interfaces=Names(), masquerade_source=masquerade_source
    )
    dataplane.upsert(plans)
    return dataplane


def parsed(entry: bytes) -> tuple[int, ctnetlink.Tuple]:
    message = next(iter(nlmsg.messages(entry)))
    return message.seq, ctnetlink.parse_entry(message.payload).original


def test_sequence_numbers_count_entries_not_packets() -> None:
    other = (9, 0, ipv4("192.0.2.10", "10.96.0.99", 1000, 80, 6))
    entries, dropped = make(one_plan()).assemble([syn(1000), other, syn(1001)])
    assert [parsed(entry)[0] for entry in entries] == [1, 2]
    assert [parsed(entry)[1].src_port for entry in entries] == [1000, 1001]
    assert dropped == []


def test_what_is_dropped_is_counted_by_its_reason() -> None:
    nobody = Action(verdict=Verdict.DROP)
    local = replace(one_plan(), actions=(nobody, nobody, nobody))
    ranged = replace(one_plan(), allowed_sources=("198.51.100.0/24",))
    both = replace(local, allowed_sources=("198.51.100.0/24",))
    for plan, expected in ((local, (0, 2)), (ranged, (2, 0)), (both, (2, 0))):
        dataplane = make(plan)
        entries, dropped = dataplane.assemble([syn(1000), syn(1001)])
        assert (len(entries), len(dropped)) == (0, 2)
        counted = (dataplane.source_range_dropped, dataplane.no_local_endpoint_dropped)
        assert counted == expected, "as in the kernel, the source is looked at first"


def test_a_datagram_is_left_to_those_who_know_its_flow() -> None:
    """Conntrack may hold an entry for it from the time before the policy or the ranges changed."""
    nobody = Action(verdict=Verdict.DROP)
    udp = replace(one_plan(), key=FrontendKey(Protocol.UDP, "10.96.0.80", 80))
    datagram = (1, 0, ipv4("192.0.2.10", "10.96.0.80", 1000, 80, 17))
    for change in (
        {"actions": (nobody, nobody, nobody)},
        {"allowed_sources": ("198.51.100.0/24",)},
    ):
        dataplane = make(replace(udp, **change))
        assert dataplane.assemble([datagram]) == ([], [])
        assert (dataplane.source_range_dropped, dataplane.no_local_endpoint_dropped) == (0, 0)


def test_an_unknown_frontend_is_counted_and_passes() -> None:
    dataplane = make(one_plan())
    assert dataplane.assemble([(1, 0, ipv4("192.0.2.10", "10.96.0.99", 1, 80, 6))]) == ([], [])
    assert dataplane.unknown == 1


def test_a_removed_frontend_is_unknown() -> None:
    dataplane = make(one_plan())
    dataplane.remove([one_plan().key])
    assert dataplane.assemble([syn(1000)]) == ([], [])
    assert len(dataplane) == 0


def test_an_update_keeps_counters_of_backends_that_stay() -> None:
    dataplane = make(one_plan((1, 0, 0)))
    dataplane.assemble([syn(1000)])
    dataplane.upsert([one_plan((1, 1, 1))])
    assert dataplane.picks() == {(one_plan().key, bytes([10, 244, 1, 11]), 8080): 1}


def test_drained_backend_still_counts_as_living() -> None:
    dataplane = make(one_plan((1, 0, 0)))
    key = bytes([10, 96, 0, 80, 0, 80])
    assert dataplane.has_backend(key, 6, bytes([10, 244, 1, 13]), 8080)
    assert not dataplane.has_backend(key, 6, bytes([10, 244, 1, 14]), 8080)
    assert not dataplane.has_backend(key, 47, bytes([10, 244, 1, 13]), 8080)


def test_routes_are_asked_again_after_a_change() -> None:
    asked = []

    def source(address: bytes) -> bytes:
        asked.append(address)
        return bytes([192, 0, 2, len(asked)])

    dataplane = Dataplane(
        rng=Random(1), classes=classes(), interfaces=Names(), masquerade_source=source
    )
    dataplane.upsert([one_plan((1,), masquerade=True)])
    first = dataplane.assemble([syn(1000)])
    assert dataplane.assemble([syn(1000)]) == first
    dataplane.forget_masquerade_sources()
    assert dataplane.assemble([syn(1000)]) != first
    assert len(asked) == 2


def test_without_a_route_a_masqueraded_connection_passes_and_is_counted() -> None:
    found: list[bytes | None] = [None, None, bytes([192, 0, 2, 1])]
    dataplane = Dataplane(
        rng=Random(1),
        classes=classes(),
        interfaces=Names(),
        masquerade_source=lambda _: found.pop(0),
    )
    dataplane.upsert([one_plan((1,), masquerade=True)])
    assert dataplane.assemble([syn(1000), syn(1001)]) == ([], [])
    assert dataplane.no_route == 2
    entries, _ = dataplane.assemble([syn(1000)])  # asked again: now there is a route
    assert len(entries) == 1


def test_a_backend_on_the_node_itself_sees_the_client() -> None:
    """What is delivered locally never passes POSTROUTING, where MASQUERADE would be."""
    dataplane = Dataplane(
        rng=Random(1), classes=classes(), interfaces=Names(), masquerade_source=lambda _: b""
    )
    dataplane.upsert([one_plan((1,), masquerade=True)])
    plain = Dataplane(
        rng=Random(1), classes=classes(), interfaces=Names(), masquerade_source=lambda _: None
    )
    plain.upsert([one_plan((1,), masquerade=False)])
    assert dataplane.assemble([syn(1000)]) == plain.assemble([syn(1000)])
    assert dataplane.no_route == 0


def test_a_backend_that_leaves_leaves_nothing_behind() -> None:
    def targets() -> int:
        gc.collect()
        return sum(isinstance(thing, Target) for thing in gc.get_objects())

    before = targets()
    dataplane = make(one_plan((1,), masquerade=True))
    for number in range(20):
        dataplane.upsert([one_plan((1,), masquerade=True, first=number)])
        dataplane.assemble([syn(1000)])
    assert targets() == before + 1


LOCAL_FOR_STRANGERS = (
    Action(verdict=Verdict.BACKEND),
    Action(verdict=Verdict.BACKEND),
    Action(verdict=Verdict.DROP),
)


def dropping_strangers(*arrivals: int, names: Names) -> tuple[Dataplane, list[QueuedPacket]]:
    """A dataplane that drops strangers, and one packet of one source for each arrival."""
    plan = msgspec.structs.replace(one_plan(), actions=LOCAL_FOR_STRANGERS)
    dataplane = Dataplane(
        rng=Random(1),
        classes=classes(interface_name_prefix="veth"),
        interfaces=names,
        masquerade_source=masquerade_source,
    )
    dataplane.upsert([plan])
    packets = [(number, arrival, syn(number)[2]) for number, arrival in enumerate(arrivals)]
    return dataplane, packets


def test_by_interface_a_packet_is_what_it_came_in_by() -> None:
    names = Names()
    dataplane, packets = dropping_strangers(2, 2, 1, 2, 0, 1, names=names)
    entries, dropped = dataplane.assemble(packets)
    assert dropped == [2, 4, 5]  # by eth0, and forged by a process of the node
    assert [parsed(entry)[0] for entry in entries] == [1, 2, 3]
    assert [parsed(entry)[1].src_port for entry in entries] == [0, 1, 3]
    assert names.asked == [2, 1, 0]
    dataplane.assemble(packets)
    assert names.asked == [2, 1, 0]  # and remembered


def test_an_index_that_changes_hands_takes_its_new_name() -> None:
    names = Names()
    dataplane, packets = dropping_strangers(1, 2, names=names)
    assert dataplane.assemble(packets)[1] == [0]
    names.rename(if1="vethb", if2="eth1")
    assert dataplane.assemble(packets)[1] == [1]


def test_an_interface_that_has_gone_is_asked_for_again() -> None:
    names = Names()
    dataplane, packets = dropping_strangers(9, names=names)
    assert dataplane.assemble(packets)[1] == [0]
    names.names[9] = "veth9"
    assert dataplane.assemble(packets)[1] == []


def test_by_address_nobody_asks_for_interfaces() -> None:
    names = Names()
    dataplane, packets = dropping_strangers(1, 2, names=names)
    dataplane.set_classes(classes())
    dataplane.assemble(packets)
    assert names.asked == []
    assert names.changed()  # not even that was asked


def test_a_raising_balancer_costs_its_own_packets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def update(self, weights: object, rng: Random) -> None: ...

        def pick(self) -> int:
            raise ZeroDivisionError

        def probabilities(self) -> tuple[float, ...]:
            return ()

    from nfqproxy import balancers

    monkeypatch.setitem(balancers._REGISTRY, "broken", Broken)
    broken = msgspec.structs.replace(
        one_plan(), key=FrontendKey(Protocol.TCP, "10.96.0.81", 80), balancer="broken"
    )
    dataplane = make(one_plan(), broken)
    entries, dropped = dataplane.assemble(
        [(1, 0, ipv4("192.0.2.10", "10.96.0.81", 1, 80, 6)), syn(1000)]
    )
    assert len(entries) == 1
    assert dropped == []
    assert dataplane.failed_picks == 1


@given(st.binary(max_size=80))
def test_any_bytes_are_survived(payload: bytes) -> None:
    entries, dropped = make(one_plan()).assemble([(1, 0, payload), syn(1000)])
    assert len(entries) >= 1
    assert dropped == []


def marking(*plans: FrontendPlan, first: int = 1) -> Dataplane:
    """A dataplane whose backends are numbered in order."""
    dataplane = make(*plans)
    dataplane.set_marks(numbered(plan, first) for plan in plans)
    return dataplane


def numbered(plan: FrontendPlan, first: int = 1) -> FrontendMarks:
    backends = plan.candidate_sets[0].backends
    return FrontendMarks(
        plan.key, {n: (each.address, each.port) for n, each in enumerate(backends, first)}
    )


KEEP, MASQUERADE = 0x1000, 0x2000


def test_a_retransmission_gets_the_same_mark_and_a_port_used_again_another_pick() -> None:
    dataplane = marking(one_plan((1, 1, 1, 1)))
    same = [(number, 0, syn(1000)[2]) for number in range(40)]
    marks, dropped = dataplane.mark(same, 1000.0)
    assert dropped == []
    assert len(set(marks.values())) == 1
    assert sum(dataplane.picks().values()) == 1
    # 4 bytes behind the ports is the sequence number.
    fresh = [
        (number, 0, packet[:24] + number.to_bytes(4) + packet[28:])
        for number, _, packet in same
        if number
    ]
    marks, _ = dataplane.mark(fresh, 1000.0)
    assert len(set(marks.values())) == 4


def test_a_flow_is_forgotten_after_a_while() -> None:
    dataplane = marking(one_plan((1,) * 64))
    (first,) = dataplane.mark([syn(1000)], 1000.0)[0].values()
    assert set(dataplane.mark([syn(1000)], 1007.9)[0].values()) == {first}
    later = {
        mark
        for turn in range(20)
        for mark in dataplane.mark([syn(1000)], 1100.0 + 100 * turn)[0].values()
    }
    assert len(later) > 1


def test_a_flow_leaves_a_backend_that_has_gone() -> None:
    dataplane = marking(one_plan((1,)))
    assert dataplane.mark([syn(1000)], 1000.0) == ({1000: 1 | KEEP}, [])
    other = one_plan((1,), first=12)
    dataplane.upsert([other])
    assert dataplane.mark([syn(1000)], 1000.0) == ({}, [])
    assert dataplane.unmarked == 1
    dataplane.set_marks([numbered(other, 2)])
    assert dataplane.mark([syn(1000)], 1000.0) == ({1000: 2 | KEEP}, [])
    dataplane.remove([other.key])
    assert dataplane.mark([syn(1000)], 1000.0) == ({}, [])


def test_marks_stay_with_a_backend_over_another_plan() -> None:
    """Until the supervisor tells others; those it takes away count no longer."""
    dataplane = marking(one_plan((1,)))
    dataplane.upsert([one_plan((7,), masquerade=True)])
    assert dataplane.mark([syn(1001)], 1000.0) == ({1001: 1 | MASQUERADE}, [])
    dataplane.set_marks([FrontendMarks(one_plan().key, {})])
    assert dataplane.mark([syn(1001)], 1000.0) == ({}, [])
