"""Batches read by columns against each message read by itself, the slow and obvious way."""

import struct
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from nfqproxy.core.dataplane import AlikePackets, QueuedPacket
from nfqproxy.core.flow_memory import FLOW_BYTES
from nfqproxy.wire import nfqueue, nlmsg, packet
from nfqproxy.worker.queue_messages import SLOT_BYTES, QueueMessages, arrived_by
from tests.unit.core.test_dataplane import ipv4, make, marking, one_plan, payloads, syn

CAPACITY = 16

Attributes = tuple[tuple[int, bytes], ...]

MARK = (nfqueue.NFQA_MARK, struct.pack("!I", 0x4001))
SENDER = (nfqueue.NFQA_HWADDR, b"\0\6\0\0\2\0\0\0\0\1\0\0")
CHECKSUM = (nfqueue.NFQA_SKB_INFO, struct.pack("!I", 1))
PRIORITY = (nfqueue.NFQA_PRIORITY, struct.pack("!I", 6))
STAMP = (nfqueue.NFQA_TIMESTAMP, bytes(16))

VARIANTS: tuple[Attributes, ...] = (
    (SENDER, CHECKSUM),
    (MARK, SENDER, CHECKSUM),
    (SENDER,),
    (),
    (MARK,),
    (SENDER, STAMP, CHECKSUM, PRIORITY),
    ((nfqueue.NFQA_CAP_LEN, struct.pack("!I", 1500)), CHECKSUM),
    ((nfqueue.NFQA_VLAN | nlmsg.NLA_F_NESTED, bytes(8)), CHECKSUM),
)


class Slots:
    """What a receiver leaves behind: messages in slots, and the rests of longer ones behind them."""

    slot_bytes = SLOT_BYTES

    def __init__(self, messages: Sequence[bytes]) -> None:
        self.slots = bytearray(b"\xaa" * CAPACITY * SLOT_BYTES)
        self._lengths = [len(each) for each in messages]
        for index, each in enumerate(messages):
            self.slots[index * SLOT_BYTES : index * SLOT_BYTES + len(each)] = each

    def length(self, index: int) -> int:
        return self._lengths[index]


def message(number: int, payload: bytes, attributes: Attributes, arrival: int = 5) -> bytes:
    head = struct.pack("!IHBx", number, 0x0800, 0)
    body = struct.pack("=BBH", 2, 0, 0)
    body += struct.pack("=HH", 11, nfqueue.NFQA_PACKET_HDR) + head
    body += nlmsg.attribute(arrival, struct.pack("!I", 7))
    body += b"".join(nlmsg.attribute(kind, value) for kind, value in attributes)
    return nlmsg.message(nfqueue.MSG_PACKET, 0, 0, body + nlmsg.attribute(10, payload))


def expected(data: bytes) -> QueuedPacket:
    read = nfqueue.parse_packet(next(nlmsg.messages(data)).payload)
    (packet_id,) = struct.unpack("=I", read.packet_id.to_bytes(4))
    return packet_id, read.indev or 0, read.payload


def read(reader: QueueMessages, receiver: Slots, count: int) -> Sequence[QueuedPacket]:
    reader._receiver = receiver  # type: ignore[assignment]
    packets, others = reader.packets(count)
    assert not others
    return packets


def assert_right(packets: Sequence[QueuedPacket], messages: Sequence[bytes]) -> None:
    got = [(packet_id, arrived_by(arrival), data) for packet_id, arrival, data in packets]
    assert got == [expected(each) for each in messages]
    assert packets[-1] == list(packets)[-1]
    if not isinstance(packets, AlikePackets):
        return
    flows = packets.flows()
    for row, (packet_id, _, data) in zip(packets.rows(), got, strict=True):
        headers = packet.parse(data)
        source, destination = headers.src_port.to_bytes(2), headers.dst_port.to_bytes(2)
        assert row == (packet_id, headers.src, headers.dst, source, destination)
        assert (headers.protocol, headers.is_fragment) == (packets.protocol, False)
        start = headers.transport_offset
        flow = data[start : start + FLOW_BYTES[headers.protocol]]
        assert flows[packet_id] == headers.src + headers.dst + flow


