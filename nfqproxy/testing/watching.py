"""One watch: events as lines of JSON in a chunked answer, until its time is over or the server goes.

Sources: kubernetes.io/docs/reference/using-api/api-concepts ("Efficient detection of changes", "Watch
bookmarks", "Streaming lists"); k8s.io/apiserver pkg/endpoints/handlers/watch.go and
pkg/storage/cacher/cache_watcher.go (what a selector makes of a change).
"""

import asyncio
import math
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator

import msgspec
from aiohttp import web

from nfqproxy.testing.faults import Fault, Faults
from nfqproxy.testing.listing import ListOptions, lagging
from nfqproxy.testing.resources import Resource
from nfqproxy.testing.selectors import Selector
from nfqproxy.testing.settings import Settings
from nfqproxy.testing.status import ApiError, expired
from nfqproxy.testing.store import Change, CompactedError, Store

__all__ = ["Watch", "drop"]

_WRITE_BYTES = 1 << 20
"""Events are written together up to about this many bytes."""
_LAST_BOOKMARK_S = 2.0
"""So long before a watch ends it gets a last bookmark, seconds."""
_INITIAL_EVENTS_END = {"k8s.io/initial-events-end": "true"}


class _CutError(Exception):
    """The connection has been dropped in the middle of an event."""


