"""The traffic of ``nfqproxy lab`` against a standing lab, and what comes of it.

Order: spread over TCP, over TCP with IPv6, over UDP; connect latency over three paths in turn; then a
second load in the middle of which every worker is killed. Each figure comes from outside the proxy:
answers name their backend, queued packets are the queue rule's own counter, undecided connections
those of a chain that an installed entry passes by (Lab._compare_rules).
"""

import os
import platform
import re
import time
from collections.abc import Callable
from typing import Protocol

from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.counters import rule_counters
from nfqproxy.lab.chi_square import chi_square
from nfqproxy.lab.jobs import (
    DnsJob,
    HeldJob,
    LatencyJob,
    Progress,
    Report,
    Target,
    TargetReport,
    TcpJob,
)
from nfqproxy.lab.load_process import LoadProcess, run_load
from nfqproxy.lab.manifest import backend_name
from nfqproxy.lab.result import (
    BackendShare,
    KillResult,
    LabResult,
    LatencyResult,
    SpreadResult,
    checks,
)
from nfqproxy.lab.retransmits import syn_retransmits
from nfqproxy.lab.standing import DNS, PLAIN, WEB, WEB6, Lab
from nfqproxy.model import Family
from nfqproxy.model import Protocol as ProtocolNumber

__all__ = ["Watcher", "run_scenario"]

LATENCY_ROUNDS = 1000
KILL_TCP_RATE = 500.0
KILL_DNS_RATE = 200.0
KILL_LOAD_S = 4.0
KILL_AFTER_S = 1.0
HELD_CONNECTIONS = 8
_KILL_TIMEOUT_S = 10.0
"""More than two SYN retransmits (1 s, 3 s): a lost packet shows as a slow connect, not as failed."""


class Watcher(Protocol):
    """Is shown how far the run is."""

    def phase(self, title: str, total: int) -> Callable[[Progress], None]:
        """A phase begins; call the result with its progress."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


def run_scenario(
    lab: Lab, watcher: Watcher, *, connections: int, queries: int, seed: int
) -> LabResult:
    """Send all traffic, return what was seen. Raises NfqproxyError when a part cannot run."""
    web = TcpJob(targets=(WEB,), connections=connections)
    web6 = TcpJob(targets=(WEB6,), connections=max(1, connections // 3))
    dns = DnsJob(targets=(DNS,), queries=queries, seed=seed, first_port=lab.take_ports(queries))
    spreads, clients = [], set()
    for name, protocol, job, title, total in (
        ("TCP", "tcp", web, "TCP connections", web.connections),
        ("TCP over IPv6", "tcp", web6, "TCP connections, IPv6", web6.connections),
        ("UDP", "udp", dns, "DNS queries", dns.queries),
    ):
        progress = watcher.phase(f"{total:,} {title}", total)
        before, sent_before = _queued(lab), syn_retransmits(lab.client)
        report = run_load(lab.client, job, progress)
        queued = _queued(lab)[job.targets[0]] - before[job.targets[0]]
        sent_again = syn_retransmits(lab.client) - sent_before
        spreads.append(_spread(lab, name, protocol, job.targets[0], report, queued, sent_again))
        clients |= set(report.targets[0].clients)
    latencies = _latencies(lab, watcher, seed)
    kill = _kill(lab, watcher, seed)
    own = {lab.topology.client.address4, lab.topology.client.address6}
    source_kept = bool(clients) and clients <= own
    return LabResult(
        lab=lab.state.name,
        kernel=platform.release(),
        cpus=len(os.sched_getaffinity(0)),
        reader=lab.state.reader,
        workers=lab.state.workers,
        data_path=lab.state.data_path,
        weights=lab.state.weights,
        seed=seed,
        source_kept=source_kept,
        spreads=tuple(spreads),
        latencies=latencies,
        kill=kill,
        conntrack=_conntrack(lab),
        worker_counters=_worker_counters(lab),
        checks=checks(spreads, latencies, kill, source_kept=source_kept),
    )


# ------------------------------------------------------------------------------------- counters

_PLACES = {
    WEB: (Family.IPV4, ProtocolNumber.TCP),
    WEB6: (Family.IPV6, ProtocolNumber.TCP),
    DNS: (Family.IPV4, ProtocolNumber.UDP),
}


def _queued(lab: Lab) -> dict[Target, int]:
    """Packets that the raw table's queue rules have sent to userspace, by target."""
    counters = lab.node.call(rule_counters)
    return {target: counters.get(place, 0) for target, place in _PLACES.items()}


def _undecided(lab: Lab, protocol: str) -> int:
    """First packets of connections for which no worker had installed an entry."""
    listing = lab.node.run(
        "nft", "list", "counter", "ip", "lab-observer", f"undecided-{protocol}"
    ).stdout
    found = re.search(r"packets (\d+)", listing)
    if found is None:
        raise NfqproxyError(f"nft lists the lab's counter in an unknown way: {listing.strip()}")
    return int(found[1])


def _worker_counters(lab: Lab) -> dict[str, int]:
    total: dict[str, int] = {}
    for worker in lab.status()["workers"]:
        for name, count in worker.get("counters", {}).items():
            total[name] = total.get(name, 0) + count
    return total


def _conntrack(lab: Lab) -> tuple[str, ...]:
    lines: list[str] = []
    for protocol, target, count in (("tcp", WEB, 3), ("udp", DNS, 2)):
        listed = lab.node.run(
            "conntrack", "-L", "-p", protocol, "--orig-dst", target.address
        ).stdout.splitlines()
        # One per backend says more than the first few.
        seen: set[str] = set()
        for line in listed:
            backend = line.split("src=")[2].split()[0] if line.count("src=") > 1 else ""
            if backend not in seen and len(seen) < count:
                seen.add(backend)
                lines.append(" ".join(line.split()))
    return tuple(lines)


