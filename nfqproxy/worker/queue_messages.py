"""Messages of one read of a queue, each in a slot of one buffer, looked at together.

Under load nearly all messages of a read are alike: the same attributes in front of the payload, and in it
a packet of the same IP version and protocol without options. That is checked by columns, a byte at one
offset of all slots, cut out and compared by one slice each: some 0.03 microseconds a packet, where
unpacking and comparing message by message would cost about what the decision does. The rows that decide
(core.dataplane.Row) then come straight from the buffer.

Soundness: a payload is foreign bytes, so that a message must never be read by the layout of another. The
columns of a layout are type and length of every attribute in order, and these tell where the next one
stands: up to the payload's own header no byte is looked at that the kernel has not written
(nfqnl_build_packet_message). All of these are below 256, so that the low bytes do.
"""

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from sys import byteorder
from typing import overload

from nfqproxy.core.dataplane import AlikePackets, QueuedPacket, Row
from nfqproxy.core.flow_memory import FLOW_BYTES
from nfqproxy.model import Protocol
from nfqproxy.wire import nfqueue
from nfqproxy.worker.batch_receive import BatchReceiver

SLOT_BYTES = 448
"""Room for one message: 128 bytes of packet and every attribute the kernel sends beside them take 270.

An odd number of cache lines, so that the same byte of all slots does not fall into few cache sets.
"""

ALIKE_PROTOCOLS = (Protocol.TCP, Protocol.UDP)
"""Protocols worth a look at whole batches."""

_MAX_LAYOUTS = 8
"""Layouts that are remembered: forwarded or from the node, with a mark or without, ..."""

_FIRST = Struct("=4xH18xI4xQ").unpack_from
"""Type of the message, packet id, arrival."""
_ID_AT, _ARRIVAL_AT, _FIRST_END = 24, 32, 40
_ID = Struct(f"={_ID_AT}xI").unpack_from
_ATTRIBUTE = Struct("=HH").unpack_from
_LOW = 0 if byteorder == "little" else 1
"""Offset of the low byte of 16 bits."""


def arrived_by(arrival: int) -> int:
    """Index of the interface that a packet came in by, 0 for one that this node sends.

    ``arrival`` is the whole second attribute, header and value, as one number: in raw PREROUTING that is
    NFQA_IFINDEX_INDEV and in raw OUTPUT NFQA_IFINDEX_OUTDEV, always and first of all that follow
    NFQA_PACKET_HDR (nfqnl_build_packet_message; wire.nfqueue lists them).
    """
    attribute = arrival.to_bytes(8, byteorder)
    is_indev = _ATTRIBUTE(attribute) == (8, nfqueue.NFQA_IFINDEX_INDEV)
    return int.from_bytes(attribute[4:]) if is_indev else 0


class _Columns:
    """What must stand at given offsets of all slots."""

    def __init__(
        self,
        slots: int,
        exact: Iterable[tuple[int, int]],
        among: Iterable[tuple[int, Iterable[int]]] = (),
    ) -> None:
        """``exact``: (offset, byte); ``among``: (offset, the bytes that may stand there)."""
        self._exact = [(offset, bytes([byte]) * slots) for offset, byte in exact]
        self._among = [(offset, bytes(allowed)) for offset, allowed in among]

    def fit(self, slots: bytearray, count: int) -> bool:
        """Whether they do in the first ``count`` slots."""
        end = count * SLOT_BYTES
        for offset, expected in self._exact:
            if slots[offset:end:SLOT_BYTES] != expected[:count]:
                return False
        return not any(
            slots[offset:end:SLOT_BYTES].translate(None, allowed) for offset, allowed in self._among
        )


