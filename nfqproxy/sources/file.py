"""The file source: ordinary Kubernetes manifests in YAML or JSON, read once or followed.

A file may hold several documents and ``kind: List`` (or ServiceList and the like). All or nothing:
one fault anywhere and the whole new state is refused.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

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
from nfqproxy.errors import ManifestError
from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.decode import KINDS, decode, object_name
from nfqproxy.sources.document import DocumentError, Value, parse_json, parse_yaml
from nfqproxy.sources.fields import Context
from nfqproxy.sources.parts import cut
from nfqproxy.sources.watch import watch

logger = logging.getLogger(__name__)

RETRY_S = 0.15
"""A bad file is read again after this long before it is called bad, seconds: editors that write in
place leave it empty or cut off for a moment."""

_SMALL_BYTES = 16 * 1024
"""Files of together so many bytes are read in a few milliseconds: quicker than a thread is asked to."""


def load(paths: Sequence[Path]) -> Objects:
    """All objects of these files and directories; raises ManifestError."""
    loader = Loader(paths)
    loader.load()
    return loader.objects


_Parts: TypeAlias = dict[int, tuple[KubernetesObject, ...]]
"""Of one file: hash of each part's bytes, and the objects in it."""


class Loader:
    """Reads the paths; after the first time only what has altered is decoded, and told.

    A fault anywhere leaves the last good state in force.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._known: dict[Path, _Parts] = {}
        self._found: dict[ObjectKey, KubernetesObject] = {}

    @property
    def objects(self) -> Objects:
        """The last good state, sorted by kind and name."""
        return as_objects(self._found)

    def load(self) -> ObjectChange:
        """Look at all files; raises ManifestError."""
        known: dict[Path, _Parts] = {}
        found: dict[ObjectKey, KubernetesObject] = {}
        for file in on_disk.files(self._paths):
            known[file] = self._read(file)
            for items in known[file].values():
                for item in items:
                    _add(found, item)
        if not found:
            raise ManifestError(
                f"no {', '.join(KINDS)} in it; give manifests of Services and EndpointSlices",
                file=", ".join(map(str, self._paths)),
            )
        change = difference(self._found, found)
        self._known, self._found = known, found
        return change

    def load_altered(self, files: Collection[Path]) -> ObjectChange:
        """Look at these files alone, which :meth:`load` has read before; raises ManifestError."""
        if any(file not in self._known for file in files):
            return self.load()
        read = {file: self._read(file) for file in files}
        before: dict[ObjectKey, KubernetesObject] = {}
        after: dict[ObjectKey, KubernetesObject] = {}
        for file, parts in read.items():
            known = self._known[file]
            for digest in known.keys() - parts.keys():
                before.update((object_key(item), item) for item in known[digest])
            for digest in parts.keys() - known.keys():
                for item in parts[digest]:
                    _add(after, item)
        for key, item in after.items():
            if key not in before and key in self._found:
                _add(self._found, item)  # raises: another file has it
        if not after and len(before) == len(self._found):
            return self.load()  # raises: nothing is left
        self._known.update(read)
        removes = tuple(key for key in before if key not in after)
        for key in removes:
            del self._found[key]
        self._found.update(after)
        return ObjectChange(
            upserts=tuple(item for key, item in after.items() if before.get(key) != item),
            removes=removes,
        )

    def _read(self, file: Path) -> _Parts:
        data = on_disk.read(file)
        before = self._known.get(file, {})
        with contextlib.suppress(DocumentError, UnicodeDecodeError, ManifestError):
            parts = _parts(file, data, before)
            if parts:
                return parts
        # One part; or something is wrong, and its place in the file is to be told.
        digest = hash(data)
        return {digest: before.get(digest) or tuple(_objects(file, data))}


def as_objects(found: Mapping[ObjectKey, KubernetesObject]) -> Objects:
    """These objects, sorted by kind and name."""
    values = [found[key] for key in sorted(found, key=_order)]
    return Objects(
        services=tuple(value for value in values if isinstance(value, Service)),
        endpoint_slices=tuple(value for value in values if isinstance(value, EndpointSlice)),
        nodes=tuple(value for value in values if isinstance(value, Node)),
        service_cidrs=tuple(value for value in values if isinstance(value, ServiceCidr)),
    )


def difference(
    old: Mapping[ObjectKey, KubernetesObject], new: Mapping[ObjectKey, KubernetesObject]
) -> ObjectChange:
    """The way from all objects of one moment to all those of a later one."""
    return ObjectChange(
        upserts=tuple(item for key, item in new.items() if old.get(key) != item),
        removes=tuple(key for key in old if key not in new),
    )


def _order(key: ObjectKey) -> tuple[str, str, str]:
    kind, namespace, name = key
    return kind.__name__, namespace, name


class FileSource:
    """The objects of some paths, now and after every change.

    :meth:`load` first, which raises what is wrong; then iterate over :meth:`changes`, which raises
    nothing for a bad file: it logs the fault once, keeps the last good objects and tells
    the fault in :attr:`last_error` until the files are mended.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._loader = Loader(paths)
        self._status: on_disk.Status | None = None
        self._lock = asyncio.Lock()
        self.last_error: str | None = None
        """What is wrong with the files as they are now; None: nothing."""

    @property
    def objects(self) -> Objects:
        """The last good state; made anew at every look."""
        return self._loader.objects

    def load(self) -> Objects:
        """Read the paths now, for the start of the program; raises ManifestError."""
        self._status = on_disk.status(self._paths)
        self._loader.load()
        self.last_error = None
        return self.objects

    async def start(self) -> Objects:
        """As :meth:`load`."""
        return self.load()

    def warn(self, namespace: str, service: str, reason: str, message: str) -> None:
        """See :class:`nfqproxy.sources.base.Source`; whoever wrote the files reads the log."""

    async def close(self) -> None:
        """See :class:`nfqproxy.sources.base.Source`; it holds nothing."""

    async def reload(self, files: Collection[Path] | None = None) -> ObjectChange:
        """Read the paths again, or of them these files alone; what differs from the last good state.

        Nothing, if a file is bad.
        """
        async with self._lock:
            try:
                # While something is wrong, what mends it may be in any file.
                change = await self._read_patiently(None if self.last_error else files)
            except ManifestError as error:
                if self.last_error != str(error):
                    self.last_error = str(error)
                    logger.error("%s; the last good state stays in force", error)
                return ObjectChange()
            if self.last_error is not None:
                self.last_error = None
                logger.info("%s: good again", ", ".join(map(str, self._paths)))
            return change

    async def changes(self, stop: asyncio.Event) -> AsyncGenerator[ObjectChange, None]:
        """Every change that alters the objects, until ``stop`` is set."""
        watcher = watch(self._paths, stop, since=self._status)
        async with contextlib.aclosing(watcher) as bursts:
            async for files in bursts:
                change = await self.reload(files)
                if change:
                    yield change

    async def _read_patiently(self, files: Collection[Path] | None) -> ObjectChange:
        try:
            if files is None:
                return await asyncio.to_thread(self._loader.load)
            if sum(on_disk.file_status(str(file))[-1] for file in files) <= _SMALL_BYTES:
                return self._loader.load_altered(files)
            # In a thread: a large YAML file takes long enough to be felt by the event loop.
            return await asyncio.to_thread(self._loader.load_altered, files)
        except ManifestError:
            # The rest of the change may have come meanwhile, in other files too.
            await asyncio.sleep(RETRY_S)
            return await asyncio.to_thread(self._loader.load)


