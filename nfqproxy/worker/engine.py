"""One worker's engine: batch in, decided and carried out, verdicts out.

Whatever happens in between, each packet gets exactly one verdict. When something goes wrong for a
packet it is accepted as it came, and what stands behind the queue decides for it.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence

from nfqproxy.core.dataplane import Dataplane, QueuedPacket
from nfqproxy.worker.conntrack import ConntrackSocket
from nfqproxy.worker.data_paths import DataPath
from nfqproxy.worker.readers import BATCH, Answer, QueueReader

log = logging.getLogger(__name__)

_ROUNDS = 4
"""Batches taken in one turn of the event loop, so that routes and plans get theirs under load."""


class Engine:
    """Ties a reader and a data path together, and counts what they do."""

    def __init__(
        self,
        reader: QueueReader,
        dataplane: Dataplane,
        conntrack: ConntrackSocket,
        path: DataPath,
    ) -> None:
        self._reader = reader
        self._dataplane = dataplane
        self._conntrack = conntrack
        self._path = path
        self.packets = 0
        self.batches = 0
        self.events: Counter[str] = Counter()
        """Everything out of the ordinary, by name."""

    @property
    def installed(self) -> int:
        """Connections translated by what this worker did."""
        return self._path.installed

    def run_ready(self) -> bool:
        """Handle what waits, at most some batches; True when more may wait."""
        for _ in range(_ROUNDS):
            packets = self._reader.read()
            if not packets:
                return False
            self.handle(packets)
            if len(packets) < BATCH:
                # No more waited in the queue's socket; if more have come, the event loop tells.
                return self._reader.holds_packets
        return True

    def handle(self, packets: Sequence[QueuedPacket]) -> None:
        """Decide, carry out and answer one batch."""
        self.packets += len(packets)
        self.batches += 1
        answer = Answer()
        try:
            path = self._path
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME) if path.needs_time else 0.0
            path.handle(packets, now_s, answer)
        except Exception:
            # Entries already made stand; the packets pass.
            self.events["batch_errors"] += 1
            if self.events["batch_errors"] == 1:
                log.exception("deciding a batch failed; its packets pass undecided")
        finally:
            self._reader.answer(packets, answer)

    def counters(self) -> dict[str, int]:
        """Everything out of the ordinary, zero ones left out."""
        dataplane = self._dataplane
        counts = {
            **self.events,
            **self._path.events,
            "unknown_frontend": dataplane.unknown,
            "unparsed": dataplane.unparsed,
            "failed_picks": dataplane.failed_picks,
            "no_route": dataplane.no_route,
            "unmarked": dataplane.unmarked,
            "source_range_dropped": dataplane.source_range_dropped,
            "no_local_endpoint_dropped": dataplane.no_local_endpoint_dropped,
            "queue_overruns": self._reader.overruns,
            "verdict_errors": self._reader.verdict_errors,
            "answer_overruns": self._conntrack.overruns,
        }
        return {name: count for name, count in counts.items() if count}
