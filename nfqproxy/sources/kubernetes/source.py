"""The Kubernetes source: the informers of one node proxy, as one stream of changes.

Services and EndpointSlices that no other proxy claims, this Node, ServiceCIDRs. What changes while nobody
takes it is merged: the taker gets the newest version of each object, once.
"""

import asyncio
import gc
import logging
import random
from collections.abc import AsyncGenerator

from nfqproxy.control.objects import (
    EndpointSlice,
    KubernetesObject,
    Node,
    ObjectChange,
    ObjectKey,
    Objects,
    Service,
    ServiceCidr,
    object_key,
)
from nfqproxy.sources.decode import KINDS
from nfqproxy.sources.fields import Context
from nfqproxy.sources.kubernetes import decoding
from nfqproxy.sources.kubernetes.client import Access, ApiServer, TimeOuts
from nfqproxy.sources.kubernetes.decoding import Identity
from nfqproxy.sources.kubernetes.events import Event, Recorder, Subject
from nfqproxy.sources.kubernetes.reflector import Pace, Reflector, Resource

log = logging.getLogger(__name__)

ORIGIN = "API server"
"""What messages call the place that objects come from."""

_CLAIMED = {"labelSelector": decoding.SELECTOR}


def resources(node_name: str, *, all_nodes: bool) -> tuple[Resource, ...]:
    """What the proxy of this node lists and watches."""
    return (
        Resource(
            kind="Service", paths=("/api/v1/services",), plural="services", selectors=_CLAIMED
        ),
        Resource(
            kind="EndpointSlice",
            paths=("/apis/discovery.k8s.io/v1/endpointslices",),
            plural="endpointslices",
            selectors=_CLAIMED,
        ),
        Resource(
            kind="Node",
            paths=("/api/v1/nodes",),
            plural="nodes",
            selectors={} if all_nodes else {"fieldSelector": f"metadata.name={node_name}"},
        ),
        Resource(
            kind="ServiceCIDR",
            paths=(
                "/apis/networking.k8s.io/v1/servicecidrs",
                "/apis/networking.k8s.io/v1beta1/servicecidrs",
            ),
            plural="servicecidrs",
            is_optional=True,
        ),
    )


