"""Queue readers: two interchangeable ways to take packets off an NFQUEUE and answer for them.

``netlink`` speaks the protocol itself: batches, fail-open, one verdict message for a whole batch where
one verdict fits all.
``netfilterqueue`` uses the package of that name (libnetfilter_queue): one verdict message a packet.
Both hand out ``core.dataplane.QueuedPacket`` tuples and answer in arrival order.
"""

import errno
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from sys import byteorder
from typing import Any, Protocol

from nfqproxy.core.dataplane import QueuedPacket
from nfqproxy.errors import HostError, InputError, NfqproxyError
from nfqproxy.kernel.queue_socket import QUEUE_TABLE, QueueSocket
from nfqproxy.wire import nfqueue, nlmsg
from nfqproxy.worker.batch_receive import BatchReceiver

BATCH = 64
"""Packets taken off the queue before they are decided together."""
COPY_RANGE = 128
"""Bytes of each packet that the kernel hands over: headers with IPv6 extension headers fit."""
_SLOT_BYTES = 512
"""Room for one message: the copied bytes and every attribute the kernel sends beside them."""


_MAX_LAYOUTS = 8
"""Layouts of messages that are remembered: forwarded or from the node, with a mark or without, ..."""

_Layout = tuple[Callable[..., tuple[int, ...]], tuple[int, ...], int, int]
"""unpack_from of everything up to the payload, the attribute headers it must find, payload offset, offset
of NFQA_MARK's value (0: there is none)."""


class Answer:
    """What becomes of the packets of a batch: accepted as they came, but for those named here."""

    __slots__ = ("dropped", "marks")

    def __init__(self) -> None:
        self.dropped: list[int] = []
        """Ids of packets to drop."""
        self.marks: Mapping[int, int] = {}
        """Id -> the whole packet mark to accept it with; one that is dropped as well is dropped."""


class QueueReader(Protocol):
    """Takes packets off one queue. Every packet read is answered exactly once, by ``answer``."""

    queue_socket: QueueSocket
    overruns: int
    """Times the socket's buffer overran: the kernel let packets pass undecided."""
    verdict_errors: int
    """Verdicts the kernel did not take."""

    @property
    def holds_packets(self) -> bool:
        """True when packets taken off the socket wait in the reader for the next ``read``."""
        ...

    def arrived_by(self, arrival: int) -> int:
        """Index of the interface that a packet came in by, 0 for one that this node sends.

        ``arrival`` is the second field of a queued packet.
        """
        ...

    def fileno(self) -> int:
        """The queue's socket, for the event loop."""
        ...

    def read(self) -> Sequence[QueuedPacket]:
        """Up to BATCH waiting packets, in arrival order; empty when none waits."""
        ...

    def marks(self) -> Mapping[int, int]:
        """Packet marks of the last ``read`` by packet id; those that are 0 may be left out."""
        ...

    def answer(self, packets: Sequence[QueuedPacket], answer: Answer) -> None:
        """Answer all packets of the last ``read``."""
        ...


