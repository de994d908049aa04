"""Keeps connection tracking in step with the service table, beside the packet path.

A *sweep* lists the UDP and SCTP entries of the families that Services have, judges them
(``core.reconcile``), deletes the stale ones by their ids, and takes the deleted UDP flows out of the set of
known flows, in this order: a datagram that comes between the two finds its flow known, is translated by
the fallback, and the member that it writes goes with the rest. The other way round a datagram could be
accepted into the old entry and keep its member alive.

Sweeps run in a thread, one at a time: after the first publish, after each that changed what UDP or SCTP
entries may say, and every ``PERIOD_S`` for what slipped through (an entry made from an old snapshot while
a new one was on its way). Without such service ports nothing is listed.
"""

import asyncio
import contextlib
import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any

from msgspec import Struct

from nfqproxy.core import reconcile
from nfqproxy.errors import KernelError, NfqproxyError
from nfqproxy.kernel.conntrack_table import ConntrackTable
from nfqproxy.kernel.kernel_table import FlowMember
from nfqproxy.kernel.routes import Routes
from nfqproxy.model import NodeContext, Protocol, ServicePort
from nfqproxy.wire import ctnetlink

__all__ = ["PERIOD_S", "Reconciler", "SweepReport"]

log = logging.getLogger(__name__)

PERIOD_S = 60.0
"""Seconds between sweeps when nothing changes."""
MIN_GAP_S = 1.0
"""Seconds between two sweeps, however fast endpoints change (kube-proxy's minSyncPeriod)."""
MAX_SHARE = 0.1
"""Part of the time that sweeps may take: on a large table changes are gathered for longer."""
MAX_LISTED = 1000
"""Entries that a report's document names; the counts are always whole."""

ForgetFlows = Callable[[Iterable[FlowMember]], None]
"""Takes flows out of the kernel's set of known ones; may block."""


class SweepReport(Struct, frozen=True, kw_only=True):
    """One sweep."""

    dry_run: bool
    """Nothing was deleted."""
    examined: int
    """Entries of the protocols in question that were listed."""
    stale: tuple[reconcile.Stale, ...]
    """What had to go, in the order of the dump."""
    deleted: tuple[reconcile.Stale, ...] = ()
    vanished: int = 0
    """Stale entries that ended by themselves meanwhile."""
    failed: tuple[tuple[reconcile.Stale, int], ...] = ()
    """Stale entries that the kernel kept, with the errno."""
    duration_s: float

    def document(self) -> dict[str, Any]:
        """The report for people and programs."""
        return {
            "dry_run": self.dry_run,
            "examined": self.examined,
            "stale": _by_reason(self.stale),
            "deleted": _by_reason(self.deleted),
            "vanished": self.vanished,
            "failed": len(self.failed),
            "duration_s": round(self.duration_s, 6),
            "entries": [_entry_document(stale) for stale in self.stale[:MAX_LISTED]],
            "entries_left_off": max(0, len(self.stale) - MAX_LISTED),
        }


