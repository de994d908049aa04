"""A table that follows a test API server by the Kubernetes source, as the proxy's does."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nfqproxy.control.cluster import ClusterState
from nfqproxy.control.objects import ObjectChange, Objects
from nfqproxy.model import ServicePort, ServicePortName
from nfqproxy.sources.decode import KINDS, decode
from nfqproxy.sources.fields import Context
from nfqproxy.sources.kubernetes.client import Access, TimeOuts
from nfqproxy.sources.kubernetes.reflector import Pace
from nfqproxy.sources.kubernetes.source import ORIGIN, KubernetesSource
from nfqproxy.testing import ApiServer, write_kubeconfig
from nfqproxy.testing.resources import RESOURCES

NODE = "n1"
QUICK = Pace(
    page=3,
    watch_s=(1.0, 3.0),
    short_watch_s=0.1,
    first_delay_s=0.01,
    longest_delay_s=0.05,
    absent_s=0.1,
)
"""Small lists and short pauses, so that a test sees in a second what takes a cluster hours."""
HASTY = TimeOuts(connect_s=2.0, answer_s=2.0, watch_s=1.0, refresh_s=60.0, plugin_s=10.0)


def run(work: Any) -> Any:
    """``asyncio.run`` that does not hang."""

    async def limited() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


async def until(condition: Callable[[], object], what: str, *, timeout_s: float = 20.0) -> None:
    """Poll until it is true; AssertionError that says ``what`` when it never is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it never became true that {what}"
        await asyncio.sleep(0.003)


class Follower:
    """Use :func:`following`."""

    def __init__(self, source: KubernetesSource, always: Iterable[ServicePortName] = ()) -> None:
        self.source = source
        self.cluster = ClusterState(NODE)
        self.first = Objects()
        """What was there at the start."""
        self.missed: list[str] = []
        """What of ``always`` was missing from the table, each time that it was."""
        self.changes = 0
        self._always = tuple(always)

    async def start(self) -> None:
        self.first = await self.source.start()
        self.cluster.replace(self.first)
        self._look()

    async def follow(self) -> None:
        async for change in self.source.changes(asyncio.Event()):
            self.cluster.apply(change)
            self.changes += 1
            self._look()

    def _look(self) -> None:
        ports = self.cluster.ports
        self.missed += [
            str(name) for name in self._always if name not in ports or not ports[name].endpoints
        ]

    @property
    def services(self) -> set[str]:
        """Names of the Services in the table."""
        return {name.service for name in self.cluster.ports}


@asynccontextmanager
async def following(
    server: ApiServer,
    directory: Path,
    *,
    always: Iterable[ServicePortName] = (),
    pace: Pace = QUICK,
    time_outs: TimeOuts = HASTY,
    all_nodes: bool = False,
) -> AsyncIterator[Follower]:
    """Starts after the first sync; nothing is left at the end."""
    kubeconfig = directory / "kubeconfig"
    if not kubeconfig.exists():
        write_kubeconfig(kubeconfig, server)
    source = KubernetesSource(
        Access(kubeconfig=str(kubeconfig)),
        node_name=NODE,
        all_nodes=all_nodes,
        pace=pace,
        time_outs=time_outs,
        seed=1,
    )
    follower = Follower(source, always)
    task = None
    try:
        await follower.start()
        task = asyncio.create_task(follower.follow())
        yield follower
        if task.done():
            task.result()
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await source.close()


def held(server: ApiServer) -> Mapping[ServicePortName, ServicePort]:
    """The table of what a server holds now, read as the file source reads it."""
    values = []
    for resource in RESOURCES:
        for version in server.store.all(resource) if resource.kind in KINDS else ():
            document: dict[str, object] = {
                "kind": resource.kind,
                "apiVersion": resource.api_version,
                **version.parsed(),
            }
            values.append(decode(document, Context(ORIGIN, strict=False, once=set())))
    table = ClusterState(NODE)
    table.apply(ObjectChange(upserts=tuple(value for value in values if value is not None)))
    return table.ports