class NetlinkReader:
    """The project's own reader: recvmmsg(2) in, one verdict message for a batch out.

    Packet ids are left in network order, as they came: all but the last of a batch are never looked at.
    ``arrival`` is likewise the whole second attribute, header and value, as one number: in raw PREROUTING
    that is NFQA_IFINDEX_INDEV and in raw OUTPUT NFQA_IFINDEX_OUTDEV, always and first of all that follow
    NFQA_PACKET_HDR (nfqnl_build_packet_message; wire.nfqueue lists them).
    """

    # nlmsghdr length, type; packet id; arrival.
    _FIRST = "=IH18xI4xQ"
    _ATTRIBUTE = Struct("=HH").unpack_from
    _WORD = Struct("=I").unpack_from
    _FIRST_END = 40

    def __init__(self, queue: int) -> None:
        self.queue_socket = QueueSocket.bind(queue, COPY_RANGE)
        self.overruns = 0
        self.verdict_errors = 0
        self._receiver = BatchReceiver(self.fileno(), slots=BATCH, slot_bytes=_SLOT_BYTES)
        self._send = self.queue_socket.handle.send
        self._layouts: list[_Layout] = []
        self._layout = self._learn_layout(())
        self._marks: dict[int, int] = {}
        # One message accepts everything up to an id: all before the id is constant.
        self._accept_up_to = nfqueue.verdict_batch(queue, 0, nfqueue.NF_ACCEPT)[:-4]
        # The same for one packet with a mark: the id, an attribute header, the mark.
        marked = nfqueue.verdict(queue, 0, nfqueue.NF_ACCEPT, 0)
        self._accept, self._mark_header = marked[:-12], marked[-8:-4]
        self._pack_marked = Struct(f"={len(self._accept)}sI4s4s").pack

    @property
    def holds_packets(self) -> bool:
        """See QueueReader: never, each ``read`` takes from the socket what it returns."""
        return False

    def fileno(self) -> int:
        """See QueueReader."""
        return self.queue_socket.handle.fileno()

    def arrived_by(self, arrival: int) -> int:
        """See QueueReader."""
        attribute = arrival.to_bytes(8, byteorder)
        is_indev = self._ATTRIBUTE(attribute) == (8, nfqueue.NFQA_IFINDEX_INDEV)
        return int.from_bytes(attribute[4:]) if is_indev else 0

    def _learn_layout(self, headers: tuple[int, ...]) -> _Layout:
        """Remember the attributes between the arrival and NFQA_PAYLOAD, as header words.

        They are the same for nearly all packets of a hook and a kind of sender, so that one unpack checks
        them all and finds the payload, where a walk from attribute to attribute would cost more than the
        decision.
        """
        layout = self._FIRST
        offset = self._FIRST_END
        mark_at = 0
        for word in headers:
            length, kind = Struct("=HH").unpack(Struct("=I").pack(word))
            if kind == nfqueue.NFQA_MARK:
                mark_at = offset + 4
            padded = (length + 3) & ~3
            layout += f"I{padded - 4}x"
            offset += padded
        layout += "2xH"
        expected = (*headers, nfqueue.NFQA_PAYLOAD)
        learnt = Struct(layout).unpack_from, expected, offset + 4, mark_at
        self._layouts = [learnt, *self._layouts[: _MAX_LAYOUTS - 1]]
        return learnt

    def _decode(self, slots: bytes, start: int, index: int) -> QueuedPacket | None:
        """Read a message that has not the layout of the one before; its own is tried first next time."""
        for layout in self._layouts:
            unpack, expected, payload_at, mark_at = layout
            fields = unpack(slots, start)
            if (
                fields[4:] == expected
                and fields[1] == nfqueue.MSG_PACKET
                and fields[0] <= _SLOT_BYTES
            ):
                self._layout = layout
                if mark_at:
                    self._marks[fields[2]] = int.from_bytes(
                        slots[start + mark_at : start + mark_at + 4]
                    )
                return fields[2], fields[3], slots[start + payload_at : start + fields[0]]
        data = slots[start : start + self._receiver.length(index)]
        walked = self._walk(data)
        if walked is None:
            self._count_errors(data)
        return walked

    def _walk(self, data: bytes) -> QueuedPacket | None:
        """Read one message attribute by attribute; learn its layout for the next ones."""
        if len(data) < self._FIRST_END:
            return None
        _length, kind, packet_id, arrival = Struct(self._FIRST).unpack_from(data)
        if kind != nfqueue.MSG_PACKET:
            return None
        headers: list[int] = []
        offset = self._FIRST_END
        while offset + 4 <= len(data):
            length, attribute = self._ATTRIBUTE(data, offset)
            if attribute == nfqueue.NFQA_PAYLOAD:
                self._layout = self._learn_layout(tuple(headers))
                return packet_id, arrival, data[offset + 4 : offset + length]
            if length < 4:
                break
            if attribute == nfqueue.NFQA_MARK:
                self._marks[packet_id] = int.from_bytes(data[offset + 4 : offset + 8])
            headers.append(self._WORD(data, offset)[0])
            offset += (length + 3) & ~3
        # No payload: decided as an unreadable packet, that is, accepted.
        return packet_id, arrival, b""

    def read(self) -> list[QueuedPacket]:
        """See QueueReader."""
        try:
            count, slots = self._receiver.receive()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            # The socket's error is cleared by having been told; what waits is still there.
            count, slots = self._receiver.receive()
        packets: list[QueuedPacket] = []
        append = packets.append
        marks = self._marks = {}
        packet_type = nfqueue.MSG_PACKET
        slot_bytes = _SLOT_BYTES
        from_bytes = int.from_bytes
        layout = self._layout
        unpack, expected, payload_at, mark_at = layout
        for start in range(0, count * slot_bytes, slot_bytes):
            fields = unpack(slots, start)
            if fields[4:] == expected and fields[1] == packet_type and fields[0] <= slot_bytes:
                append((fields[2], fields[3], slots[start + payload_at : start + fields[0]]))
                if mark_at:
                    marks[fields[2]] = from_bytes(slots[start + mark_at : start + mark_at + 4])
                continue
            decoded = self._decode(slots, start, start // slot_bytes)
            if decoded is not None:
                append(decoded)
            if self._layout is not layout:
                layout = self._layout
                unpack, expected, payload_at, mark_at = layout
        return packets

    def marks(self) -> dict[int, int]:
        """See QueueReader."""
        return self._marks

    def _count_errors(self, data: bytes) -> None:
        for message in nlmsg.messages(data):
            if message.type == nlmsg.NLMSG_ERROR and nlmsg.ack(message).errno:
                self.verdict_errors += 1

    def answer(self, packets: Sequence[QueuedPacket], answer: Answer) -> None:
        """See QueueReader."""
        marks, dropped = answer.marks, answer.dropped
        if not dropped and not marks:
            self._send(self._accept_up_to + packets[-1][0].to_bytes(4, byteorder))
            return
        pack, accept, header = self._pack_marked, self._accept, self._mark_header
        drop, mark_of = frozenset(dropped), marks.get
        self._send(
            b"".join(
                [
                    pack(accept, packet_id, header, mark.to_bytes(4))
                    if (mark := mark_of(packet_id)) is not None and packet_id not in drop
                    else self._plain_verdict(packet_id, is_dropped=packet_id in drop)
                    for packet_id, _arrival, _payload in packets
                ]
            )
        )

    def _plain_verdict(self, packet_id: int, *, is_dropped: bool) -> bytes:
        return nfqueue.verdict(
            self.queue_socket.queue,
            socket.ntohl(packet_id),
            nfqueue.NF_DROP if is_dropped else nfqueue.NF_ACCEPT,
        )


class NetfilterqueueReader:
    """The netfilterqueue package as a reader.

    The package reads and parses in C and calls back once a packet; what it hands over waits here until
    its batch has been decided. It binds the queue before it sets the copy mode, so that a packet which
    arrives between these two calls is lost to its sender's retransmission.
    """

    def __init__(self, queue: int) -> None:
        try:
            from netfilterqueue import NetfilterQueue
        except ImportError:
            raise HostError(
                "the netfilterqueue package is not installed;"
                " pip install 'nfqproxy[netfilterqueue]', or use --reader netlink"
            ) from None
        self.overruns = 0
        self.verdict_errors = 0
        self._waiting: list[tuple[QueuedPacket, Any]] = []
        self._batch: list[Any] = []
        self._queue = NetfilterQueue()
        try:
            self._queue.bind(queue, self._take, max_len=0, range=COPY_RANGE, sock_len=4 << 20)
        except OSError:
            raise NfqproxyError(
                f"queue {queue} cannot be bound: it is taken (see {QUEUE_TABLE}; choose another"
                " number with --queue), or this is not root"
            ) from None
        handle = socket.socket(fileno=os.dup(self._queue.get_fd()))
        self.queue_socket = QueueSocket(handle, queue)
        self.queue_socket.set_flags(nfqueue.NFQA_CFG_F_FAIL_OPEN | nfqueue.NFQA_CFG_F_GSO)

    @property
    def holds_packets(self) -> bool:
        """See QueueReader: the package takes everything off the socket at once."""
        return bool(self._waiting)

    def fileno(self) -> int:
        """See QueueReader."""
        return self.queue_socket.handle.fileno()

    def arrived_by(self, arrival: int) -> int:
        """See QueueReader: the package tells the index itself."""
        return arrival

    def _take(self, packet: Any) -> None:
        # get_payload copies; the packet object is needed only for its verdict.
        self._waiting.append(((packet.id, packet.indev, packet.get_payload()), packet))

    def read(self) -> list[QueuedPacket]:
        """See QueueReader."""
        if not self._waiting:
            self._queue.run(block=False)
        taken = self._waiting[:BATCH]
        del self._waiting[:BATCH]
        self._batch = [packet for _, packet in taken]
        return [queued for queued, _ in taken]

    def marks(self) -> dict[int, int]:
        """See QueueReader."""
        return {packet.id: mark for packet in self._batch if (mark := packet.mark)}

    def answer(self, packets: Sequence[QueuedPacket], answer: Answer) -> None:
        """See QueueReader."""
        drop = frozenset(answer.dropped)
        for (packet_id, _arrival, _payload), packet in zip(packets, self._batch, strict=True):
            if packet_id in drop:
                packet.drop()
                continue
            if packet_id in answer.marks:
                packet.set_mark(answer.marks[packet_id])
            packet.accept()
        self._batch = []


READERS: dict[str, Callable[[int], QueueReader]] = {
    "netlink": NetlinkReader,
    "netfilterqueue": NetfilterqueueReader,
}


def open_reader(name: str, queue: int) -> QueueReader:
    """A reader bound to ``queue``; InputError for an unknown name."""
    try:
        kind = READERS[name]
    except KeyError:
        raise InputError(f"unknown reader {name!r}; known are: {', '.join(READERS)}") from None
    return kind(queue)