class Watch:
    """Serves one request; made, then :meth:`run`."""

    def __init__(
        self,
        store: Store,
        resource: Resource,
        namespace: str,
        options: ListOptions,
        *,
        settings: Settings,
        faults: Faults,
        chance: random.Random,
    ) -> None:
        """``chance`` draws the length of a watch that names none. ApiError for a bad query."""
        self._store = store
        self._resource = resource
        self._options = options
        self._version = options.version
        self._selects: Selector | None = options.selector(resource, namespace)
        self._settings = settings
        self._faults = faults
        self._life_s = float(options.timeout_s) or settings.watch_timeout_s * (1 + chance.random())
        self._response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )

    async def run(
        self, request: web.BaseRequest, fresh: Callable[[int], Awaitable[None]]
    ) -> web.StreamResponse:
        """Answer; ``fresh`` waits for a version. ApiError before anything is sent, or nothing."""
        options, store = self._options, self._store
        is_initial = options.send_initial_events
        if is_initial is None:
            is_initial = self._version == 0
        if is_initial and self._version:
            await fresh(self._version)
        # Where the events begin: all that is there, or what comes after a version.
        position = self._version or store.revision
        if is_initial:
            position = store.revision
            if options.resource_version == "0":
                position = lagging(store, self._faults, self._resource, position)
        elif self._faults.hits(Fault.EXPIRE, self._resource.plural):
            return await self._refuse(request, _too_old(self._version, store))
        first = store.snapshot(self._resource, position) if is_initial else []
        if not is_initial and position < store.compacted:
            return await self._refuse(request, _too_old(position, store))
        wake = asyncio.Event()
        store.listeners.add(wake.set)
        try:
            await self._prepare(request)
            if self._selects is not None:
                first = [item for item in first if self._selects(item)]
            if first and self._faults.hits(Fault.SHUFFLE, self._resource.plural):
                first = self._faults.chance(Fault.SHUFFLE).sample(first, len(first))
            await self._send(_line("ADDED", item.whole(self._resource)) for item in first)
            if options.send_initial_events and options.bookmarks:
                await self._send([self._bookmark(position, _INITIAL_EVENTS_END)])
            await self._follow(position, wake)
            await self._response.write_eof()
        except _CutError:
            drop(request, self._faults.chance(Fault.CUT).random() < 0.5)
        finally:
            store.listeners.discard(wake.set)
        return self._response

    async def _follow(self, position: int, wake: asyncio.Event) -> None:
        """Send what changes after a revision, until the end of the watch."""
        loop = asyncio.get_running_loop()
        faults, plural = self._faults, self._resource.plural
        end = loop.time() + self._life_s
        bookmark_at = self._next_bookmark(loop.time(), end)
        while (now := loop.time()) < end:
            wake.clear()
            try:
                changes = self._store.since(self._resource, position)
            except CompactedError:
                # It has fallen too far behind.
                await self._send([_error(_too_old(position, self._store))])
                return
            seen = self._store.revision
            if lines := list(self._lines(changes)):
                if faults.hits(Fault.DELAY, plural):
                    await asyncio.sleep(faults.chance(Fault.DELAY).uniform(0, faults.delay_s))
                if faults.hits(Fault.EXPIRE, plural):
                    await self._send([_error(_too_old(position, self._store))])
                    return
                await self._send(lines)
                if faults.hits(Fault.END, plural):
                    return
            position = seen
            if now >= bookmark_at:
                await self._send([self._bookmark(position)])
                bookmark_at = self._next_bookmark(loop.time(), end)
            if self._store.revision == position:
                wait_s = max(0.0, min(end, bookmark_at) - loop.time())
                try:
                    async with asyncio.timeout(wait_s):
                        await wake.wait()
                except TimeoutError:
                    pass

    def _next_bookmark(self, now: float, end: float) -> float:
        if not self._options.bookmarks:
            return math.inf
        last = end - _LAST_BOOKMARK_S
        usual = now + self._settings.bookmark_s
        return min(usual, last) if last > now else usual

    def _lines(self, changes: Iterable[Change]) -> Iterator[bytes]:
        selects, resource = self._selects, self._resource
        for change in changes:
            before, after = change.before, change.after
            if selects is not None:
                before = before if before is not None and selects(before) else None
                after = after if after is not None and selects(after) else None
            if after is not None:
                yield _line("ADDED" if before is None else "MODIFIED", after.whole(resource))
            elif before is not None:
                # Gone, or no longer selected: the last state that was, with the version of the change.
                yield _line("DELETED", before.at(change.revision).whole(resource))

    def _bookmark(self, revision: int, annotations: dict[str, str] | None = None) -> bytes:
        metadata = {"resourceVersion": str(revision), "creationTimestamp": None}
        value = {
            "kind": self._resource.kind,
            "apiVersion": self._resource.api_version,
            "metadata": metadata | ({"annotations": annotations} if annotations else {}),
            **self._resource.empty,
        }
        return _line("BOOKMARK", msgspec.json.encode(value))

    async def _send(self, lines: Iterable[bytes]) -> None:
        pending: list[bytes] = []
        size = 0
        for line in lines:
            if self._faults.hits(Fault.CUT, self._resource.plural):
                kept = self._faults.chance(Fault.CUT).randrange(1, len(line) - 1)
                await self._response.write(b"".join([*pending, line[:kept]]))
                raise _CutError
            pending.append(line)
            size += len(line)
            if size >= _WRITE_BYTES:
                await self._response.write(b"".join(pending))
                pending, size = [], 0
        if pending:
            await self._response.write(b"".join(pending))

    async def _refuse(self, request: web.BaseRequest, error: ApiError) -> web.StreamResponse:
        if self._settings.expired_as_http:
            raise error
        await self._prepare(request)
        await self._response.write(_error(error))
        await self._response.write_eof()
        return self._response

    async def _prepare(self, request: web.BaseRequest) -> None:
        self._response.enable_chunked_encoding()
        await self._response.prepare(request)


def drop(request: web.BaseRequest, by_reset: bool) -> None:
    """End the connection of a request at once, in mid-answer: by FIN, or by RST."""
    transport = request.transport
    if transport is None:
        return
    if by_reset and (raw := transport.get_extra_info("socket")) is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _line(kind: str, body: bytes) -> bytes:
    return b'{"type":"' + kind.encode() + b'","object":' + body + b"}\n"


def _error(error: ApiError) -> bytes:
    return _line("ERROR", msgspec.json.encode(error.status))


def _too_old(revision: int, store: Store) -> ApiError:
    return expired(f"too old resource version: {revision} ({store.compacted})")