class Reconciler:
    """See the module. ``follow`` and ``run`` belong to one event loop, ``sweep`` to any thread."""

    def __init__(self, forget_flows: ForgetFlows) -> None:
        self._forget_flows = forget_flows
        self._expected: reconcile.Expectation | None = None
        self._wanted = asyncio.Event()
        self._lock = asyncio.Lock()
        self._sweeps = 0
        self._failures = 0
        self._deleted: Counter[reconcile.Reason] = Counter()
        self._last: SweepReport | None = None
        self._last_error: str | None = None

    def follow(self, ports: Iterable[ServicePort], node: NodeContext) -> None:
        """Take these service ports, which workers and kernel follow by now, as all there are."""
        expected = reconcile.expectation(ports, node)
        if expected != self._expected:
            self._expected = expected
            self._wanted.set()

    async def run(self) -> None:
        """Sweep when it is due, until cancelled. A sweep that fails is logged and made again later."""
        while True:
            # Not wait_for: that of Python 3.11 forgets a cancellation that comes with the event, and
            # whoever then awaits the end of this waits for ever (cpython issue 86296).
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await self._wanted.wait()
            pause = MIN_GAP_S
            try:
                report = await self.reconcile(dry_run=False)
                pause = max(pause, report.duration_s / MAX_SHARE)
            except (NfqproxyError, OSError) as error:
                log.error(
                    "reconciling connection tracking: %s; trying again in %g s", error, PERIOD_S
                )
            await asyncio.sleep(pause)

    async def reconcile(self, *, dry_run: bool) -> SweepReport:
        """One sweep in a thread, after the one that runs; counted unless it is a ``dry_run``."""
        async with self._lock:
            if not dry_run:
                # Before the sweep reads what is expected: a change from here on asks for another one.
                self._wanted.clear()
            try:
                report = await asyncio.to_thread(self.sweep, dry_run=dry_run)
            except (NfqproxyError, OSError) as error:
                self._failures += 1
                self._last_error = str(error)
                raise
            if not dry_run:
                self._count(report)
        return report

    def sweep(self, *, dry_run: bool) -> SweepReport:
        """List, judge, delete, forget. Blocks. Raises NfqproxyError when the kernel refuses."""
        begin = time.monotonic()
        expected = self._expected
        examined = 0
        stale: list[reconcile.Stale] = []
        lookups = sorted(expected.lookups) if expected is not None else []
        if expected is None or not lookups:
            return SweepReport(dry_run=dry_run, examined=0, stale=(), duration_s=0.0)
        local = _local_addresses()
        with ConntrackTable() as table:
            for family, protocol in lookups:
                # One by one: a table may hold hundreds of thousands, few of them stale.
                for entry in table.entries(family, protocol):
                    examined += 1
                    found = reconcile.judge(entry, expected, local)
                    if found is not None:
                        stale.append(found)
            # A dump may tell an entry twice.
            by_entry = {(found.entry.original, found.entry.id): found for found in stale}
            if dry_run:
                return SweepReport(
                    dry_run=True,
                    examined=examined,
                    stale=tuple(by_entry.values()),
                    duration_s=time.monotonic() - begin,
                )
            result = table.delete(found.entry for found in by_entry.values())
        # Also those that ended by themselves: a member of theirs can only be in the way.
        self._forget(result.deleted + result.vanished)
        return SweepReport(
            dry_run=False,
            examined=examined,
            stale=tuple(by_entry.values()),
            deleted=tuple(by_entry[entry.original, entry.id] for entry in result.deleted),
            vanished=len(result.vanished),
            failed=tuple(
                (by_entry[entry.original, entry.id], code) for entry, code in result.failed
            ),
            duration_s=time.monotonic() - begin,
        )

    def _forget(self, entries: Iterable[ctnetlink.Entry]) -> None:
        members = [
            FlowMember(
                source=str(ip_address(entry.original.src)),
                source_port=entry.original.src_port,
                destination=str(ip_address(entry.original.dst)),
            )
            for entry in entries
            if entry.original.protocol == Protocol.UDP
        ]
        try:
            self._forget_flows(dict.fromkeys(members))
        except KernelError as error:
            # ENOENT: no rules on this node, so no set and nothing to forget.
            if error.errno != errno.ENOENT:
                raise

    def _count(self, report: SweepReport) -> None:
        self._sweeps += 1
        self._last = report
        self._last_error = None
        self._deleted.update(stale.reason for stale in report.deleted)
        if report.deleted:
            log.info(
                "connection tracking: deleted %d stale entries (%s)",
                len(report.deleted),
                ", ".join(f"{n} {reason}" for reason, n in _by_reason(report.deleted).items() if n),
            )
        if report.failed:
            found, code = report.failed[0]
            log.warning(
                "connection tracking: the kernel kept %d stale entries (%s of %s: %s)",
                len(report.failed),
                found.reason,
                found.name,
                errno.errorcode.get(code, str(code)),
            )

    def status(self) -> dict[str, Any]:
        """State for the admin socket."""
        last = self._last
        return {
            "sweeps": self._sweeps,
            "failed_sweeps": self._failures,
            "last_error": self._last_error,
            "deleted": {str(reason): self._deleted[reason] for reason in reconcile.Reason},
            "last_examined": last.examined if last else 0,
            "last_duration_s": round(last.duration_s, 6) if last else 0.0,
        }


def _local_addresses() -> frozenset[bytes]:
    routes = Routes()
    try:
        return frozenset(address.address for address in routes.addresses())
    finally:
        routes.close()


def _by_reason(stale: Iterable[reconcile.Stale]) -> dict[str, int]:
    counts = Counter(found.reason for found in stale)
    return {str(reason): counts[reason] for reason in reconcile.Reason}


def _entry_document(stale: reconcile.Stale) -> dict[str, Any]:
    original, reply = stale.entry.original, stale.entry.reply
    return {
        "namespace": stale.name.namespace,
        "service": stale.name.service,
        "port_name": stale.name.port_name,
        "protocol": Protocol(original.protocol).name.lower(),
        "client": _text(original.src, original.src_port),
        "frontend": _text(original.dst, original.dst_port),
        "backend": _text(reply.src, reply.src_port) if stale.entry.is_dnat else None,
        "reason": str(stale.reason),
    }


def _text(packed: bytes, port: int) -> str:
    address = ip_address(packed)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
