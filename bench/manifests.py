"""Services as Kubernetes objects, for ``nfqproxy run --manifests``."""

import json
from collections.abc import Iterable

from bench.services import ServicePort
from bench.world import NODE_ADDRESS, NODE_NAME, POD_CIDR, World

Json = dict[str, object]


def manifests(world: World) -> str:
    """The manifests of a world's Services."""
    return manifest_list(world.services)


def manifest_list(services: Iterable[ServicePort]) -> str:
    """One ``kind: List`` with the Node and, for each Service, its weights and EndpointSlice."""
    node: Json = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE_NAME},
        "spec": {"podCIDR": POD_CIDR, "podCIDRs": [POD_CIDR]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}]},
    }
    items = [node]
    for service in services:
        items += _objects(service)
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1)


def _objects(service: ServicePort) -> tuple[Json, Json]:
    weights = {endpoint.address: endpoint.weight for endpoint in service.endpoints}
    is_even = set(weights.values()) == {1}
    annotations = {} if is_even else {"nfqproxy.io/weights": json.dumps(weights)}
    protocol = service.protocol.upper()
    port, target = service.port, service.endpoints[0].port
    spec: Json = {
        "type": "ClusterIP",
        "clusterIP": service.address,
        "clusterIPs": [service.address],
        "ipFamilies": ["IPv4"],
        "ports": [
            {"name": service.port_name, "protocol": protocol, "port": port, "targetPort": target}
        ],
    }
    about: Json = {"namespace": service.namespace, "name": service.name, "annotations": annotations}
    endpoint_slice: Json = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service.name}-1",
            "namespace": service.namespace,
            "labels": {"kubernetes.io/service-name": service.name},
        },
        "addressType": "IPv4",
        "ports": [{"name": service.port_name, "protocol": protocol, "port": target}],
        "endpoints": [
            {
                "addresses": [endpoint.address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": NODE_NAME,
            }
            for endpoint in service.endpoints
        ],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": spec}, endpoint_slice
