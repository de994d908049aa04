"""What was decided for a flow a moment ago, so that packets of one flow get one answer.

On the data path ``mark`` a flow's packets are queued until conntrack has confirmed its entry. Two
datagrams sent together, or a SYN and its retransmission, may both be undecided: the second must get the
backend of the first, whatever has become of weights and endpoints in between. Each worker remembers for itself:
``--queue-balance`` goes by addresses, and where packets of a flow meet two workers all the same, because the range
of queues has changed or one worker has died, both draw alike (draws.py).

Bounded in time and size by two generations: what was decided since the last turn, and in the period
before.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Decision = TypeVar("Decision")

LIFE_S = 8.0
"""A decision is remembered for at least this long, unless the flows are too many, and at most twice as
long."""
MAX_FLOWS = 16384
"""Flows of one generation; a batch may exceed it."""

FLOW_BYTES = {6: 8, 17: 4, 132: 12}
"""Protocol -> bytes from the transport header on that tell a flow, beside its two addresses.

The ports; for TCP the initial sequence number as well (RFC 9293 section 3.1), and for SCTP verification
tag and checksum (RFC 9260 section 3): equal in a retransmission, and another in a new connection that
uses a client port again. No two protocols have the same number of bytes.
"""


class FlowMemory(Generic[Decision]):
    """Flow -> decision. The packet path writes ``recent`` itself: a call per packet would show."""

    __slots__ = ("_older", "_since_s", "recent")

    def __init__(self) -> None:
        self.recent: dict[bytes, Decision] = {}
        self._older: dict[bytes, Decision] = {}
        self._since_s = 0.0

    def turn(self, now_s: float) -> Callable[[bytes], Decision | None]:
        """Forget what is old; to be called before each batch. Returns the look-up of older decisions."""
        age_s = now_s - self._since_s
        if age_s >= LIFE_S or len(self.recent) >= MAX_FLOWS:
            # After two periods without a batch what was recent is too old as well.
            self._older = self.recent if age_s < 2 * LIFE_S else {}
            self.recent = {}
            self._since_s = now_s
        return self._older.get

    def clear(self) -> None:
        """Forget everything."""
        self.recent = {}
        self._older = {}

    def __len__(self) -> int:
        return len(self.recent) + len(self._older)
