"""What a run of the lab found, and the expectations it is held to."""

from collections.abc import Sequence

from msgspec import Struct

from nfqproxy.lab.chi_square import ChiSquare
from nfqproxy.lab.jobs import Percentiles, TargetReport

__all__ = [
    "MIN_P_VALUE",
    "BackendShare",
    "Check",
    "KillResult",
    "LabResult",
    "LatencyResult",
    "SpreadResult",
]

MIN_P_VALUE = 1e-4
"""A correct spread is called wrong once in ten thousand tests."""


class Check(Struct, frozen=True, kw_only=True):
    """One expectation."""

    name: str
    ok: bool
    detail: str


class BackendShare(Struct, frozen=True, kw_only=True):
    """One backend's part."""

    backend: str
    weight: int
    answers: int
    share: float
    """0..1."""
    expected_share: float


class SpreadResult(Struct, frozen=True, kw_only=True):
    """New connections (UDP: flows) of one frontend."""

    name: str
    frontend: str
    """``10.96.0.80:80/tcp``."""
    attempts: int
    failed: int
    errors: dict[str, int]
    retries: int
    flows: int
    backends: tuple[BackendShare, ...]
    chi_square: ChiSquare
    queued: int
    """Packets that the queue rule sent to userspace meanwhile."""
    sent_again: int
    """SYNs among them that the client sent again, say because an older connection's TIME_WAIT answered."""
    per_flow: float
    """Queued packets per connection (UDP: per flow); 1 is the aim."""
    elapsed_s: float


class LatencyResult(Struct, frozen=True, kw_only=True):
    """connect() over one path, measured in turn with the others."""

    path: str
    address: str
    failed: int
    connect_us: Percentiles


class KillResult(Struct, frozen=True, kw_only=True):
    """SIGKILL of the workers in mid-traffic."""

    killed: tuple[int, ...]
    """Process ids."""
    after_s: float
    """Since the load began."""
    recovered: bool
    """Whether other workers decide in the end."""
    fallback_s: float
    """From the kill to the last new connection that no worker decided; seen in steps of 0.05 s."""
    tcp: TargetReport
    dns: TargetReport
    held: TargetReport
    """Connections made before and used throughout; ``retries`` are their further requests."""
    fallback_tcp: int
    """New connections that no worker decided: the kernel's fallback did."""
    fallback_udp: int


class LabResult(Struct, frozen=True, kw_only=True):
    """One run."""

    lab: str
    kernel: str
    cpus: int
    reader: str
    workers: int
    data_path: str
    weights: tuple[int, ...]
    seed: int
    source_kept: bool
    """Whether the servers saw the client's own address and no other."""
    spreads: tuple[SpreadResult, ...]
    latencies: tuple[LatencyResult, ...]
    kill: KillResult
    conntrack: tuple[str, ...]
    """A few entries as ``conntrack -L`` shows them."""
    worker_counters: dict[str, int]
    """What the new workers count out of the ordinary."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every expectation holds."""
        return all(check.ok for check in self.checks)


def checks(
    spreads: Sequence[SpreadResult],
    latencies: Sequence[LatencyResult],
    kill: KillResult,
    *,
    source_kept: bool,
) -> tuple[Check, ...]:
    """The expectations, each with what was seen."""
    found = []
    for spread in spreads:
        again = f", SYNs sent again: {spread.sent_again}" if spread.sent_again else ""
        found += [
            Check(
                name=f"{spread.name}: every one answered",
                ok=spread.failed == 0,
                detail=f"{spread.failed} of {spread.attempts} failed {spread.errors or ''}".strip(),
            ),
            Check(
                name=f"{spread.name}: spread by weight",
                ok=spread.chi_square.p_value >= MIN_P_VALUE,
                detail=f"chi-square p {spread.chi_square.p_value:.3g}, at least {MIN_P_VALUE:g}",
            ),
            Check(
                name=f"{spread.name}: one packet in userspace for each",
                ok=spread.queued == spread.flows + spread.sent_again,
                detail=f"{spread.queued} packets for {spread.flows}{again}",
            ),
        ]
    failed = sum(latency.failed for latency in latencies)
    found.append(
        Check(name="latency: every connect succeeded", ok=failed == 0, detail=f"{failed} failed")
    )
    found.append(
        Check(
            name="servers saw the client's own address",
            ok=source_kept,
            detail="yes" if source_kept else "another source address was seen",
        )
    )
    for part, what in ((kill.tcp, "connections"), (kill.dns, "queries"), (kill.held, "held")):
        found.append(
            Check(
                name=f"worker killed: no failed {what}",
                ok=part.failed == 0,
                detail=f"{part.failed} of {part.attempts} failed {part.errors or ''}".strip(),
            )
        )
    found.append(
        Check(
            name="worker killed: a new one took over",
            ok=kill.recovered,
            detail="yes" if kill.recovered else "not within the run",
        )
    )
    return tuple(found)
