"""From parsed Kubernetes documents to the objects of :mod:`nfqproxy.control.objects`.

Types come first (:mod:`schema`), then meaning (:mod:`service`, :mod:`endpointslice`,
:mod:`node`): ranges of ports, addresses and their family, closed sets of words, annotations. What
the API server would have defaulted is defaulted here. Every fault is a
:class:`~nfqproxy.errors.ManifestError` that names origin, object and field.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from nfqproxy.control.objects import EndpointSlice, KubernetesObject, Node, Service, ServiceCidr
from nfqproxy.errors import ManifestError
from nfqproxy.sources.endpointslice import endpoint_slice
from nfqproxy.sources.fields import Context
from nfqproxy.sources.manifest import (
    EndpointSliceManifest,
    NodeManifest,
    ServiceCidrManifest,
    ServiceManifest,
    Shape,
)
from nfqproxy.sources.node import node, service_cidr
from nfqproxy.sources.schema import FieldError, convert
from nfqproxy.sources.service import service

logger = logging.getLogger(__name__)


def decode(document: object, context: Context, position: str = "") -> KubernetesObject | None:
    """The object in this document, or None for a kind the proxy does not use (INFO line).

    ``position`` names the document in messages as long as it has no name, such as "document 2".
    """
    if not isinstance(document, dict):
        raise ManifestError(
            "is not a Kubernetes object: a mapping with apiVersion, kind and metadata is expected",
            file=context.origin,
            object_name=position,
        )
    kind, api_version = document.get("kind"), document.get("apiVersion")
    for field, value in (("kind", kind), ("apiVersion", api_version)):
        if not isinstance(value, str) or not value:
            raise ManifestError(
                "is missing; every Kubernetes object has one"
                if value in (None, "")
                else "must be a string",
                file=context.origin,
                object_name=_label(document, position),
                field=field,
            )
    assert isinstance(kind, str)
    assert isinstance(api_version, str)
    reader = READERS.get(kind)
    group, _, version = api_version.rpartition("/")
    if reader is None or group != reader.group:
        logger.info("%s: %s is not used by the proxy", context.origin, _label(document, position))
        return None
    try:
        if version not in reader.versions:
            known = f"{reader.group}/{reader.versions[0]}".lstrip("/")
            raise FieldError("apiVersion", f'"{api_version}" is not read; write {known}')
        return reader.read(convert(document, reader.shape, strict=context.strict), context)
    except FieldError as error:
        raise ManifestError(
            error.problem,
            file=context.origin,
            object_name=_label(document, position),
            field=error.path,
        ) from None


def object_name(value: KubernetesObject) -> str:
    """How messages call an object: "Service default/web", "Node n1"."""
    match value:
        case Service() | EndpointSlice():
            return f"{type(value).__name__} {value.namespace}/{value.name}"
        case Node():
            return f"Node {value.name}"
        case ServiceCidr():
            return f"ServiceCIDR {value.name}"


def _label(document: dict[str, object], position: str) -> str:
    kind = document.get("kind")
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(kind, str) or not kind:
        kind = "object"
    if not isinstance(name, str) or not name:
        return f"{kind} ({position})" if position else kind
    if kind in ("Node", "ServiceCIDR"):
        return f"{kind} {name}"
    namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
    return f"{kind} {namespace if isinstance(namespace, str) and namespace else 'default'}/{name}"


class Reader(NamedTuple):
    """How one kind is read."""

    group: str
    """API group, empty: core."""
    versions: tuple[str, ...]
    shape: type[Shape]
    read: Callable[[Any, Context], KubernetesObject | None]
    """From the shape to the object; None: the proxy has no use for it; raises FieldError."""


READERS = {
    "Service": Reader("", ("v1",), ServiceManifest, service),
    "EndpointSlice": Reader("discovery.k8s.io", ("v1",), EndpointSliceManifest, endpoint_slice),
    "Node": Reader("", ("v1",), NodeManifest, node),
    # The beta of 1.31 and 1.32 had the same fields.
    "ServiceCIDR": Reader(
        "networking.k8s.io", ("v1", "v1beta1"), ServiceCidrManifest, service_cidr
    ),
}

KINDS = {kind: (reader.group, reader.versions[0]) for kind, reader in READERS.items()}
"""The kinds that are read: name -> API group (empty: core) and version."""
