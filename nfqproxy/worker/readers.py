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
from nfqproxy.worker.queue_messages import SLOT_BYTES, QueueMessages, arrived_by

BATCH = 256
"""Packets taken off the queue before they are decided together."""
COPY_RANGE = 128
"""Bytes of each packet that the kernel hands over: headers with IPv6 extension headers fit."""


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
    """

    def __init__(self, queue: int) -> None:
        self.queue_socket = QueueSocket.bind(queue, COPY_RANGE)
        self.overruns = 0
        self.verdict_errors = 0
        self._receiver = BatchReceiver(self.fileno(), slots=BATCH, slot_bytes=SLOT_BYTES)
        self._messages = QueueMessages(self._receiver)
        self._send = self.queue_socket.handle.send
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
        return arrived_by(arrival)

    def read(self) -> Sequence[QueuedPacket]:
        """See QueueReader."""
        try:
            count = self._receiver.receive()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            # The socket's error is cleared by having been told; what waits is still there.
            count = self._receiver.receive()
        if not count:
            return ()
        packets, others = self._messages.packets(count)
        for data in others:
            self._count_errors(data)
        return packets

    def marks(self) -> dict[int, int]:
        """See QueueReader."""
        return self._messages.marks()

    def _count_errors(self, data: bytes) -> None:
        for message in nlmsg.messages(data):
            if message.type == nlmsg.NLMSG_ERROR and nlmsg.ack(message).errno:
                self.verdict_errors += 1

    def answer(self, packets: Sequence[QueuedPacket], answer: Answer) -> None:
        """See QueueReader."""
        marks, dropped = answer.marks, answer.dropped
        if not dropped and not marks:
            last_id = self._messages.last_id(packets)
            self._send(self._accept_up_to + last_id.to_bytes(4, byteorder))
            return
        pack, accept, header = self._pack_marked, self._accept, self._mark_header
        if not dropped and len(marks) == len(packets):
            # The packets themselves need not be looked at.
            self._send(
                b"".join(
                    [
                        pack(accept, packet_id, header, mark.to_bytes(4))
                        for packet_id, mark in marks.items()
                    ]
                )
            )
            return
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