def _add(found: dict[ObjectKey, KubernetesObject], item: KubernetesObject) -> None:
    twin = found.setdefault(object_key(item), item)
    if twin is not item:
        where = "twice in this file" if twin.origin == item.origin else f"in {twin.origin} too"
        raise ManifestError(
            f"is given {where}; remove one of the two",
            file=item.origin,
            object_name=object_name(item),
        )


def documents(file: Path, data: bytes) -> Iterator[Value]:
    """The documents in one file's bytes, as plain values; raises ManifestError."""
    try:
        text = data.decode("utf-8-sig")
        yield from [parse_json(text)] if file.suffix == ".json" else parse_yaml(text)
    except DocumentError as error:
        raise ManifestError(
            error.problem,
            file=str(file),
            field=f"line {error.line}, column {error.column}" if error.line else "",
        ) from None
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"is not UTF-8 text at byte {error.start + 1}; save it as UTF-8", file=str(file)
        ) from None


def _objects(file: Path, data: bytes) -> Iterator[KubernetesObject]:
    """The objects in one file's bytes; raises ManifestError."""
    context = Context(str(file))
    is_empty = True
    for number, value in enumerate(documents(file, data), 1):
        if value is None:
            continue  # nothing between two "---"
        is_empty = False
        yield from _unfold(value, context, f"document {number}")
    if is_empty:
        raise ManifestError("is empty; put manifests in it or remove it", file=str(file))


