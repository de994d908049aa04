"""All objects and their one linear history, of which the newest part is kept.

Every write makes the next revision, whatever the resource; an object's resourceVersion is the revision of
its last write. Objects are kept as JSON text, so that a list is a concatenation: 2,500 slices of 100
endpoints take milliseconds. State as of an earlier revision is the present with the changes since
undone. (k8s.io/apiserver pkg/storage/etcd3; etcd's revisions and compaction)
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from nfqproxy.testing.resources import RESOURCES, Resource

__all__ = ["FIRST_REVISION", "Change", "CompactedError", "Object", "Store", "Version"]

Object = dict[str, Any]
"""An object of the API, parsed."""

FIRST_REVISION = 9_990
"""Before the first write. Soon the fifth digit comes: resourceVersions are not ordered as text."""

_SNAPSHOTS = 8
"""Sorted states that are kept for the next page."""


class CompactedError(Exception):
    """What was asked for has been compacted away; carries the oldest revision that is left."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"history begins at revision {oldest}")
        self.oldest = oldest


class Version(Struct, frozen=True, kw_only=True):
    """An object as one write left it."""

    key: str
    """``NAMESPACE/NAME`` or ``NAME``; lists are ordered by it."""
    namespace: str
    name: str
    revision: int
    body: bytes
    """JSON without kind and apiVersion, as an item of a list."""
    labels: Mapping[str, str]
    fields: Mapping[str, str]
    """What field selectors compare."""

    def parsed(self) -> Object:
        """A copy to change, without kind and apiVersion."""
        value: Object = msgspec.json.decode(self.body)
        return value

    def whole(self, resource: Resource) -> bytes:
        """JSON with kind and apiVersion, as an object on its own."""
        return (
            f'{{"kind":"{resource.kind}","apiVersion":"{resource.api_version}",'.encode()
            + self.body[1:]
        )

    def at(self, revision: int) -> "Version":
        """The same with another resourceVersion: a deleted object's last state carries the deletion's."""
        value = self.parsed()
        value["metadata"]["resourceVersion"] = str(revision)
        return msgspec.structs.replace(self, revision=revision, body=msgspec.json.encode(value))


class Change(Struct, frozen=True, kw_only=True):
    """One write."""

    revision: int
    resource: Resource
    before: Version | None
    """None: it was made."""
    after: Version | None
    """None: it was deleted."""


class Store:
    """The objects, now and for a while back. Not for several threads."""

    def __init__(self, *, history: int, first_revision: int = FIRST_REVISION) -> None:
        """``history``: how many writes can be looked back at before the oldest are compacted."""
        self.revision = first_revision
        self.compacted = first_revision
        """State as of this revision and later, and changes after it, can be told."""
        self.listeners: set[Callable[[], None]] = set()
        """Called after every write and compaction."""
        self._limit = history
        self._history: deque[Change] = deque()
        self._objects: dict[Resource, dict[str, Version]] = {resource: {} for resource in RESOURCES}
        self._sorted: dict[tuple[str, int], list[Version]] = {}

    def get(self, resource: Resource, namespace: str, name: str) -> Version | None:
        """The newest version of an object."""
        return self._objects[resource].get(_key(namespace, name))

    def count(self, resource: Resource) -> int:
        """How many objects of a resource there are."""
        return len(self._objects[resource])

    def all(self, resource: Resource) -> list[Version]:
        """All objects as they are, in no order."""
        return list(self._objects[resource].values())

    def put(self, resource: Resource, value: Object) -> Version:
        """Write an object as it is, whatever was there; it is given the next resourceVersion."""
        revision = self.revision + 1
        metadata = {**value["metadata"], "resourceVersion": str(revision)}
        value = {"metadata": metadata, **value} | {"metadata": metadata}
        value.pop("kind", None)
        value.pop("apiVersion", None)
        namespace = metadata.get("namespace", "")
        version = Version(
            key=_key(namespace, metadata["name"]),
            namespace=namespace,
            name=metadata["name"],
            revision=revision,
            body=msgspec.json.encode(value),
            labels=dict(metadata.get("labels") or {}),
            fields=resource.selectable(value),
        )
        before = self._objects[resource].get(version.key)
        self._objects[resource][version.key] = version
        self._record(Change(revision=revision, resource=resource, before=before, after=version))
        return version

    def remove(self, resource: Resource, version: Version) -> int:
        """Delete an object that is there; the revision of that."""
        revision = self.revision + 1
        del self._objects[resource][version.key]
        self._record(Change(revision=revision, resource=resource, before=version, after=None))
        return revision

    def snapshot(self, resource: Resource, revision: int | None = None) -> list[Version]:
        """State as of a revision (default: now), ordered by key; raises CompactedError. Not to be changed."""
        at = self.revision if revision is None else revision
        if at < self.compacted:
            raise CompactedError(self.compacted)
        known = self._sorted.get((resource.plural, at))
        if known is None:
            items = dict(self._objects[resource])
            for change in self._newest_first(at):
                if change.resource is not resource:
                    continue
                if change.before is not None:
                    items[change.before.key] = change.before
                elif change.after is not None:
                    del items[change.after.key]
            known = [items[key] for key in sorted(items)]
            if len(self._sorted) >= _SNAPSHOTS:
                del self._sorted[next(iter(self._sorted))]
            self._sorted[resource.plural, at] = known
        return known

    def since(self, resource: Resource, revision: int) -> list[Change]:
        """The changes after a revision, oldest first; raises CompactedError."""
        if revision < self.compacted:
            raise CompactedError(self.compacted)
        found = [item for item in self._newest_first(revision) if item.resource is resource]
        found.reverse()
        return found

    def compact(self, revision: int | None = None) -> None:
        """Forget the history up to a revision (default: all of it)."""
        wanted = self.revision if revision is None else min(revision, self.revision)
        self.compacted = max(self.compacted, wanted)
        while self._history and self._history[0].revision <= self.compacted:
            self._history.popleft()
        self._tell()

    def reopen(self) -> None:
        """As after a restart on a compacted storage: no history, and a revision that nobody has seen yet."""
        self.revision += 1
        self.compact()

    def _newest_first(self, after: int) -> Iterator[Change]:
        for change in reversed(self._history):
            if change.revision <= after:
                return
            yield change

    def _record(self, change: Change) -> None:
        self.revision = change.revision
        self._history.append(change)
        while len(self._history) > self._limit:
            self.compacted = self._history.popleft().revision
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self.listeners):
            listener()


def _key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name