class _Kind:
    """One IP version and protocol in the payloads of one layout."""

    def __init__(self, slots: int, *, payload_at: int, version: int, protocol: Protocol) -> None:
        self.protocol = protocol.value
        # Offsets and lengths by RFC 791 and RFC 8200.
        if version == 4:
            header, size, addresses = 20, 4, 12
            exact = [(0, 0x45), (9, protocol.value), (7, 0)]  # 7: low byte of the fragment offset
            # and its high part, beside the flags
            among: tuple[int, Iterable[int]] = 6, [flags << 5 for flags in range(8)]
        else:
            header, size, addresses = 40, 16, 8
            exact = [(6, protocol.value)]
            among = 0, range(0x60, 0x70)
        # Long enough for a flow. NFQA_PAYLOAD's length counts its own header.
        least = 4 + header + max(FLOW_BYTES[each] for each in ALIKE_PROTOCOLS)
        self._columns = _Columns(
            slots,
            [(payload_at + offset, byte) for offset, byte in exact],
            [
                (payload_at + among[0], among[1]),
                (payload_at - 4 + _LOW, range(least, 256)),
            ],
        )
        self.fit = self._columns.fit
        source, ports = payload_at + addresses, payload_at + header
        self.rows = _unpacker(
            (_ID_AT, "I"),
            (source, f"{size}s"),
            (source + size, f"{size}s"),
            (ports, "2s"),
            (ports + 2, "2s"),
        )
        # Addresses and the transport header follow each other.
        self.flows = _unpacker((_ID_AT, "I"), (source, f"{2 * size + FLOW_BYTES[protocol.value]}s"))


def _unpacker(*fields: tuple[int, str]) -> Struct:
    """Takes fields out of a whole slot; each is (offset, format), in ascending order."""
    layout, position = "=", 0
    for offset, code in fields:
        layout += f"{offset - position}x{code}"
        position = offset + Struct(f"={code}").size
    return Struct(f"{layout}{SLOT_BYTES - position}x")


class _Layout:
    """One sequence of attributes from the arrival to the payload."""

    def __init__(self, slots: int, headers: tuple[tuple[int, int], ...]) -> None:
        """``headers``: length and type of every attribute between the two."""
        self.headers = headers
        mark_at = 0
        offset = _FIRST_END
        exact = [(_ARRIVAL_AT + _LOW, 8)]
        for length, kind in headers:
            exact += [(offset + _LOW, length), (offset + 2 + _LOW, kind)]
            if kind == nfqueue.NFQA_MARK:
                mark_at = offset + 4
            offset += (length + 3) & ~3
        self.payload_at = offset + 4
        # First the one by which layouts mostly differ.
        exact.insert(0, (offset + 2 + _LOW, nfqueue.NFQA_PAYLOAD))
        exact += [(4 + _LOW, nfqueue.MSG_PACKET & 0xFF), (5 - _LOW, nfqueue.MSG_PACKET >> 8)]
        self.fit = _Columns(slots, exact).fit
        self.packets = _unpacker((_ID_AT, "I"), (_ARRIVAL_AT, "Q"), (self.payload_at - 4, "H"))
        self.marks = _unpacker((_ID_AT, "I"), (mark_at, "4s")) if mark_at else None
        self.kinds = {
            (version, protocol.value): _Kind(
                slots, payload_at=self.payload_at, version=version, protocol=protocol
            )
            for version in (4, 6)
            for protocol in ALIKE_PROTOCOLS
        }

    def kind(self, slots: bytearray) -> _Kind | None:
        """The kind of the first packet, which tells no more than which one to try."""
        first = slots[self.payload_at]
        protocol_at = 9 if first == 0x45 else 6
        return self.kinds.get((first >> 4, slots[self.payload_at + protocol_at]))


class _OneLayout(Sequence[QueuedPacket]):
    """The packets of slots that all have one layout."""

    def __init__(self, slots: bytearray, count: int, layout: _Layout) -> None:
        self._slots = memoryview(slots)[: count * SLOT_BYTES]
        self._count = count
        self._layout = layout

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> QueuedPacket: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[QueuedPacket]: ...
    def __getitem__(self, index: int | slice) -> QueuedPacket | Sequence[QueuedPacket]:
        if isinstance(index, slice):
            return list(self)[index]
        start = range(self._count)[index] * SLOT_BYTES
        return next(self._unpack(self._slots[start : start + SLOT_BYTES]))

    def __iter__(self) -> Iterator[QueuedPacket]:
        return self._unpack(self._slots)

    def _unpack(self, slots: memoryview) -> Iterator[QueuedPacket]:
        start = self._layout.payload_at
        for packet_id, arrival, length in self._layout.packets.iter_unpack(slots):
            yield packet_id, arrival, bytes(slots[start : start + length - 4])
            start += SLOT_BYTES


