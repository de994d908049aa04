"""One worker's engine: batch in, entries made, failures mended, verdicts out.

Whatever happens in between, each packet gets exactly one verdict. When something goes wrong for a
packet it is accepted as it came, and what stands behind the queue decides for it.
"""

import errno
import logging
import time
from collections import Counter
from collections.abc import Sequence

from nfqproxy.core import existing
from nfqproxy.core.dataplane import Dataplane, QueuedPacket
from nfqproxy.errors import CodecError, KernelError
from nfqproxy.wire import ctnetlink, nlmsg
from nfqproxy.worker.conntrack import ConntrackSocket
from nfqproxy.worker.readers import QueueReader

log = logging.getLogger(__name__)

_ROUNDS = 16
"""Batches taken in one turn of the event loop, so that routes and plans get theirs under load."""


class Engine:
    """Ties a reader, a dataplane and a conntrack socket together."""

    def __init__(
        self, reader: QueueReader, dataplane: Dataplane, conntrack: ConntrackSocket
    ) -> None:
        self._reader = reader
        self._dataplane = dataplane
        self._conntrack = conntrack
        self.packets = 0
        self.batches = 0
        self.installed = 0
        self.events: Counter[str] = Counter()
        """Everything out of the ordinary, by name."""

    def run_ready(self) -> bool:
        """Handle what waits, at most some batches; True when the reader itself still holds packets,
        which the queue's socket will not tell of.
        """
        for _ in range(_ROUNDS):
            packets = self._reader.read()
            if not packets:
                return False
            self.handle(packets)
        return self._reader.holds_packets

    def handle(self, packets: Sequence[QueuedPacket]) -> None:
        """Decide, install and answer one batch."""
        self.packets += len(packets)
        self.batches += 1
        dropped: Sequence[int] = ()
        try:
            dataplane = self._dataplane
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME) if dataplane.has_affinity else 0.0
            entries, dropped = dataplane.assemble(packets, now_s)
            if entries:
                failures = self._conntrack.create(entries)
                self.installed += len(entries) - len(failures)
                for sequence, code in failures:
                    self._mend(entries[sequence - 1], code)
        except Exception:
            # Entries already made stand; the packets pass.
            self.events["batch_errors"] += 1
            if self.events["batch_errors"] == 1:
                log.exception("deciding a batch failed; its packets pass undecided")
        finally:
            self._reader.answer(packets, dropped)

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
        if judgement.replaces:
            code = self._conntrack.replace(found, entry)
            if code:
                self.events[f"replace_{errno.errorcode.get(code, str(code))}"] += 1
            else:
                self.installed += 1

    def _settle(self, failures: Sequence[tuple[int, int]], name: str) -> None:
        self.events[f"{name}_failed" if failures else name] += 1
        if not failures:
            self.installed += 1

    def counters(self) -> dict[str, int]:
        """Everything out of the ordinary, zero ones left out."""
        dataplane = self._dataplane
        counts = {
            **self.events,
            "unknown_frontend": dataplane.unknown,
            "unparsed": dataplane.unparsed,
            "failed_picks": dataplane.failed_picks,
            "no_route": dataplane.no_route,
            "source_range_dropped": dataplane.source_range_dropped,
            "no_local_endpoint_dropped": dataplane.no_local_endpoint_dropped,
            "queue_overruns": self._reader.overruns,
            "verdict_errors": self._reader.verdict_errors,
            "answer_overruns": self._conntrack.overruns,
        }
        return {name: count for name, count in counts.items() if count}
