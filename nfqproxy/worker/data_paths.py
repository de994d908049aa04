"""What becomes of decisions: conntrack entries made by ctnetlink, or marks on the packets.

Both are told a batch and give the answer to its packets; which one a worker uses is configured. Nothing
else of the worker knows the difference.
"""

import errno
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence

from nfqproxy.core import existing
from nfqproxy.core.dataplane import Dataplane, QueuedPacket
from nfqproxy.errors import CodecError, KernelError
from nfqproxy.model import MarkMask
from nfqproxy.wire import ctnetlink, nlmsg, packet
from nfqproxy.worker.conntrack import ConntrackSocket
from nfqproxy.worker.readers import Answer, QueueReader


class DataPath(ABC):
    """Decides batches by a dataplane and carries the decisions out."""

    def __init__(self, dataplane: Dataplane, conntrack: ConntrackSocket) -> None:
        self._dataplane = dataplane
        self._conntrack = conntrack
        self.installed = 0
        """Connections translated by what this worker did."""
        self.events: Counter[str] = Counter()
        """Everything out of the ordinary, by name."""

    @property
    def needs_time(self) -> bool:
        """True when ``handle`` must be told the time."""
        return self._dataplane.has_affinity

    @abstractmethod
    def handle(self, packets: Sequence[QueuedPacket], now_s: float, answer: Answer) -> None:
        """Decide one batch; when it returns, the packets may be answered as ``answer`` says."""

    def _judge(self, wanted: ctnetlink.Tuple, found: ctnetlink.Entry) -> existing.Judgement:
        """What the entry means for a packet that wants a new connection; counted."""
        judgement = existing.judge(
            found,
            backend_lives=self._dataplane.has_backend(
                wanted.dst + wanted.dst_port.to_bytes(2),
                wanted.protocol,
                found.reply.src,
                found.reply.src_port,
            ),
        )
        self.events[judgement.name.lower()] += 1
        return judgement


class CtnetlinkPath(DataPath):
    """Makes conntrack entries; all packets are accepted as they came, and find them."""

    def handle(self, packets: Sequence[QueuedPacket], now_s: float, answer: Answer) -> None:
        """See DataPath."""
        entries, answer.dropped = self._dataplane.assemble(packets, now_s)
        if entries:
            failures = self._conntrack.create(entries)
            self.installed += len(entries) - len(failures)
            for sequence, code in failures:
                self._mend(entries[sequence - 1], code)

    def _mend(self, entry: bytes, code: int) -> None:
        """Handle a CT_NEW that failed."""
        if code != errno.EEXIST:
            name = errno.errorcode.get(code, str(code))
            self.events[f"error_{name}"] += 1
            return
        try:
            self._mend_existing(entry)
        except (KernelError, CodecError, OSError):
            self.events["mend_errors"] += 1

    def _mend_existing(self, entry: bytes) -> None:
        message = next(iter(nlmsg.messages(entry)))
        wanted = ctnetlink.parse_entry(message.payload).original
        found = self._conntrack.find(wanted)
        if found is None:
            # The reply tuple clashed, or the entry has just expired: one more try tells.
            self._settle(self._conntrack.create([entry]), "vanished")
            return
        if self._judge(wanted, found).replaces:
            code = self._conntrack.replace(found, entry)
            if code:
                self.events[f"replace_{errno.errorcode.get(code, str(code))}"] += 1
            else:
                self.installed += 1

    def _settle(self, failures: Sequence[tuple[int, int]], name: str) -> None:
        self.events[f"{name}_failed" if failures else name] += 1
        if not failures:
            self.installed += 1


class MarkPath(DataPath):
    """Marks packets, which carry an entry of their own already; a nat rule translates by the mark.

    A packet whose entry is confirmed comes too late for that: the rules have said so by the mark's keep
    bit. Such an entry is looked at, and deleted where the connection could never come about by it. Its
    packet is dropped then, and the next one of the flow, for TCP the next retransmission, is new.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        conntrack: ConntrackSocket,
        *,
        mask: MarkMask,
        reader: QueueReader,
    ) -> None:
        super().__init__(dataplane, conntrack)
        self._mask = mask
        self._reader = reader

    @property
    def needs_time(self) -> bool:
        """See DataPath: the memory of flows goes by it."""
        return True

    def handle(self, packets: Sequence[QueuedPacket], now_s: float, answer: Answer) -> None:
        """See DataPath."""
        marks, answer.dropped = self._dataplane.mark(packets, now_s)
        before = self._reader.marks()
        if before:
            late = [each for each, mark in before.items() if mark & self._mask.keep]
            if late:
                self._handle_late(packets, late, marks, answer)
            others = ~self._mask.mask
            for packet_id in before.keys() & marks.keys():
                marks[packet_id] |= before[packet_id] & others
            for packet_id in late:
                marks[packet_id] = before[packet_id] & others
            self.installed -= len(late)
        self.installed += len(marks)
        answer.marks = marks

    def _handle_late(
        self,
        packets: Sequence[QueuedPacket],
        late: Collection[int],
        marks: dict[int, int],
        answer: Answer,
    ) -> None:
        payloads = {packet_id: payload for packet_id, _arrival, payload in packets}
        for packet_id in late:
            if marks.pop(packet_id, None) is None:
                continue  # nothing was decided for it, so its entry is none of our business
            try:
                if self._ends_entry(payloads[packet_id]):
                    answer.dropped.append(packet_id)
            except (KernelError, CodecError, OSError):
                self.events["mend_errors"] += 1

    def _ends_entry(self, payload: bytes) -> bool:
        """Delete the entry of a late packet if it must make way; False when it stays."""
        headers = packet.parse(payload)
        wanted = ctnetlink.Tuple(
            src=headers.src,
            dst=headers.dst,
            protocol=headers.protocol,
            src_port=headers.src_port,
            dst_port=headers.dst_port,
        )
        found = self._conntrack.find(wanted)
        if found is None or not self._judge(wanted, found).replaces:
            return False
        self._conntrack.delete(found)
        return True
