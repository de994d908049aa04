"""Makes workers and kernel follow the service table, in an order that never turns a live Service away.

A new frontend becomes known to the workers and the fallback before its address enters the set that
sends packets to the queue; a removed one leaves that set first. Changes that alter no plan do nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from nfqproxy.api import channel
from nfqproxy.core.marks import FrontendMarks
from nfqproxy.model import FrontendKey, FrontendPlan, NodeContext
from nfqproxy.supervisor.affinity_store import AffinityStore
from nfqproxy.supervisor.worker_process import WorkerProcess

log = logging.getLogger(__name__)

_APPLY_TIMEOUT_S = 10.0
_PART = 250
"""Plans in one message of a snapshot."""


class KernelState(Protocol):
    """What the supervisor needs of the kernel's sets and fallback maps; calls may block."""

    def restore(self) -> None:
        """Put the rules back if they are gone, and let the next ``sync`` replace everything."""
        ...

    def sync(
        self,
        plans: Mapping[FrontendKey, FrontendPlan],
        node: NodeContext,
        altered: Collection[FrontendKey] | None,
    ) -> object:
        """Make sets and maps follow ``plans`` and ``node`` by difference.

        ``altered``: the only keys whose plans can have altered since the last call; None: any.
        """
        ...


class Marks(Protocol):
    """What the supervisor needs of marks for backends (data path ``mark``); calls may block."""

    def give(self, plans: Iterable[FrontendPlan]) -> tuple[FrontendMarks, ...]:
        """Make the kernel know a mark for each backend of ``plans``; returns what workers may use."""
        ...

    def leave(self, keys: Iterable[FrontendKey]) -> None:
        """These frontends have gone."""
        ...

    def free(self) -> bool:
        """No worker uses marks of gone backends any more; True when that made some free."""
        ...

    def lacking(self) -> tuple[FrontendKey, ...]:
        """Frontends with more backends than marks."""
        ...