@st.composite
def packets_(draw: st.DrawFn) -> bytes:
    """Mostly long enough, now and then with another byte in the IP header: a fragment, an option, ...

    Lengths are left as they are: the kernel has looked at them before any packet is queued.
    """
    payload = bytearray(draw(payloads()) + bytes(draw(st.sampled_from([12, 12, 12, 0, 4]))))
    if len(payload) > 9 and draw(st.integers(0, 5)) == 0:
        payload[draw(st.sampled_from([0, 1, 6, 7, 8, 9]))] = draw(st.integers(0, 255))
    return bytes(payload)


VARIANT_AND_PACKET = st.tuples(st.sampled_from(VARIANTS), packets_())

BATCHES = st.one_of(
    # All alike but for one, if at all: what columns are for.
    st.tuples(
        st.lists(VARIANT_AND_PACKET, min_size=1, max_size=1),
        st.integers(3, CAPACITY - 1),
        st.lists(VARIANT_AND_PACKET, max_size=1),
    ).map(lambda parts: parts[0] * parts[1] + parts[2]),
    st.lists(VARIANT_AND_PACKET, min_size=1, max_size=CAPACITY),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(BATCHES, min_size=1, max_size=3), st.sampled_from([5, 6]))
def test_equals_message_by_message(
    batches: list[list[tuple[Attributes, bytes]]], arrival: int
) -> None:
    reader = QueueMessages(Slots([]))  # type: ignore[arg-type]
    # Twice: at the first time the layouts are learnt.
    for batch in [each for each in batches for _ in range(2)]:
        messages = [
            message(number + 1, payload, attributes, arrival)
            for number, (attributes, payload) in enumerate(batch)
        ]
        packets = read(reader, Slots(messages), len(messages))
        assert_right(packets, messages)
        by_columns, one_by_one = make(one_plan()), make(one_plan())
        assert by_columns.assemble(packets) == one_by_one.assemble(list(packets))
        by_columns, one_by_one = marking(one_plan((1,))), marking(one_plan((1,)))
        assert by_columns.mark(packets, 1.0) == one_by_one.mark(list(packets), 1.0)
        marked = {
            expected(data)[0]: 0x4001
            for data, (attributes, _) in zip(messages, batch, strict=True)
            if MARK in attributes
        }
        assert reader.marks() == marked


def plain(count: int) -> list[bytes]:
    return [message(n + 1, syn(1000 + n)[2] + bytes(12), VARIANTS[0]) for n in range(count)]


def reader_that_knows(*attributes: Attributes) -> QueueMessages:
    reader = QueueMessages(Slots([]))  # type: ignore[arg-type]
    for each in attributes:
        read(reader, Slots([message(1, syn(1)[2], each)]), 1)
    return reader


def test_alike_packets_are_known_as_such() -> None:
    packets = read(reader_that_knows(VARIANTS[0]), Slots(plain(8)), 8)
    assert isinstance(packets, AlikePackets)
    assert (len(packets), packets.protocol) == (8, 6)


def test_a_payload_cannot_pass_for_the_headers_of_another_layout() -> None:
    """A sender knows where a longer layout has its payload, and writes one there that names another client."""
    reader = reader_that_knows(VARIANTS[1])
    forged = message(1, ipv4("192.0.2.66", "10.96.0.80", 666, 80, 6) + bytes(12), VARIANTS[1])
    begin = len(message(1, b"", VARIANTS[0]))
    payload = bytearray(syn(1000)[2] + bytes(100))
    payload[24:] = forged[begin + 24 :].ljust(100, b"\0")[:100]
    messages = [message(n + 1, bytes(payload), VARIANTS[0]) for n in range(8)]
    sources = {packet.parse(data).src for _, _, data in read(reader, Slots(messages), 8)}
    assert sources == {packet.parse(syn(1000)[2]).src}


def test_what_is_no_packet_is_handed_over_as_it_came() -> None:
    """The kernel's answer to a verdict it did not take stands between the packets."""
    error = nlmsg.message(nlmsg.NLMSG_ERROR, 0, 0, struct.pack("=i", -2) + bytes(16))
    messages = plain(8)
    messages[3:3] = [error]
    reader = reader_that_knows(VARIANTS[0])
    reader._receiver = Slots(messages)  # type: ignore[assignment]
    packets, others = reader.packets(9)
    assert list(others) == [error]
    assert_right(packets, messages[:3] + messages[4:])
