"""Service and EndpointSlice manifests as plain dictionaries, ready for ``json.dumps``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of a Service and of its slices; ``target`` is the backends' port."""

    port: int
    target: int
    protocol: str = "TCP"
    name: str = ""
    node_port: int = 0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One endpoint; its family is that of the address."""

    address: str
    node: str = "n1"
    ready: bool = True


def service(
    name: str,
    *,
    vips: Sequence[str],
    ports: Sequence[Port],
    endpoints: Sequence[Endpoint | str],
    weights: Mapping[str, int] | None = None,
    labels: Mapping[str, str] | None = None,
    external_local: bool = False,
) -> list[Manifest]:
    """A Service with these cluster IPs and one EndpointSlice per family that has endpoints.

    ``endpoints`` may be bare addresses; ``weights`` (by address) become ``nfqproxy.io/weights``.
    """
    all_endpoints = [e if isinstance(e, Endpoint) else Endpoint(address=e) for e in endpoints]
    metadata: Manifest = {"name": name, "namespace": "default", "labels": dict(labels or {})}
    if weights is not None:
        metadata["annotations"] = {"nfqproxy.io/weights": json.dumps(dict(weights))}
    spec: Manifest = {
        "type": "NodePort" if any(port.node_port for port in ports) else "ClusterIP",
        "clusterIP": vips[0],
        "clusterIPs": list(vips),
        "ipFamilies": ["IPv6" if ":" in vip else "IPv4" for vip in vips],
        "ipFamilyPolicy": "RequireDualStack" if len(vips) > 1 else "SingleStack",
        "ports": [_service_port(port) for port in ports],
    }
    if external_local:
        spec["externalTrafficPolicy"] = "Local"
    found = [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}]
    for family in ("IPv4", "IPv6"):
        members = [e for e in all_endpoints if (":" in e.address) == (family == "IPv6")]
        if members:
            found.append(_slice(name, family, ports, members))
    return found


def _service_port(port: Port) -> Manifest:
    spec: Manifest = {
        "name": port.name,
        "port": port.port,
        "protocol": port.protocol,
        "targetPort": port.target,
    }
    if port.node_port:
        spec["nodePort"] = port.node_port
    return spec


def _slice(
    service_name: str, family: str, ports: Sequence[Port], members: Sequence[Endpoint]
) -> Manifest:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{family.lower()}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": family,
        "ports": [
            {"name": port.name, "port": port.target, "protocol": port.protocol} for port in ports
        ],
        "endpoints": [
            {
                "addresses": [member.address],
                "conditions": {"ready": member.ready},
                "nodeName": member.node,
            }
            for member in members
        ],
    }


def text(objects: Sequence[Manifest]) -> str:
    """The objects as one ``kind: List`` document."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=1)
