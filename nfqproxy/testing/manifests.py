"""A server's objects from manifest files, read once or followed.

Files as the file source takes them (docs/manifests.md), with every kind that is served. What clients write
stays; what a file no longer holds is deleted. All or nothing: one fault anywhere, and nothing changes.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nfqproxy.errors import ManifestError
from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.file import RETRY_S, documents
from nfqproxy.sources.watch import watch
from nfqproxy.testing.resources import by_kind
from nfqproxy.testing.server import ApiServer
from nfqproxy.testing.status import ApiError
from nfqproxy.testing.store import Object

__all__ = ["ManifestFollower"]

logger = logging.getLogger(__name__)

_Key = tuple[str, str, str]


class ManifestFollower:
    """Keeps a server's objects as some files and directories say."""

    def __init__(self, server: ApiServer, paths: Sequence[Path]) -> None:
        self._server = server
        self._paths = tuple(paths)
        self._held: set[_Key] = set()
        self._status: on_disk.Status | None = None

    def load(self) -> int:
        """Read all files and apply what they hold: how many objects. ManifestError: nothing was changed."""
        self._status = on_disk.status(self._paths)
        found: dict[_Key, Object] = {}
        for file in on_disk.files(self._paths):
            for value in _objects(file):
                key = _key(value)
                try:
                    self._server.vet(value)
                except ApiError as error:
                    raise ManifestError(
                        str(error), file=str(file), object_name=_label(key)
                    ) from None
                if key in found:
                    raise ManifestError(
                        "is given twice; remove one of the two",
                        file=str(file),
                        object_name=_label(key),
                    )
                found[key] = value
        for value in found.values():
            self._server.apply(value)
        for kind, namespace, name in self._held - found.keys():
            # A client may have deleted it before.
            with contextlib.suppress(ApiError):
                self._server.discard(kind, name, namespace)
        self._held = set(found)
        return len(found)

    async def follow(self, stop: asyncio.Event) -> None:
        """Load again after every change until ``stop`` is set; a bad file is logged, and nothing changes."""
        async with contextlib.aclosing(watch(self._paths, stop, since=self._status)) as bursts:
            async for _ in bursts:
                try:
                    try:
                        count = self.load()
                    except ManifestError:
                        # An editor may be in the middle of writing it.
                        await asyncio.sleep(RETRY_S)
                        count = self.load()
                except ManifestError as error:
                    logger.error("%s; the last good state stays", error)
                else:
                    logger.info("%d objects from the manifests", count)


def _objects(file: Path) -> Iterator[Object]:
    """The objects of a file that are served; raises ManifestError."""
    for value in documents(file, on_disk.read(file)):
        if value is not None:
            yield from _unfold(file, value)


def _unfold(file: Path, value: Any) -> Iterator[Object]:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ManifestError(
            "is no Kubernetes object: a mapping with kind is expected", file=str(file)
        )
    kind = value["kind"]
    if kind.endswith("List") and isinstance(value.get("items"), list):
        for inner in value["items"]:
            if isinstance(inner, dict) and kind != "List":
                inner = {
                    "kind": kind.removesuffix("List"),
                    "apiVersion": value.get("apiVersion"),
                    **inner,
                }
            yield from _unfold(file, inner)
    elif (value.get("apiVersion"), kind) in by_kind:
        if not isinstance(value.get("metadata"), dict):
            raise ManifestError(
                "has no metadata", file=str(file), object_name=kind, field="metadata"
            )
        yield value
    else:
        logger.info("%s: %s %s is not served", file, value.get("apiVersion"), kind)


def _key(value: Object) -> _Key:
    metadata = value["metadata"]
    is_namespaced = by_kind[value["apiVersion"], value["kind"]].is_namespaced
    namespace = (metadata.get("namespace") or "default") if is_namespaced else ""
    return value["kind"], str(namespace), str(metadata.get("name", ""))


def _label(key: _Key) -> str:
    return f"{key[0]} {'/'.join(part for part in key[1:] if part)}"
