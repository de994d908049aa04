"""From the API server's JSON to the objects of :mod:`nfqproxy.control.objects`.

Straight into typed structures, without a dictionary between, and without what the proxy does not read
(managedFields, a Node's images): that is left out of the types, so it is skipped and never made.
"""

import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import force_setattr

from nfqproxy.control import annotations
from nfqproxy.control.node import ZONE_LABEL
from nfqproxy.control.objects import EndpointSlice, KubernetesObject, Service
from nfqproxy.control.table import EXCLUDING_LABELS
from nfqproxy.sources.decode import READERS
from nfqproxy.sources.fields import Context
from nfqproxy.sources.manifest import ObjectMeta, Shape
from nfqproxy.sources.schema import FieldError, plain

SELECTOR = ",".join(f"!{label}" for label in EXCLUDING_LABELS)
"""Label selector of Services and EndpointSlices: what other proxies serve never arrives (SEMANTICS 2.1.1)."""

_LABELS = frozenset({*EXCLUDING_LABELS, annotations.STEER, ZONE_LABEL})
"""The labels that are looked at after decoding; others are not kept, nor is their change one."""
_NO_LABELS: Mapping[str, str] = {}
_ANNOTATION = re.compile(r"metadata\.annotations\[(.+)\]")


Previous = Callable[[str, str], KubernetesObject | None]
"""By namespace and name."""


class Bad(Exception):  # noqa: N818 - it carries an error
    """An object cannot be read."""

    def __init__(self, identity: "Identity", error: FieldError) -> None:
        super().__init__(str(error))
        self.identity = identity
        self.error = error


class Identity(NamedTuple):
    """Which object, and which version of it; empty: not told."""

    namespace: str
    name: str
    uid: str
    version: str


class Decoded(NamedTuple):
    """One object as it was read."""

    identity: Identity
    value: KubernetesObject | None
    """None: the proxy has no use for it."""
    faults: tuple[FieldError, ...] = ()
    """Annotations in whose place the last good value stands, or none."""


class _Meta(msgspec.Struct, frozen=True, rename="camel", gc=False):
    resource_version: str = ""
    continue_: str | None = msgspec.field(default=None, name="continue")


class Page(msgspec.Struct, frozen=True):
    """An answer to list; its items are read one by one."""

    metadata: _Meta
    items: list[msgspec.Raw] | None = None


class WatchEvent(msgspec.Struct, frozen=True, gc=False):
    """metav1.WatchEvent."""

    type: str
    object: msgspec.Raw


class _Names(msgspec.Struct, frozen=True, rename="camel", gc=False):
    # Of any type: what an object that breaks all rules still tells.
    name: Any = ""
    namespace: Any = ""
    uid: Any = ""
    resource_version: Any = ""


class _Named(msgspec.Struct, frozen=True, gc=False):
    metadata: _Names = _Names()


page_decoder = msgspec.json.Decoder(Page)
event_decoder = msgspec.json.Decoder(WatchEvent)
_named_decoder = msgspec.json.Decoder(_Named)


def identity(data: msgspec.Raw | bytes) -> Identity:
    """Which object this is, as far as it can be told; raises nothing."""
    try:
        found = _named_decoder.decode(data).metadata
    except msgspec.MsgspecError:
        return Identity("", "", "", "")
    texts = (found.namespace, found.name, found.uid, found.resource_version)
    return Identity(*(text if isinstance(text, str) else "" for text in texts))


def decode(kind: str, data: msgspec.Raw | bytes, previous: Previous, context: Context) -> Decoded:
    """The object of this kind (a key of READERS) in ``data``; raises Bad.

    ``previous``: asked for the last good version, from which an annotation that is bad now is taken.
    """
    try:
        return _decode(kind, data, previous, context)
    except msgspec.ValidationError as error:
        raise Bad(identity(data), plain(error)) from None
    except msgspec.DecodeError as error:
        raise Bad(identity(data), FieldError("", f"is not JSON: {error}")) from None
    except FieldError as error:
        raise Bad(identity(data), error) from None


def _decode(kind: str, data: msgspec.Raw | bytes, previous: Previous, context: Context) -> Decoded:
    manifest = _decoder(kind).decode(data)
    metadata = manifest.metadata
    faults: list[FieldError] = []
    while True:
        try:
            value = READERS[kind].read(manifest, context)
            break
        except FieldError as error:
            # Each of the object's annotations takes the last good value, then goes: that ends.
            found = _ANNOTATION.fullmatch(error.path)
            if found is None or metadata is None or not metadata.annotations:
                raise
            faults.append(error)
            metadata = msgspec.structs.replace(
                metadata,
                annotations=_mended(
                    found[1],
                    metadata.annotations,
                    previous(metadata.namespace or "", metadata.name),
                ),
            )
            manifest = msgspec.structs.replace(manifest, metadata=metadata)
    if value is not None and (labels := getattr(value, "labels", None)):
        kept = {key: labels[key] for key in labels if key in _LABELS}
        force_setattr(value, "labels", kept or _NO_LABELS)
    # Without a name it would have been refused.
    assert metadata is not None
    assert metadata.name is not None
    return Decoded(
        Identity(
            metadata.namespace or "",
            metadata.name,
            metadata.uid or "",
            metadata.resource_version or "",
        ),
        value,
        tuple(faults),
    )


def _mended(
    key: str, given: Mapping[str, str], previous: KubernetesObject | None
) -> Mapping[str, str]:
    """The annotations with the last good value of this one, without it if there is none."""
    last = None
    if isinstance(previous, Service):
        last = previous.annotations.get(key)
    elif isinstance(previous, EndpointSlice) and previous.weight is not None:
        last = str(previous.weight)
    others = {name: value for name, value in given.items() if name != key}
    return others if last in (None, given[key]) else {**others, key: last}


@cache
def _decoder(kind: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_lean(READERS[kind].shape))


_READ_HERE = {"uid": str | None, "resource_version": str | None}
"""Of ObjectMeta: what only this source reads."""


@cache
def _lean(shape: type[Shape]) -> type[msgspec.Struct]:
    """The same type without the fields that nobody reads."""
    wanted = _READ_HERE if shape is ObjectMeta else {}
    return msgspec.defstruct(
        shape.__name__,
        [
            (info.name, _lean_type(kind), msgspec.field(default=None, name=info.encode_name))
            for info in msgspec.structs.fields(shape)
            if (kind := wanted.get(info.name, info.type)) is not Any
        ],
        frozen=True,
        gc=False,
    )


def _lean_type(kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Shape):
        return _lean(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return list[_lean_type(parts[0])]  # type: ignore[misc]
    if origin is types.UnionType:
        union = _lean_type(parts[0])
        for part in parts[1:]:
            union = union | _lean_type(part)
        return union
    return kind