# --------------------------------------------------------------------------------------- phases


def _spread(
    lab: Lab,
    name: str,
    protocol: str,
    target: Target,
    report: Report,
    queued: int,
    sent_again: int,
) -> SpreadResult:
    part = report.targets[0]
    weights = lab.state.weights
    answers = [part.backends.get(backend_name(i), 0) for i in range(len(weights))]
    total = sum(answers)
    if total == 0:
        raise NfqproxyError(
            f"{name}: none of {part.attempts} connections to {target.address} port {target.port}"
            f" was answered ({part.errors}); see {lab.proxy_log}"
        )
    flows = part.attempts if protocol == "tcp" else part.flows
    host = f"[{target.address}]" if ":" in target.address else target.address
    return SpreadResult(
        name=name,
        frontend=f"{host}:{target.port}/{protocol}",
        attempts=part.attempts,
        failed=part.failed,
        errors=part.errors,
        retries=part.retries,
        flows=flows,
        backends=tuple(
            BackendShare(
                backend=backend_name(i),
                weight=weight,
                answers=answers[i],
                share=answers[i] / total,
                expected_share=weight / sum(weights),
            )
            for i, weight in enumerate(weights)
        ),
        chi_square=chi_square(answers, weights),
        queued=queued,
        sent_again=sent_again,
        per_flow=queued / flows,
        elapsed_s=report.elapsed_s,
    )


def _latencies(lab: Lab, watcher: Watcher, seed: int) -> tuple[LatencyResult, ...]:
    paths = ((lab.direct, "direct"), (PLAIN, "plain DNAT"), (WEB, "nfqproxy"))
    job = LatencyJob(
        targets=tuple(Target(name, to.address, to.port) for to, name in paths),
        rounds=LATENCY_ROUNDS,
        seed=seed,
    )
    total = (job.rounds + job.warm_up) * len(paths)
    progress = watcher.phase(f"{len(paths)} x {LATENCY_ROUNDS:,} connects, three paths", total)
    report = run_load(lab.client, job, progress)
    return tuple(
        LatencyResult(
            path=name,
            address=f"{to.address}:{to.port}",
            failed=report.target(name).failed,
            connect_us=report.target(name).connect_us,
        )
        for to, name in paths
    )


def _kill(lab: Lab, watcher: Watcher, seed: int) -> KillResult:
    tcp_job = TcpJob(
        targets=(WEB,),
        connections=int(KILL_TCP_RATE * KILL_LOAD_S),
        rate=KILL_TCP_RATE,
        concurrency=256,
        timeout_s=_KILL_TIMEOUT_S,
    )
    queries = int(KILL_DNS_RATE * KILL_LOAD_S)
    dns_job = DnsJob(
        targets=(DNS,),
        queries=queries,
        rate=KILL_DNS_RATE,
        concurrency=64,
        seed=seed + 1,
        first_port=lab.take_ports(queries),
    )
    held_job = HeldJob(
        targets=(WEB,),
        connections=HELD_CONNECTIONS,
        duration_s=KILL_LOAD_S,
        timeout_s=_KILL_TIMEOUT_S,
    )
    before = _undecided(lab, "tcp"), _undecided(lab, "udp")
    progress = watcher.phase(f"{tcp_job.connections:,} more, worker killed", tcp_job.connections)
    held = LoadProcess(lab.client, held_job)
    dns = LoadProcess(lab.client, dns_job)
    tcp = LoadProcess(lab.client, tcp_job)
    killer = _Killer(lab, watcher)

    def on_progress(so_far: Progress) -> None:
        progress(so_far)
        killer.look()

    tcp_report = tcp.wait(on_progress)
    dns_report, held_report = dns.wait(), held.wait()
    recovered = bool(killer.killed) and lab.has_new_workers(killer.killed)
    return KillResult(
        killed=killer.killed,
        after_s=killer.after_s,
        recovered=recovered,
        fallback_s=killer.fallback_s,
        tcp=_only(tcp_report),
        dns=_only(dns_report),
        held=_only(held_report),
        fallback_tcp=_undecided(lab, "tcp") - before[0],
        fallback_udp=_undecided(lab, "udp") - before[1],
    )


def _only(report: Report) -> TargetReport:
    return report.targets[0]


class _Killer:
    """Kills all workers once the load has run for a while, then watches who decides."""

    def __init__(self, lab: Lab, watcher: Watcher) -> None:
        self._lab = lab
        self._watcher = watcher
        self._begin: float | None = None
        self._killed_at = 0.0
        self._undecided = 0
        self.killed: tuple[int, ...] = ()
        self.after_s = 0.0
        self.fallback_s = 0.0

    def look(self) -> None:
        """Called with every progress of the load, some twenty times a second."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
        if not self.killed:
            if now - self._begin >= KILL_AFTER_S:
                self._kill(now - self._begin)
            return
        undecided = _undecided(self._lab, "tcp")
        if undecided != self._undecided:
            self._undecided = undecided
            self.fallback_s = round(now - self._killed_at, 2)

    def _kill(self, after_s: float) -> None:
        self._undecided = _undecided(self._lab, "tcp")
        self.killed = self._lab.kill_workers()
        self._killed_at = time.monotonic()
        self.after_s = round(after_s, 2)
        self._watcher.note(f"SIGKILL to worker {', '.join(map(str, self.killed))} in mid-traffic")
