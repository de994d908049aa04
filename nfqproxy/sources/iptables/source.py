"""The iptables-save source: dumps in files, or the rules of this node, read once or followed."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from msgspec import Struct

from nfqproxy.control.objects import (
    KubernetesObject,
    ObjectChange,
    ObjectKey,
    Objects,
    Service,
    object_key,
)
from nfqproxy.errors import ManifestError, NfqproxyError
from nfqproxy.model import Family
from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.config import ProxyConfig
from nfqproxy.sources.decode import decode
from nfqproxy.sources.fields import Context
from nfqproxy.sources.file import RETRY_S, as_objects, difference
from nfqproxy.sources.iptables import manifests
from nfqproxy.sources.iptables.ports import FamilyPorts
from nfqproxy.sources.iptables.text import Dump, Loss, read
from nfqproxy.sources.watch import watch

logger = logging.getLogger(__name__)

LIVE = "live"
"""Stands for the rules of this node in place of a file's name."""

_TRIES = 5
"""How often the node's rules are read anew until two listings in turn are the same."""
_SHARE = 10
"""Reading the node's rules takes at most one part in so many of the time."""
_TOLD = 20
"""Losses that are logged one by one."""
_COUNTER = re.compile(r"\[\d+:\d+\]")

ReadLive: TypeAlias = Callable[[], Sequence[Dump]]
"""Reads the rules of this node; raises NfqproxyError."""


class Reading(Struct, frozen=True, kw_only=True):
    """What some dumps say."""

    documents: tuple[dict[str, Any], ...]
    """Manifests, all of which decode."""
    objects: tuple[KubernetesObject, ...]
    """The same, decoded."""
    configuration: dict[str, Any]
    """A configuration file by which nfqproxy does as the kube-proxy that wrote them."""
    losses: tuple[Loss, ...]
    """What they say beside, sorted by line."""


def interpret(
    dumps: Sequence[Dump], *, node_name: str, node_addresses: Sequence[str] = ()
) -> Reading:
    """The objects that these dumps of one node are made of; raises ManifestError for what is no dump."""
    tables, losses = read(dumps)
    found = [
        FamilyPorts(family, own, losses)
        for family in Family
        if (own := [table for table in tables if table.family is family])
    ]
    documents: list[dict[str, Any]] = []
    objects: list[KubernetesObject] = []
    if node_addresses:
        documents.append(manifests.node(node_name, node_addresses))
        objects += _decoded(documents, "the command line")
    for service in manifests.services(found, node_name=node_name, losses=losses):
        try:
            objects += _decoded(service.objects, service.origin)
        except ManifestError as error:
            where = f"Service {service.name} is left out: {error.object_name}: {error.field}"
            losses.append(Loss(service.origin, service.line, f"{where}: {error.problem}"))
        else:
            documents += service.objects
    return Reading(
        documents=tuple(documents),
        objects=tuple(objects),
        configuration=manifests.configuration(found),
        losses=tuple(sorted(set(losses))),
    )


def understood(reading: Reading) -> Reading:
    """The same; ManifestError where losses have left no Service."""
    if reading.losses and not any(isinstance(item, Service) for item in reading.objects):
        first = reading.losses[0]
        raise ManifestError(
            f"holds no Service that can be read (line {first.line}: {first.problem}; losses in all:"
            f" {len(reading.losses)}); give the rules of kube-proxy in iptables mode",
            file=first.origin,
        )
    return reading


def _decoded(documents: Iterable[dict[str, Any]], origin: str) -> list[KubernetesObject]:
    decoded = [decode(document, Context(origin)) for document in documents]
    return [item for item in decoded if item is not None]


def read_files(names: Sequence[str], read_live: ReadLive) -> list[Dump]:
    """The dumps of these files, ``live`` being the node's rules; raises ManifestError, NfqproxyError."""
    dumps: list[Dump] = []
    for name in names:
        if name == LIVE:
            dumps += read_live()
            continue
        dumps.append(dump(name, on_disk.read(Path(name), "iptables-save")))
    return dumps


def dump(origin: str, data: bytes) -> Dump:
    """A dump of these bytes; raises ManifestError."""
    try:
        return Dump(origin, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"is not UTF-8 text at byte {error.start + 1}; give what iptables-save prints",
            file=origin,
        ) from None


class LiveRules:
    """The node's rules, of no moment at which kube-proxy had written one table and not yet the other."""

    def __init__(self, read_live: ReadLive) -> None:
        self._read = read_live
        self._known = 0

    def __call__(self) -> Sequence[Dump]:
        """The rules now: as at the last call, or the same twice in turn; raises NfqproxyError."""
        found = self._read()
        known = self._known
        for _ in range(_TRIES):
            before, known = known, _digest(found)
            if before == known:
                break
            found = self._read()
        self._known = _digest(found)
        return found


def _digest(dumps: Iterable[Dump]) -> int:
    """What differs when rules do, and not by counters or dates."""
    lines = (line for dump in dumps for line in dump.text.split("\n"))
    return hash(tuple(_COUNTER.sub("", line) for line in lines if not line.startswith("#")))