class _OneKind(_OneLayout, AlikePackets):
    """The packets of slots that all have one layout, and packets of one kind."""

    def __init__(self, slots: bytearray, count: int, layout: _Layout, kind: _Kind) -> None:
        super().__init__(slots, count, layout)
        self.protocol = kind.protocol
        self._kind = kind

    def rows(self) -> Iterable[Row]:
        """See AlikePackets."""
        return self._kind.rows.iter_unpack(self._slots)

    def flows(self) -> dict[int, bytes]:
        """See AlikePackets."""
        return dict(self._kind.flows.iter_unpack(self._slots))


class QueueMessages:
    """Reads the messages that a receiver has put into its slots."""

    def __init__(self, receiver: BatchReceiver) -> None:
        self._receiver = receiver
        self._capacity = len(receiver.slots) // SLOT_BYTES
        self._layouts: list[_Layout] = []
        self._count = 0
        self._layout: _Layout | None = None
        self._marks: dict[int, int] = {}

    def packets(self, count: int) -> tuple[Sequence[QueuedPacket], Sequence[bytes]]:
        """The packets of the first ``count`` slots, good until the next receive, and other messages."""
        self._count = count
        self._layout = layout = self._find_layout(count)
        if layout is None:
            return self._walk_all(count)
        slots = self._receiver.slots
        kind = layout.kind(slots)
        if kind is None or not kind.fit(slots, count):
            return _OneLayout(slots, count, layout), ()
        return _OneKind(slots, count, layout, kind), ()

    def last_id(self, packets: Sequence[QueuedPacket]) -> int:
        """Id of the last of the packets that ``packets`` returned last."""
        if self._layout is None:
            return packets[-1][0]
        packet_id: int = _ID(self._receiver.slots, (self._count - 1) * SLOT_BYTES)[0]
        return packet_id

    def marks(self) -> dict[int, int]:
        """Packet marks of the last ``packets`` by packet id; those that are 0 may be left out."""
        layout = self._layout
        if layout is None:
            return self._marks
        if layout.marks is None:
            return {}
        slots = memoryview(self._receiver.slots)[: self._count * SLOT_BYTES]
        return {
            packet_id: int.from_bytes(mark) for packet_id, mark in layout.marks.iter_unpack(slots)
        }

    def _find_layout(self, count: int) -> _Layout | None:
        for layout in self._layouts:
            if layout.fit(self._receiver.slots, count):
                if layout is not self._layouts[0]:
                    self._layouts.remove(layout)
                    self._layouts.insert(0, layout)
                return layout
        return None

    def _walk_all(self, count: int) -> tuple[list[QueuedPacket], list[bytes]]:
        packets: list[QueuedPacket] = []
        others: list[bytes] = []
        self._marks = {}
        slots = self._receiver.slots
        for index in range(count):
            start = index * SLOT_BYTES
            data = bytes(slots[start : start + self._receiver.length(index)])
            queued = self._walk(data)
            if queued is None:
                others.append(data)
            else:
                packets.append(queued)
        return packets, others

    def _walk(self, data: bytes) -> QueuedPacket | None:
        """Read one message attribute by attribute; learn its layout for later reads."""
        if len(data) < _FIRST_END:
            return None
        kind, packet_id, arrival = _FIRST(data)
        if kind != nfqueue.MSG_PACKET:
            return None
        headers: list[tuple[int, int]] = []
        offset = _FIRST_END
        while offset + 4 <= len(data):
            length, attribute = _ATTRIBUTE(data, offset)
            if attribute == nfqueue.NFQA_PAYLOAD:
                self._learn(tuple(headers))
                return packet_id, arrival, data[offset + 4 : offset + length]
            if length < 4:
                break
            if attribute == nfqueue.NFQA_MARK:
                self._marks[packet_id] = int.from_bytes(data[offset + 4 : offset + 8])
            headers.append((length, attribute))
            offset += (length + 3) & ~3
        # No payload: decided as an unreadable packet, that is, accepted.
        return packet_id, arrival, b""

    def _learn(self, headers: tuple[tuple[int, int], ...]) -> None:
        if any(layout.headers == headers for layout in self._layouts):
            return
        if any(each > 0xFF for header in headers for each in header):
            return  # a column is one byte
        self._layouts.insert(0, _Layout(self._capacity, headers))
        del self._layouts[_MAX_LAYOUTS:]
