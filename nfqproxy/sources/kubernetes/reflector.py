"""Keeps the objects of one kind up to date: list, then watch, for ever.

Theory of operation. A list is a whole state with a version; a watch from that version tells what changed
since, each change with its version; bookmarks tell a version without a change. A watch that ends, by the
server's time-out, a cut or silence, goes on from the last version seen. When the server no longer has
that version (410, as an answer or in the stream), the kind is listed anew. A new list never empties the
table: its objects are taken page by page as they come, and what it lacks goes only after its last page. Until
then, and while the server is away, what was known serves.

The first list may come from the server's cache (resourceVersion 0, as kube-proxy asks), any later one
is of the newest state, so time never runs backwards. A stream whose versions run backwards, which no
healthy server sends, is not believed: the kind is listed anew. So it is when a server that could not be reached
comes back with a version lower than ours: its storage was restored, and it would keep silent until it has
passed our version.

An object that cannot be read leaves the version of it that was read last in place.
"""

import asyncio
import random
from typing import Protocol

import msgspec

from nfqproxy.control.objects import KubernetesObject, ObjectKey, object_key
from nfqproxy.sources.fields import Context
from nfqproxy.sources.kubernetes import decoding
from nfqproxy.sources.kubernetes.client import ApiServer, ApiServerError, Status
from nfqproxy.sources.kubernetes.decoding import Bad, Identity

_AT_ONCE = 200
"""Objects that are read before others get their turn on the event loop: a few milliseconds."""
_WATCH_ATTEMPTS = 4
"""Refusals of a watch in a row, other than 410, after which the kind is listed anew."""


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """What to list and watch."""

    kind: str
    """Key of :data:`nfqproxy.sources.decode.READERS`."""
    paths: tuple[str, ...]
    """Where the server has it, the newest API version first."""
    plural: str
    """For messages."""
    selectors: dict[str, str] = {}
    is_optional: bool = False
    """A server that does not have it, or does not show it to us, has none."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how much is asked for; times in seconds."""

    page: int = 500
    """Objects in an answer to list."""
    watch_s: tuple[float, float] = (300.0, 600.0)
    """The server is asked to end a watch after a random time between these."""
    short_watch_s: float = 1.0
    """A watch that ends sooner and tells nothing counts as failed."""
    first_delay_s: float = 0.5
    """Before the second attempt after a failure; doubles with each further one."""
    longest_delay_s: float = 30.0
    absent_s: float = 600.0
    """After this the server is asked again for an optional resource that it did not have."""


class Sink(Protocol):
    """Whom the reflector tells."""

    def changed(self, upserts: list[KubernetesObject], removes: list[ObjectKey]) -> None:
        """Objects are new or differ, or are gone."""

    def identified(self, resource: Resource, identity: Identity, value: KubernetesObject) -> None:
        """Which object and version of it this is."""

    def synced(self, resource: Resource) -> None:
        """A list is complete: all there is has been told."""

    def trouble(self, resource: Resource, problem: str | None) -> None:
        """Why the server is not followed; None: it is followed again."""

    def faulty(self, resource: Resource, identity: Identity, faults: tuple[str, ...]) -> None:
        """What is wrong with an object now; empty: nothing any more, or it is gone."""


class _ListAnew(Exception):  # noqa: N818 - it is no error
    """What is known can no longer be followed by watch."""