class IptablesSaveSource:
    """The objects of some dumps of one node, now and after every change.

    Used as a :class:`~nfqproxy.sources.file.FileSource` is: :meth:`load` raises, :meth:`changes` keeps the
    last good objects and tells the fault in :attr:`last_error`. Files are followed as manifests are; the
    node's own rules are read every ``iptablesSaveIntervalSeconds``, less often where that would take long.
    """

    def __init__(self, config: ProxyConfig, read_live: ReadLive, *, node_name: str) -> None:
        self._config = config
        self._names = config.iptables_save
        self._paths = tuple(Path(name) for name in self._names if name != LIVE)
        self._read_live = LiveRules(read_live)
        self._node_name = node_name
        self._took_s = 0.0
        self._found: dict[ObjectKey, KubernetesObject] = {}
        self._digest: int | None = None
        self._losses: tuple[Loss, ...] = ()
        self._status: on_disk.Status | None = None
        self._lock = asyncio.Lock()
        self.last_error: str | None = None
        """What is wrong with the dumps as they are now; None: nothing."""

    @property
    def objects(self) -> Objects:
        """The last good state; made anew at every look."""
        return as_objects(self._found)

    def load(self) -> Objects:
        """Read the dumps now, for the start of the program; raises NfqproxyError."""
        self._status = on_disk.status(self._paths)
        self._take()
        self.last_error = None
        return self.objects

    async def start(self) -> Objects:
        """As :meth:`load`."""
        return self.load()

    def warn(self, namespace: str, service: str, reason: str, message: str) -> None:
        """See :class:`nfqproxy.sources.base.Source`; whoever reads dumps reads the log."""

    async def close(self) -> None:
        """See :class:`nfqproxy.sources.base.Source`; it holds nothing."""

    async def reload(self) -> ObjectChange:
        """Read the dumps again; what differs from the last good state. Nothing, if one is bad."""
        async with self._lock:
            try:
                change = await self._take_patiently()
            except NfqproxyError as error:
                if self.last_error != str(error):
                    self.last_error = str(error)
                    logger.error("%s; the last good state stays in force", error)
                return ObjectChange()
            if self.last_error is not None:
                self.last_error = None
                logger.info("%s: good again", ", ".join(self._names))
            return change

    async def changes(self, stop: asyncio.Event) -> AsyncGenerator[ObjectChange, None]:
        """Every change that alters the objects, until ``stop`` is set."""
        looks = self._looks(stop) if LIVE in self._names else self._writes(stop)
        async with contextlib.aclosing(looks) as each:
            async for _ in each:
                change = await self.reload()
                if change:
                    yield change

    async def _looks(self, stop: asyncio.Event) -> AsyncGenerator[None, None]:
        interval_s = self._config.iptables_save_interval_seconds
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(interval_s, _SHARE * self._took_s)):
                    await stop.wait()
                return
            yield

    async def _writes(self, stop: asyncio.Event) -> AsyncGenerator[None, None]:
        watcher = watch(self._paths, stop, since=self._status)
        async with contextlib.aclosing(watcher) as bursts:
            async for _ in bursts:
                yield

    async def _take_patiently(self) -> ObjectChange:
        begin_s = time.monotonic()
        try:
            try:
                return await asyncio.to_thread(self._take)
            except ManifestError:
                # A file may be half written, the node's rules be flushed for a moment.
                await asyncio.sleep(RETRY_S)
                return await asyncio.to_thread(self._take)
        finally:
            self._took_s = time.monotonic() - begin_s

    def _take(self) -> ObjectChange:
        dumps = read_files(self._names, self._read_live)
        digest = _digest(dumps)
        if digest == self._digest:
            return ObjectChange()
        reading = understood(interpret(dumps, node_name=self._node_name))
        if self._digest is None:
            self._compare(reading.configuration)
        found = {object_key(item): item for item in reading.objects}
        change = difference(self._found, found)
        self._found, self._digest = found, digest
        self._tell(reading.losses)
        return change

    def _compare(self, theirs: dict[str, Any]) -> None:
        """Log what kube-proxy goes by and this proxy is not told."""
        for field, flag, ours in (
            ("clusterCIDR", "--cluster-cidr", self._config.cluster_cidr),
            ("masqueradeAll", "--masquerade-all", self._config.masquerade_all),
        ):
            if theirs.get(field) and not ours:
                logger.warning(
                    "kube-proxy's rules go by %s %s, this proxy has none; give %s to decide as they do",
                    field,
                    theirs[field],
                    flag,
                )

    def _tell(self, losses: tuple[Loss, ...]) -> None:
        """Log what is new among the losses."""
        known = {(loss.origin, loss.problem) for loss in self._losses}
        new = [loss for loss in losses if (loss.origin, loss.problem) not in known]
        for loss in new[:_TOLD]:
            logger.warning("%s", loss)
        if len(new) > _TOLD:
            logger.warning("... and %d more; nfqproxy import names all", len(new) - _TOLD)
        self._losses = losses
