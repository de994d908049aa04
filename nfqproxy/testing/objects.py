"""What the API server makes of an object that is written: checks and defaults.

Only what a node proxy and its tests rely on is defaulted and checked; an object that goes through here is
one a real server would have taken, as far as the fields below go.
Sources: k/pkg/apis/{core,discovery}/v1/defaults.go, k/pkg/apis/{core,discovery}/validation,
k/pkg/registry/core/service/storage/alloc.go.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from nfqproxy.sources.manifest import (
    EndpointSliceManifest,
    NodeManifest,
    ObjectMeta,
    ServiceCidrManifest,
    ServiceManifest,
)
from nfqproxy.testing.resources import Resource
from nfqproxy.testing.settings import Settings
from nfqproxy.testing.status import bad_request, internal, invalid
from nfqproxy.testing.store import Object

__all__ = ["Allocator", "check", "check_types", "set_defaults"]

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_REQUIRED, _INVALID, _UNSUPPORTED = (
    "FieldValueRequired",
    "FieldValueInvalid",
    "FieldValueNotSupported",
)

_Cause = tuple[str, str, str]


def check(resource: Resource, value: Object) -> None:
    """Raise ApiError (422) for wrong values; the types are right."""
    causes = [*_metadata_faults(resource, value["metadata"])]
    if resource.kind == "Service":
        causes += _service_faults(value.get("spec") or {})
    elif resource.kind == "EndpointSlice":
        causes += _slice_faults(value)
    elif resource.kind == "Event":
        about = value.get("involvedObject") or {}
        namespace = value["metadata"].get("namespace", "")
        # An Event about an object without namespace is in "default".
        if about.get("namespace", "") != namespace and (
            about.get("namespace") or namespace != "default"
        ):
            causes.append(("involvedObject.namespace", _INVALID, "does not match event.namespace"))
    if causes:
        raise invalid(resource.kind, resource.group, value["metadata"].get("name", ""), causes)


class _Other(Struct, rename={"involved_object": "involvedObject"}):
    """What is looked at of kinds that the proxy does not read."""

    metadata: ObjectMeta
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}
    involved_object: dict[str, Any] = {}


_SHAPES: dict[str, type] = {
    "Service": ServiceManifest,
    "EndpointSlice": EndpointSliceManifest,
    "Node": NodeManifest,
    "ServiceCIDR": ServiceCidrManifest,
}


def check_types(resource: Resource, value: Object) -> None:
    """Raise ApiError (400) for a field of the wrong type."""
    try:
        msgspec.convert(value, _SHAPES.get(resource.kind, _Other))
    except msgspec.ValidationError as error:
        raise bad_request(
            f'{resource.kind} in version "v1" cannot be handled as a {resource.kind}: {error}'
        ) from None


def _metadata_faults(resource: Resource, metadata: Object) -> Iterator[_Cause]:
    name = metadata.get("name", "")
    pattern = _DNS_LABEL if resource.kind in ("Service", "Namespace") else _DNS_NAME
    if not name:
        yield "metadata.name", _REQUIRED, "Required value: name or generateName is required"
    elif not pattern.fullmatch(name):
        yield (
            "metadata.name",
            _INVALID,
            f'Invalid value: "{name}": must be a lower case RFC 1123 name',
        )
    for key, text in (metadata.get("labels") or {}).items():
        if not _LABEL_VALUE.fullmatch(text):
            yield (
                "metadata.labels",
                _INVALID,
                f'Invalid value: "{text}" of {key}: must be a label value',
            )


def _service_faults(spec: Object) -> Iterator[_Cause]:
    if (
        not spec.get("ports")
        and spec.get("clusterIP") != "None"
        and spec.get("type") != "ExternalName"
    ):
        yield "spec.ports", _REQUIRED, "Required value"
    ports = spec.get("ports") or []
    seen = set()
    for index, port in enumerate(ports):
        where = f"spec.ports[{index}]"
        if len(ports) > 1 and not port.get("name"):
            yield f"{where}.name", _REQUIRED, "Required value"
        number = port.get("port")
        if not isinstance(number, int) or not 0 < number < 65536:
            yield (
                f"{where}.port",
                _INVALID,
                f"Invalid value: {number}: must be between 1 and 65535, inclusive",
            )
        if port.get("protocol") not in ("TCP", "UDP", "SCTP"):
            yield f"{where}.protocol", _UNSUPPORTED, f'Unsupported value: "{port.get("protocol")}"'
        if (number, port.get("protocol")) in seen:
            yield where, "FieldValueDuplicate", f"Duplicate value: {number}"
        seen.add((number, port.get("protocol")))


def _slice_faults(value: Object) -> Iterator[_Cause]:
    kind = value.get("addressType")
    if not kind:
        yield "addressType", _REQUIRED, "Required value"
    elif kind not in ("IPv4", "IPv6", "FQDN"):
        yield "addressType", _UNSUPPORTED, f'Unsupported value: "{kind}"'
    if len(value.get("endpoints") or ()) > 1000:
        yield "endpoints", "FieldValueTooMany", "Too many: must have at most 1000 items"
    for index, endpoint in enumerate(value.get("endpoints") or ()):
        if not isinstance(endpoint, dict) or not endpoint.get("addresses"):
            yield (
                f"endpoints[{index}].addresses",
                _REQUIRED,
                "Required value: must contain at least 1 address",
            )


def set_defaults(resource: Resource, value: Object) -> None:
    """Fill in what the API server fills in, without the addresses and ports it hands out."""
    if resource.kind == "Service":
        spec = value.setdefault("spec", {})
        spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        if spec["type"] != "ExternalName":
            spec.setdefault("internalTrafficPolicy", "Cluster")
        if spec["type"] in ("NodePort", "LoadBalancer") or spec.get("externalIPs"):
            spec.setdefault("externalTrafficPolicy", "Cluster")
        if spec["sessionAffinity"] == "ClientIP":
            spec.setdefault("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": 10800}})
        for port in spec.get("ports") or ():
            port.setdefault("protocol", "TCP")
            if "port" in port:
                port.setdefault("targetPort", port["port"])
        value.setdefault("status", {"loadBalancer": {}})
    elif resource.kind == "EndpointSlice":
        for port in value.get("ports") or ():
            port.setdefault("name", "")
            port.setdefault("protocol", "TCP")
    elif resource.kind == "Namespace":
        value.setdefault("spec", {"finalizers": ["kubernetes"]})
        value.setdefault("status", {"phase": "Active"})


class Allocator:
    """Cluster IPs and node ports for Services that name none; one is never handed out twice."""

    def __init__(self, settings: Settings) -> None:
        self._addresses: dict[int, Iterator[Any]] = {
            network.version: network.hosts()
            for network in map(ipaddress.ip_network, settings.service_cidrs)
        }
        first, last = settings.node_ports
        self._ports = iter(range(first, last + 1))
        self._taken: set[str | int] = set()

    def note(self, service: Object) -> None:
        """What this Service has is taken."""
        spec = service.get("spec") or {}
        self._taken.update(spec.get("clusterIPs") or (), [spec.get("clusterIP", "")])
        self._taken.update(
            port["nodePort"] for port in spec.get("ports") or () if port.get("nodePort")
        )
        self._taken.add(spec.get("healthCheckNodePort") or 0)

    def fill(self, service: Object) -> None:
        """Give the Service what it lacks; ApiError (500) when a range is used up."""
        spec = service["spec"]
        kind = spec["type"]
        if kind == "ExternalName":
            return
        self._give_addresses(spec)
        if kind in ("NodePort", "LoadBalancer") and spec.get("allocateLoadBalancerNodePorts", True):
            for port in spec.get("ports") or ():
                if not port.get("nodePort"):
                    port["nodePort"] = self._next(self._ports, "node ports")
        if kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            spec.setdefault("healthCheckNodePort", self._next(self._ports, "node ports"))
        self.note(service)

    def _give_addresses(self, spec: Object) -> None:
        if not spec.get("clusterIP"):
            is_dual = str(spec.get("ipFamilyPolicy", "")).endswith("DualStack")
            families = spec.get("ipFamilies") or [f"IPv{version}" for version in self._addresses]
            wanted = families if is_dual else families[:1]
            spec["clusterIPs"] = [
                str(self._next(self._addresses.get(int(family[-1]), iter(())), "cluster IPs"))
                for family in wanted
            ]
            spec["clusterIP"] = spec["clusterIPs"][0]
        spec.setdefault("clusterIPs", [spec["clusterIP"]])
        if spec["clusterIP"] != "None":
            families = [f"IPv{6 if ':' in ip else 4}" for ip in spec["clusterIPs"]]
            spec.setdefault("ipFamilies", families)
            spec.setdefault(
                "ipFamilyPolicy", "SingleStack" if len(families) == 1 else "RequireDualStack"
            )

    def _next(self, candidates: Iterator[Any], what: str) -> Any:
        for candidate in candidates:
            if candidate not in self._taken and str(candidate) not in self._taken:
                self._taken.add(candidate)
                return candidate
        raise internal(f"failed to allocate: the range of {what} is full")