class Reflector:
    """See the module. :meth:`run` never ends by itself."""

    def __init__(
        self,
        resource: Resource,
        server: ApiServer,
        sink: Sink,
        *,
        pace: Pace,
        chance: random.Random,
        context: Context,
    ) -> None:
        self._resource = resource
        self._server = server
        self._sink = sink
        self._pace = pace
        self._chance = chance
        self._context = context
        self._path = resource.paths[0]
        self._found: dict[tuple[str, str], KubernetesObject] = {}
        self._faulty: set[tuple[str, str]] = set()
        self._version: str | None = None
        """Where the watch goes on; None: list first."""
        self._is_first = True
        self._is_healthy = True
        self._was_away = False
        """It could not be reached, and may not be what it was."""
        self._failures = 0
        self._refusals = 0
        self._relist = asyncio.Event()

    def relist(self) -> None:
        """List anew at the next opportunity, which is now if a watch is on."""
        self._relist.set()

    async def run(self) -> None:
        """Follow the server until cancelled."""
        while True:
            try:
                if self._version is None or self._relist.is_set():
                    self._relist.clear()
                    await self._list()
                elif self._was_away:
                    await self._check_version(self._version)
                self._was_away = False
                await self._watch_until_relist()
                continue
            except _ListAnew:
                self._version = None
                if self._is_healthy:
                    # Once without a pause: what is known is out of date.
                    self._is_healthy = False
                    self._failures = 0
                    continue
                asked_s = 0.0
            except ApiServerError as error:
                asked_s = error.retry_after_s
                self._was_away |= error.is_unreached
                self._sink.trouble(self._resource, str(error))
            await self._pause(asked_s)

    async def _pause(self, asked_s: float) -> None:
        """Exponential back-off with jitter, at least what the server asks for."""
        if self._is_healthy:
            self._failures = 0
            self._is_healthy = False
        delay_s = min(
            self._pace.longest_delay_s, self._pace.first_delay_s * 2 ** min(self._failures, 20)
        )
        self._failures += 1
        delay_s *= self._chance.uniform(0.5, 1.0)
        await self._wait(self._relist, max(delay_s, min(asked_s, self._pace.longest_delay_s)))

    # --- list

    async def _list(self) -> None:
        """Take all objects; :attr:`_version` is that of the list afterwards."""
        self._version = None
        try:
            version = await self._pages()
        except ApiServerError as error:
            if not self._resource.is_optional or error.status not in (403, 404):
                raise
            await self._do_without(error)
            return
        self._version = version
        self._is_first = False
        self._sink.synced(self._resource)

    async def _do_without(self, error: ApiServerError) -> None:
        paths = self._resource.paths
        following = paths.index(self._path) + 1
        if error.status == 404 and following < len(paths):
            self._path = paths[following]
            await self._list()
            return
        self._path = paths[0]
        self._sink.trouble(self._resource, str(error) if error.status == 403 else None)
        # What was known stays: a server that is just starting says 404, too.
        self._sink.synced(self._resource)
        await self._wait(self._relist, self._pace.absent_s)

    async def _pages(self) -> str:
        query = {**self._resource.selectors, "limit": str(self._pace.page)}
        if self._is_first:
            query["resourceVersion"] = "0"
        listed: set[tuple[str, str]] = set()
        is_certain = True
        what = f"list {self._resource.plural}"
        while True:
            try:
                page = self._page(await self._server.get(self._path, query, what))
            except ApiServerError as error:
                if not error.is_gone or "continue" not in query:
                    raise
                # The list took longer than the server keeps its state: all of it in one answer.
                del query["continue"], query["limit"]
                listed.clear()
                continue
            items = page.items or []
            for start in range(0, len(items), _AT_ONCE):
                upserts: list[KubernetesObject] = []
                for item in items[start : start + _AT_ONCE]:
                    key = self._take(item, upserts)
                    listed.add(key)
                    is_certain &= bool(key[1])
                if upserts:
                    self._sink.changed(upserts, [])
                await asyncio.sleep(0)
            following = page.metadata.continue_
            if not following:
                break
            query.pop("resourceVersion", None)
            query["continue"] = following
        if is_certain:
            self._forget([key for key in self._found if key not in listed])
            for key in self._faulty - listed:
                self._tell_fault(Identity(*key, "", ""), ())
        return page.metadata.resource_version

    def _page(self, data: bytes) -> decoding.Page:
        try:
            page = decoding.page_decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise ApiServerError(
                f"the API server's list of {self._resource.plural} cannot be read: {error}"
            ) from None
        if not page.metadata.resource_version:
            raise ApiServerError(
                f"the API server's list of {self._resource.plural} has no resourceVersion"
            )
        return page

    async def _check_version(self, version: str) -> None:
        """Raise _ListAnew if the server is not as far as we are."""
        query = {**self._resource.selectors, "limit": "1"}
        what = f"list {self._resource.plural}"
        found = self._page(await self._server.get(self._path, query, what))
        if _is_before(found.metadata.resource_version, version):
            raise _ListAnew

    # --- watch

    async def _watch_until_relist(self) -> None:
        """One watch, cut short when somebody asks for a list."""
        if self._version is None:
            return  # an optional resource that is not there
        watch = asyncio.ensure_future(self._watch(self._version))
        relist = asyncio.ensure_future(self._relist.wait())
        try:
            await asyncio.wait({watch, relist}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            relist.cancel()
            watch.cancel()
            await asyncio.gather(relist, watch, return_exceptions=True)

    async def _watch(self, version: str) -> None:
        query = {
            **self._resource.selectors,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(round(self._chance.uniform(*self._pace.watch_s))),
        }
        loop = asyncio.get_running_loop()
        what = f"watch {self._resource.plural}"
        count = 0
        lasts = None
        try:
            async with self._server.watch(self._path, query, what) as lines:
                lasts = loop.call_later(self._pace.short_watch_s, self._follows)
                async for line in lines:
                    self._event(line)
                    count += 1
                    if count == 1:
                        self._follows()
                    if not count % _AT_ONCE:
                        await asyncio.sleep(0)
        except ApiServerError as error:
            if error.is_gone:
                raise _ListAnew from None
            if error.is_silence and lasts is not None:
                return  # whether it is still there, the next watch tells
            # A new list would be no help to a server that is away or has too much to do.
            self._refusals += error.status not in (0, 429, 503)
            if self._refusals >= _WATCH_ATTEMPTS:
                self._refusals = 0
                self._version = None
            raise
        finally:
            if lasts is not None:
                lasts.cancel()
        if not count and lasts.when() > loop.time():
            raise ApiServerError(
                f"the API server ends the watch of {self._resource.plural} at once"
            )

    def _follows(self) -> None:
        """The server is followed: what was wrong is over."""
        self._is_healthy = True
        self._refusals = 0
        self._sink.trouble(self._resource, None)

    def _event(self, line: bytes) -> None:
        """Take one line of a watch."""
        try:
            event = decoding.event_decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ApiServerError(
                f"the API server's watch of {self._resource.plural} cannot be read: {error}"
            ) from None
        if event.type == "ERROR":
            raise _status(event.object).error(f"go on with the watch of {self._resource.plural}")
        if event.type == "BOOKMARK":
            self._advance(decoding.identity(event.object).version)
        elif event.type == "DELETED":
            found = decoding.identity(event.object)
            self._advance(found.version)
            key = found.namespace, found.name
            self._forget([key])
            if key in self._faulty:
                self._tell_fault(found, ())
        elif event.type in ("ADDED", "MODIFIED"):
            upserts: list[KubernetesObject] = []
            self._advance(decoding.identity(event.object).version)
            self._take(event.object, upserts)
            if upserts:
                self._sink.changed(upserts, [])

    def _advance(self, version: str) -> None:
        """The stream has come to this version; raises _ListAnew where it runs backwards."""
        last = self._version
        if not version or last is None:
            return
        if _is_before(version, last):
            raise _ListAnew
        self._version = version

    # --- objects

    def _take(self, data: msgspec.Raw, upserts: list[KubernetesObject]) -> tuple[str, str]:
        """Read an object; adds it to ``upserts`` if it differs. Namespace and name of it."""
        try:
            decoded = decoding.decode(self._resource.kind, data, self._previous, self._context)
        except Bad as bad:
            key = bad.identity.namespace, bad.identity.name
            kept = (
                "the last good version stays in force" if key in self._found else "it is left out"
            )
            self._tell_fault(bad.identity, (f"{bad.error}; {kept}",))
            return key
        found = decoded.identity
        key = found.namespace, found.name
        if decoded.faults or key in self._faulty:
            self._tell_fault(found, tuple(f"{error}" for error in decoded.faults))
        if decoded.value is None:
            self._forget([key])
        elif self._found.get(key) != decoded.value:
            self._found[key] = decoded.value
            self._sink.identified(self._resource, found, decoded.value)
            upserts.append(decoded.value)
        return key

    def _previous(self, namespace: str, name: str) -> KubernetesObject | None:
        return self._found.get((namespace, name))

    def _forget(self, keys: list[tuple[str, str]]) -> None:
        removes = [object_key(value) for key in keys if (value := self._found.pop(key, None))]
        if removes:
            self._sink.changed([], removes)

    def _tell_fault(self, identity: Identity, faults: tuple[str, ...]) -> None:
        key = identity.namespace, identity.name
        if faults:
            self._faulty.add(key)
        else:
            self._faulty.discard(key)
        self._sink.faulty(self._resource, identity, faults)

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass


def _is_before(one: str, other: str) -> bool:
    """Of two resourceVersions; those that are no numbers cannot be told apart."""
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)


def _status(data: msgspec.Raw) -> Status:
    try:
        return msgspec.json.decode(data, type=Status)
    except msgspec.MsgspecError:
        return Status(message="of a kind that cannot be read")
