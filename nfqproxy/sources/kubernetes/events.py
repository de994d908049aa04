"""v1 Events: what is wrong with an object, told where its owner looks (``kubectl describe``).

As client-go's recorder does it: an Event that repeats is counted up, not written again; of many
that differ in nothing but their message one stands for the rest; and an object that causes too many is not
told about until some time has passed. Writing them is never waited for, and a server that does not take
one has only missed it.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from nfqproxy.sources.kubernetes.client import ApiServer, ApiServerError

log = logging.getLogger(__name__)

COMPONENT = "nfqproxy"

_REMEMBERED = 4096
"""Events of which it is known that they were written, client-go's maxLruCacheEntries."""
_WAITING = 256
"""Events that may wait for the server; further ones are dropped."""
_SIMILAR = 10
"""So many Events of one object and reason within _SIMILAR_S, then they are told as one."""
_SIMILAR_S = 600.0
_BURST = 25
"""Events of one object in a row; then one in _REFILL_S."""
_REFILL_S = 300.0


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The object that an Event is about (v1 ObjectReference)."""

    api_version: str
    kind: str
    namespace: str = ""
    name: str
    uid: str = ""
    version: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something to warn of."""

    subject: Subject
    reason: str
    """CamelCase, for machines."""
    message: str


class _Written(msgspec.Struct):
    namespace: str
    name: str
    count: int


class _Bucket(msgspec.Struct):
    tokens: float
    at_s: float


class _Similar(msgspec.Struct):
    messages: set[str]
    since_s: float


class Recorder:
    """Writes Events, one after the other, while :meth:`run` runs."""

    def __init__(
        self, server: ApiServer, host: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._host = host
        self._clock = clock
        self._waiting: asyncio.Queue[Event] = asyncio.Queue(_WAITING)
        self._written: OrderedDict[tuple[Subject, str, str], _Written] = OrderedDict()
        self._buckets: OrderedDict[tuple[str, str, str], _Bucket] = OrderedDict()
        self._similar: OrderedDict[tuple[Subject, str], _Similar] = OrderedDict()
        self._complaint = ""

    def warn(self, event: Event) -> None:
        """Have an Event of type Warning written; returns at once."""
        try:
            self._waiting.put_nowait(event)
        except asyncio.QueueFull:
            log.debug("an Event is dropped: %s", event.message)

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            event = await self._waiting.get()
            if not self._is_allowed(event.subject):
                continue
            try:
                await self._write(event)
                self._complaint = ""
            except ApiServerError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("an Event is not written: %s", error)

    def _is_allowed(self, subject: Subject) -> bool:
        key = (subject.kind, subject.namespace, subject.name)
        now = self._clock()
        bucket = _recent(self._buckets, key, lambda: _Bucket(_BURST, now))
        bucket.tokens = min(_BURST, bucket.tokens + (now - bucket.at_s) / _REFILL_S)
        bucket.at_s = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _combined(self, event: Event) -> tuple[Event, bool]:
        """The event, or the one that stands for it and others, and whether it does."""
        # Whatever its version: each change of a bad object has another.
        subject = msgspec.structs.replace(event.subject, version="")
        now = self._clock()
        similar = _recent(self._similar, (subject, event.reason), lambda: _Similar(set(), now))
        if now - similar.since_s > _SIMILAR_S:
            similar.messages.clear()
            similar.since_s = now
        if event.message not in similar.messages and len(similar.messages) >= _SIMILAR:
            message = f"(combined from similar events): {event.message}"
            return msgspec.structs.replace(event, message=message), True
        similar.messages.add(event.message)
        return event, False

    async def _write(self, event: Event) -> None:
        event, is_combined = self._combined(event)
        subject = msgspec.structs.replace(event.subject, version="")
        key = (subject, event.reason, "" if is_combined else event.message)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if (written := self._written.get(key)) is not None:
            try:
                await self._server.send(
                    "PATCH",
                    f"/api/v1/namespaces/{written.namespace}/events/{written.name}",
                    {"count": written.count + 1, "lastTimestamp": now, "message": event.message},
                    "count up an Event",
                    content_type="application/merge-patch+json",
                )
                written.count += 1
                return
            except ApiServerError as error:
                # Gone: Events live for an hour or so.
                if error.status != 404:
                    raise
        namespace = subject.namespace or "default"
        name = f"{subject.name}.{time.time_ns():x}"
        await self._server.send(
            "POST",
            f"/api/v1/namespaces/{namespace}/events",
            _document(event, namespace, name, self._host, now),
            "write an Event",
        )
        self._written.pop(key, None)
        _recent(self._written, key, lambda: _Written(namespace, name, 1))


KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


def _recent(found: OrderedDict[KeyT, ValueT], key: KeyT, make: Callable[[], ValueT]) -> ValueT:
    """The value of ``key``, made if it is new; of all only the latest _REMEMBERED are kept."""
    if key not in found:
        found[key] = make()
        if len(found) > _REMEMBERED:
            found.popitem(last=False)
    found.move_to_end(key)
    return found[key]


def _document(event: Event, namespace: str, name: str, host: str, now: str) -> dict[str, object]:
    subject = event.subject
    reference = {
        "apiVersion": subject.api_version,
        "kind": subject.kind,
        "namespace": subject.namespace,
        "name": subject.name,
        "uid": subject.uid,
        "resourceVersion": subject.version,
    }
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {field: value for field, value in reference.items() if value},
        "reason": event.reason,
        "message": event.message[:1024],
        "type": "Warning",
        "source": {"component": COMPONENT, "host": host},
        "reportingComponent": COMPONENT,
        "reportingInstance": host,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