class KubernetesSource:
    """The objects of a cluster, as far as the proxy of one node needs them.

    :meth:`start` first, then iterate over :meth:`changes`; :meth:`close` at the end. An API server that is
    away or refuses raises nothing: it is logged once, asked again and again, and told in
    :attr:`last_error`; what was known last serves for as long as it takes.
    """

    def __init__(
        self,
        access: Access,
        *,
        node_name: str,
        all_nodes: bool = False,
        time_outs: TimeOuts | None = None,
        pace: Pace | None = None,
        seed: int | None = None,
    ) -> None:
        self._access = access
        self._node_name = node_name
        self._server = ApiServer(access, time_outs or TimeOuts())
        self._recorder = Recorder(self._server, node_name)
        chance = random.Random(seed)
        context = Context(ORIGIN, strict=True, once=set())
        self._reflectors = [
            Reflector(
                resource,
                self._server,
                self,
                pace=pace or Pace(),
                chance=random.Random(chance.random()),
                context=context,
            )
            for resource in resources(node_name, all_nodes=all_nodes)
        ]
        self._unsynced = {resource.kind for resource in resources(node_name, all_nodes=all_nodes)}
        self._is_synced = asyncio.Event()
        # Key -> its newest version, None: gone. In the order of the first change.
        self._changed: dict[ObjectKey, KubernetesObject | None] = {}
        self._has_changed = asyncio.Event()
        self._troubles: dict[str, str] = {}
        self._faults: dict[tuple[str, str, str], tuple[str, ...]] = {}
        # Of Services that this node may have to warn of later: kubectl describe goes by it.
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def last_error(self) -> str | None:
        """What is wrong with the server or with objects now; None: nothing."""
        problems = [*dict.fromkeys(self._troubles.values())]
        problems += [fault for faults in self._faults.values() for fault in faults]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return problems[0] + more if problems else None

    async def start(self) -> Objects:
        """All objects, once every informer has them; raises InputError for a bad configuration."""
        await self._server.open()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(reflector.run(), name="reflector") for reflector in self._reflectors
        ]
        self._tasks.append(loop.create_task(self._recorder.run(), name="events"))
        await self._until(self._is_synced)
        values = [value for value in self._taken() if value is not None]
        if not any(isinstance(v, Node) and v.name == self._node_name for v in values):
            log.warning(
                "%s: there is no Node %s; give this node's name with --node-name",
                ORIGIN,
                self._node_name,
            )
        return Objects(
            services=tuple(v for v in values if isinstance(v, Service)),
            endpoint_slices=tuple(v for v in values if isinstance(v, EndpointSlice)),
            nodes=tuple(v for v in values if isinstance(v, Node)),
            service_cidrs=tuple(v for v in values if isinstance(v, ServiceCidr)),
        )

    async def reload(self) -> ObjectChange:
        """Read credentials and list everything anew; what that alters comes from :meth:`changes`."""
        self._server.forget_credentials()
        for reflector in self._reflectors:
            reflector.relist()
        return ObjectChange()

    async def changes(self, stop: asyncio.Event) -> AsyncGenerator[ObjectChange, None]:
        """Every change, merged with what came meanwhile, until ``stop`` is set."""
        while not stop.is_set():
            await self._until(self._has_changed, stop)
            if not self._changed:
                continue
            changed = self._changed.copy()
            self._taken()
            yield ObjectChange(
                upserts=tuple(value for value in changed.values() if value is not None),
                removes=tuple(key for key, value in changed.items() if value is None),
            )

    async def close(self) -> None:
        """End all requests."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()

    def warn(self, namespace: str, service: str, reason: str, message: str) -> None:
        """Have an Event about a Service written."""
        subject = self._subjects.get((namespace, service)) or Subject(
            api_version="v1", kind="Service", namespace=namespace, name=service
        )
        self._recorder.warn(Event(subject=subject, reason=reason, message=message))

    def _taken(self) -> list[KubernetesObject | None]:
        values = list(self._changed.values())
        self._changed.clear()
        self._has_changed.clear()
        return values

    async def _until(self, *events: asyncio.Event) -> None:
        """Wait for any of these; raises what ended one of the tasks, which end by nothing else."""
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            done, _ = await asyncio.wait(
                [*waits, *self._tasks], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done.intersection(self._tasks):
                task.result()
        finally:
            for wait in waits:
                wait.cancel()

    # What the reflectors tell.
    def changed(self, upserts: list[KubernetesObject], removes: list[ObjectKey]) -> None:
        """See :class:`reflector.Sink`."""
        for value in upserts:
            self._changed[object_key(value)] = value
        for key in removes:
            self._changed[key] = None
            if key[0] is Service:
                self._subjects.pop(key[1:], None)
        self._has_changed.set()

    def identified(self, resource: Resource, identity: Identity, value: KubernetesObject) -> None:
        """See :class:`reflector.Sink`."""
        if isinstance(value, Service) and value.health_check_node_port:
            self._subjects[value.namespace, value.name] = _subject(resource, identity)

    def synced(self, resource: Resource) -> None:
        """See :class:`reflector.Sink`."""
        self._unsynced.discard(resource.kind)
        if not self._unsynced:
            self._is_synced.set()

    def trouble(self, resource: Resource, problem: str | None) -> None:
        """See :class:`reflector.Sink`."""
        if problem is None:
            if self._troubles.pop(resource.kind, None) and not self._troubles:
                log.info("%s: all is followed again", ORIGIN)
            return
        is_new = problem not in self._troubles.values()
        self._troubles[resource.kind] = problem
        if is_new:
            serves = (
                "nothing is programmed before all is known"
                if self._unsynced
                else "what was known last serves"
            )
            log.error("%s; %s; trying again", problem, serves)
        if self._unsynced:
            # The program starts without the collector, and this may go on for days.
            gc.collect()

    def faulty(self, resource: Resource, identity: Identity, faults: tuple[str, ...]) -> None:
        """See :class:`reflector.Sink`."""
        place = f"{identity.namespace}/{identity.name}" if identity.namespace else identity.name
        label = f"{resource.kind} {place}"
        key = (resource.kind, identity.namespace, identity.name)
        before = self._faults.pop(key, ())
        if faults:
            self._faults[key] = tuple(f"{ORIGIN}: {label}: {fault}" for fault in faults)
        elif before:
            log.info("%s: %s: good again, or gone", ORIGIN, label)
        for fault, told in zip(faults, self._faults.get(key, ()), strict=True):
            if told in before:
                continue
            log.error("%s", told)
            if identity.name:
                reason = "InvalidAnnotation" if "metadata.annotations" in fault else "InvalidObject"
                self._recorder.warn(
                    Event(subject=_subject(resource, identity), reason=reason, message=fault)
                )


def _subject(resource: Resource, identity: Identity) -> Subject:
    group, version = KINDS[resource.kind]
    return Subject(
        api_version=f"{group}/{version}".lstrip("/"),
        kind=resource.kind,
        namespace=identity.namespace,
        name=identity.name,
        uid=identity.uid,
        version=identity.version,
    )
