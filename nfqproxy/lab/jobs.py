"""What a load generator is asked to do, and what it reports: the messages on its stdin and stdout.

One job goes in as a JSON object; JSON lines come out: :class:`Progress` now and then,
:class:`Report` once, last. Times are microseconds unless the name says otherwise.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec
from msgspec import Struct

__all__ = [
    "DnsJob",
    "HeldJob",
    "Job",
    "LatencyJob",
    "Message",
    "Percentiles",
    "Progress",
    "Report",
    "Target",
    "TargetReport",
    "TcpJob",
    "percentiles",
]


class Target(Struct, frozen=True):
    """An address that is connected to."""

    name: str
    address: str
    port: int


class TcpJob(Struct, frozen=True, kw_only=True, tag_field="kind", tag="tcp"):
    """TCP connections, target after target in turn, many at a time."""

    targets: tuple[Target, ...]
    connections: int
    """All targets together."""
    concurrency: int = 16
    """Closed loop: this many at a time. Open loop: the most that may be under way."""
    rate: float = 0.0
    """Connections started per second (open loop); 0: as fast as the concurrency allows."""
    http: bool = True
    """Send GET / and read the backend's name; else close right after connect()."""
    reset: bool = False
    """Close by RST (SO_LINGER 0): leaves no TIME_WAIT at the client."""
    timeout_s: float = 5.0
    port_range: tuple[int, int] | None = None
    """Source ports to use, both included (IP_LOCAL_PORT_RANGE, Linux 6.3).

    The kernel ignores those outside the namespace's net.ipv4.ip_local_port_range.
    """


class LatencyJob(Struct, frozen=True, kw_only=True, tag_field="kind", tag="latency"):
    """connect() alone, one at a time, blocking, the targets interleaved in random order."""

    targets: tuple[Target, ...]
    rounds: int
    """Connections per target."""
    warm_up: int = 20
    """Connections per target that are made first and not reported in the percentiles."""
    seed: int = 0
    timeout_s: float = 5.0


class DnsJob(Struct, frozen=True, kw_only=True, tag_field="kind", tag="dns"):
    """TXT queries over UDP, each from a socket of its own.

    The kernel's own choice of source ports meets some twice (3,000 of 28,000: about 150), which is
    one flow to conntrack; ``first_port`` avoids that.
    """

    targets: tuple[Target, ...]
    queries: int
    concurrency: int = 16
    rate: float = 0.0
    name: str = "whoami.lab"
    timeout_s: float = 1.0
    """Wait for an answer this long, then send the same datagram again."""
    retries: int = 2
    seed: int = 0
    first_port: int = 0
    """Query k uses source port ``first_port + k``: every query a flow of its own. 0: any port."""


class HeldJob(Struct, frozen=True, kw_only=True, tag_field="kind", tag="held"):
    """Keep-alive HTTP connections that stay open and are used the whole time."""

    targets: tuple[Target, ...]
    connections: int
    duration_s: float
    interval_s: float = 0.05
    """Pause between two requests on one connection."""
    timeout_s: float = 5.0


Job = TcpJob | LatencyJob | DnsJob | HeldJob


class Percentiles(Struct, frozen=True, kw_only=True):
    """Nearest-rank percentiles, microseconds; all 0 when there was no sample."""

    samples: int
    p50: float
    p90: float
    p99: float
    max: float


class TargetReport(Struct, frozen=True, kw_only=True):
    """What happened at one target."""

    name: str
    attempts: int
    """Connections or queries begun, warm-up included."""
    ok: int
    failed: int
    flows: int
    """Different source ports among the attempts: for UDP, the number of flows."""
    retries: int = 0
    """DNS: datagrams sent again. Held: requests beyond the first of a connection."""
    errors: dict[str, int]
    """Failures by errno name, or TIMEOUT, EMPTY (closed without an answer), BAD."""
    backends: dict[str, int]
    """Answers by the backend's name."""
    clients: dict[str, int]
    """Answers by the source address the backend saw (HTTP only)."""
    connect_us: Percentiles
    """From the call of connect() (UDP: send()) to its success (UDP: the answer).

    With many under way at once this includes the generator's own queue; compare paths by a
    LatencyJob.
    """


class Progress(Struct, frozen=True, tag_field="type", tag="progress"):
    """So far."""

    done: int
    failed: int


class Report(Struct, frozen=True, kw_only=True, tag_field="type", tag="report"):
    """The end."""

    elapsed_s: float
    targets: tuple[TargetReport, ...]

    def target(self, name: str) -> TargetReport:
        """The part about one target."""
        return next(part for part in self.targets if part.name == name)


Message = Progress | Report


def percentiles(samples: Sequence[float]) -> Percentiles:
    """p50, p90, p99 by nearest rank: the smallest sample that at least that share do not exceed."""
    if not samples:
        return Percentiles(samples=0, p50=0.0, p90=0.0, p99=0.0, max=0.0)
    ordered = sorted(samples)
    count = len(ordered)

    def rank(percent: int) -> float:
        return round(ordered[max(0, -(-percent * count // 100) - 1)], 1)

    return Percentiles(
        samples=count, p50=rank(50), p90=rank(90), p99=rank(99), max=round(ordered[-1], 1)
    )


class Tally:
    """Counts of one target while the load runs."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.attempts = 0
        self.ok = 0
        self.failed = 0
        self.retries = 0
        self.ports: set[int] = set()
        self.errors: Counter[str] = Counter()
        self.backends: Counter[str] = Counter()
        self.clients: Counter[str] = Counter()
        self.connect_us: list[float] = []

    def fail(self, why: str) -> None:
        """Count one failure."""
        self.failed += 1
        self.errors[why] += 1

    def report(self) -> TargetReport:
        """The counts as a message."""
        return TargetReport(
            name=self.target.name,
            attempts=self.attempts,
            ok=self.ok,
            failed=self.failed,
            flows=len(self.ports),
            retries=self.retries,
            errors=dict(self.errors),
            backends=dict(sorted(self.backends.items())),
            clients=dict(sorted(self.clients.items())),
            connect_us=percentiles(self.connect_us),
        )


decode_job = msgspec.json.Decoder(Job).decode
decode_message = msgspec.json.Decoder(Message).decode
encode = msgspec.json.Encoder().encode