class Supervisor:
    """Holds the newest plans and hands them on. One ``publish`` at a time."""

    def __init__(
        self, kernel: KernelState, affinities: AffinityStore, marks: Marks | None = None
    ) -> None:
        self._kernel = kernel
        self._affinities = affinities
        self._marks = marks
        self._are_marks_given = False
        # What workers may use: the kernel knows it.
        self._known_marks: dict[FrontendKey, FrontendMarks] = {}
        self._plans: Mapping[FrontendKey, FrontendPlan] = {}
        self._node = NodeContext(node_name="")
        self._kernel_follows = False
        self._lock = asyncio.Lock()
        self.keepers: list[asyncio.Task[None]] = []
        """Tasks that keep the workers alive; one that ends has failed for good."""
        self.workers: list[WorkerProcess] = []
        self.revision = 0
        """Newest revision told to the workers."""
        self.served_revision = 0
        """Newest revision that workers and kernel both follow."""

    @property
    def plans(self) -> Mapping[FrontendKey, FrontendPlan]:
        """The present plans."""
        return self._plans

    def snapshot(self) -> Iterator[channel.Plans]:
        """The present plans as a whole, in parts, for a worker that starts."""
        plans = tuple(self._plans.values())
        for start in range(0, len(plans), _PART):
            yield channel.Plans(
                revision=self.revision,
                is_whole=start == 0,
                is_last=False,
                pod_detector=self._node.pod_detector,
                upserts=plans[start : start + _PART],
            )
        yield channel.Plans(
            revision=self.revision,
            is_whole=not plans,
            pod_detector=self._node.pod_detector,
            marks=tuple(self._known_marks.values()),
            affinities=self._affinities.records(),
        )

    def _take_affinities(self, teller: WorkerProcess, message: channel.Affinities) -> None:
        """Keep what one worker recorded and tell the others."""
        self._affinities.add(message.records, time.clock_gettime(time.CLOCK_BOOTTIME))
        for worker in self.workers:
            if worker is not teller:
                worker.send(message)

    async def publish(
        self,
        plans: Mapping[FrontendKey, FrontendPlan],
        node: NodeContext,
        *,
        altered: Collection[FrontendKey] | None = None,
        anew: bool = False,
    ) -> bool:
        """Make workers and kernel follow ``plans`` and ``node``; False when nothing differs.

        A change of the node alone, such as another podCIDR, is one: what tells pods from other clients
        goes to the workers, and the kernel has it and the service networks in sets.

        ``plans`` must not change any more. ``altered``: the only keys whose plans can differ from those
        of the last call that succeeded. ``anew``: whatever the kernel holds, put everything there again.
        After an error the kernel may hold a part of the change; the next call replaces all of it.
        """
        async with self._lock:
            if anew:
                self._kernel_follows = False
                self._are_marks_given = False
                await asyncio.to_thread(self._kernel.restore)
            old = self._plans
            if not self._kernel_follows:
                altered = None
            keys = {**old, **plans} if altered is None else altered
            upserts = tuple(
                plan
                for key in keys
                if (plan := plans.get(key)) is not None and old.get(key) != plan
            )
            removes = tuple(key for key in keys if key in old and key not in plans)
            is_other_node = node != self._node
            if self._kernel_follows and not upserts and not removes and not is_other_node:
                return False
            self._kernel_follows = False
            marks = await self._give_marks(upserts if self._are_marks_given else plans.values())
            # Workers first for what is new; they keep what goes until the sets let it go.
            self._plans = {**old, **{plan.key: plan for plan in upserts}}
            self._node = node
            if upserts or marks or is_other_node:
                await self._tell_workers(upserts=upserts, marks=marks)
            await asyncio.to_thread(self._kernel.sync, plans, node, altered)
            self._kernel_follows = True
            self._plans = plans
            if removes:
                await self._tell_workers(removes=removes)
            await self._free_marks(removes)
            self.served_revision = self.revision
            return True

    async def _give_marks(self, plans: Iterable[FrontendPlan]) -> tuple[FrontendMarks, ...]:
        """Marks for these frontends' backends, to be told to the workers: the kernel knows them."""
        if self._marks is None:
            return ()
        self._are_marks_given = False
        given = await asyncio.to_thread(self._marks.give, plans)
        self._are_marks_given = True
        self._known_marks.update((each.key, each) for each in given)
        return given

    async def _free_marks(self, removes: Iterable[FrontendKey]) -> None:
        """Let marks of what has gone go, unless a worker may still use them: then with a later change."""
        if self._marks is None:
            return
        for key in removes:
            self._known_marks.pop(key, None)
        self._marks.leave(removes)
        if not all(worker.follows(self.revision) for worker in self.workers):
            return
        if await asyncio.to_thread(self._marks.free):
            # Backends without a mark may have one now.
            lacking = [self._plans[key] for key in self._marks.lacking()]
            if lacking:
                await self._tell_workers(marks=await self._give_marks(lacking))

    async def _tell_workers(
        self,
        *,
        upserts: Sequence[FrontendPlan] = (),
        removes: Sequence[FrontendKey] = (),
        marks: Sequence[FrontendMarks] = (),
    ) -> None:
        self.revision += 1
        message = channel.Plans(
            revision=self.revision,
            is_whole=False,
            pod_detector=self._node.pod_detector,
            upserts=tuple(upserts),
            removes=tuple(removes),
            marks=tuple(marks),
        )
        # A worker that is just starting has been sent the snapshot before this one; it is not waited for.
        ready = [worker for worker in self.workers if worker.is_ready]
        for worker in self.workers:
            worker.send(message)
        for worker in ready:
            if not worker.is_ready:
                continue
            is_told = await worker.wait_applied(self.revision, _APPLY_TIMEOUT_S)
            # One that has ended meanwhile is not slow: its successor starts with everything.
            if not is_told and worker.is_ready:
                log.warning("worker %s is slow to take revision %d", worker.pid, self.revision)

    async def launch_workers(self, configures: Sequence[channel.Configure]) -> None:
        """Start the process of one worker per Configure, without waiting for any."""
        for configure in configures:
            worker = WorkerProcess(configure, self.snapshot, self._take_affinities)
            self.workers.append(worker)
            await worker.launch()

    async def bind_workers(self) -> None:
        """Wait until the launched workers have bound their queues; raises what keeps one from that."""
        for worker in self.workers:
            await worker.bind()

    def feed_workers(self, plans: Mapping[FrontendKey, FrontendPlan], node: NodeContext) -> None:
        """Let the bound workers decide by ``plans`` on ``node``, and keep them alive from now on.

        The kernel learns of the plans by the ``publish`` that has to follow.
        """
        self._plans = plans
        self._node = node
        self.revision = 1
        for worker in self.workers:
            worker.feed()
            self.keepers.append(
                asyncio.create_task(
                    worker.keep_alive(), name=f"worker-{worker.queue_number}-keeper"
                )
            )

    async def wait_ready(self) -> None:
        """Wait until the workers decide by what was published; one that is slow is left to its keeper."""
        for worker in self.workers:
            if not await worker.wait_applied(self.revision, _APPLY_TIMEOUT_S):
                log.warning("worker %s is slow to start", worker.pid)

    async def stop_workers(self) -> None:
        """Stop all workers; each leaves its queue without losing a packet."""
        for keeper in self.keepers:
            keeper.cancel()
        await asyncio.gather(*self.keepers, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    def status(self, queue_statistics: Callable[[], Mapping[int, Any]]) -> dict[str, Any]:
        """State for the admin socket."""
        queues = queue_statistics()
        return {
            "revision": self.served_revision,
            "frontends": len(self._plans),
            "affinity_records": len(self._affinities),
            "services": len({(plan.namespace, plan.service) for plan in self._plans.values()}),
            "workers": [_worker_status(worker, queues) for worker in self.workers],
        }


def _worker_status(worker: WorkerProcess, queues: Mapping[int, Any]) -> dict[str, Any]:
    stats = worker.stats
    status: dict[str, Any] = {
        "pid": worker.pid,
        "queue": worker.queue_number,
        "reader": worker.reader,
        "ready": worker.is_ready,
        "revision": worker.applied_revision,
        "restarts": worker.restarts,
        "last_error": worker.last_error,
        "packets": stats.packets if stats else 0,
        "batches": stats.batches if stats else 0,
        "installed": stats.installed if stats else 0,
        "cpu_s": stats.cpu_s if stats else 0.0,
        "counters": dict(stats.counters) if stats else {},
    }
    queue = queues.get(worker.queue_number)
    if queue is not None:
        status["waiting"] = queue.waiting
        status["queue_dropped"] = queue.queue_dropped
        status["user_dropped"] = queue.user_dropped
    return status
