"""The measured Service as Kubernetes objects, for ``nfqproxy run --manifests``."""

import json

from bench.world import BACKEND_PORT, NODE_ADDRESS, NODE_NAME, POD_CIDR, PORT, VIP, World

Json = dict[str, object]


def manifests(world: World) -> str:
    """One ``kind: List`` with the Node, the Service with its weights, and its EndpointSlice."""
    weights = json.dumps({backend.address: backend.weight for backend in world.backends})
    node: Json = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE_NAME},
        "spec": {"podCIDR": POD_CIDR, "podCIDRs": [POD_CIDR]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}]},
    }
    service: Json = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "web",
            "namespace": "default",
            "annotations": {"nfqproxy.io/weights": weights},
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": VIP,
            "clusterIPs": [VIP],
            "ipFamilies": ["IPv4"],
            "ports": [
                {"name": "http", "protocol": "TCP", "port": PORT, "targetPort": BACKEND_PORT}
            ],
        },
    }
    endpoint_slice: Json = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": BACKEND_PORT}],
        "endpoints": [
            {
                "addresses": [backend.address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": NODE_NAME,
            }
            for backend in world.backends
        ],
    }
    items = [node, service, endpoint_slice]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1)