def _parts(file: Path, data: bytes, before: _Parts) -> _Parts:
    """The objects of a file that can be cut, by part; what ``before`` has already is not parsed.

    Empty: not to be cut, or nothing in it. Raises what is wrong with a part without telling where.
    """
    is_json = file.suffix == ".json"
    pieces = cut(data, is_json=is_json)
    if pieces is None:
        return {}
    context = Context(str(file))
    kind, frame = "", b""
    if is_json:
        frame = pieces.pop(0)
        value = parse_json(frame.decode())
        kind = _list_kind(value) if isinstance(value, dict) else ""
        if not kind:
            return {}
    salt = hash(frame)
    found: _Parts = {}
    for piece in pieces:
        digest = hash((salt, piece))
        if found.get(digest):
            return {}  # the same object twice
        items = before.get(digest)
        if items is None:
            text = piece.decode()
            if is_json:
                items = tuple(_list_item(parse_json(text), kind, context, ""))
            else:
                items = tuple(
                    item
                    for value in parse_yaml(text)
                    if value is not None
                    for item in _unfold(value, context, "")
                )
        found[digest] = items
    return found if any(found.values()) else {}


def _unfold(value: Value, context: Context, position: str) -> Iterator[KubernetesObject]:
    """The objects of one document, which may be a list of objects."""
    if not isinstance(value, dict) or not (kind := _list_kind(value)):
        item = decode(value, context, position)
        if item is not None:
            yield item
        return
    items = value.get("items")
    if items is not None and not isinstance(items, list):
        raise ManifestError(
            "must be a list of objects",
            file=context.origin,
            object_name=f"{value['kind']} ({position})",
            field="items",
        )
    for index, inner in enumerate(items or ()):
        yield from _list_item(inner, kind, context, f"{position}, items[{index}]")


def _list_item(
    inner: Value, kind: str, context: Context, position: str
) -> Iterator[KubernetesObject]:
    """The object that stands in a list of this kind, if the proxy uses it."""
    if isinstance(inner, dict):
        if _list_kind(inner):
            raise ManifestError(
                "is a list inside a list; write its items out",
                file=context.origin,
                object_name=f"{inner['kind']} ({position})",
            )
        if kind in KINDS and "kind" not in inner:
            # The API's own lists (ServiceList) do not repeat the kind in their items.
            group, version = KINDS[kind]
            inner = {"apiVersion": f"{group}/{version}".lstrip("/"), "kind": kind, **inner}
    item = decode(inner, context, position)
    if item is not None:
        yield item


def _list_kind(value: dict[object, object]) -> str:
    """For a list "List" or the kind of its items, else empty."""
    kind = value.get("kind")
    if kind == "List" and value.get("apiVersion") == "v1":
        return "List"
    if isinstance(kind, str) and kind.removesuffix("List") in KINDS and kind.endswith("List"):
        return kind.removesuffix("List")
    return ""
