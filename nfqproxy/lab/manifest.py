"""The lab's Services as Kubernetes manifests: ``web`` (TCP) and ``dns`` (UDP), dual stack, weighted."""

import json
from collections.abc import Mapping, Sequence

import yaml

from nfqproxy.lab.topology import Node, Pod

__all__ = [
    "DNS_VIP4",
    "DNS_VIP6",
    "NODE_PORT",
    "WEB_VIP4",
    "WEB_VIP6",
    "backend_name",
    "manifest",
]

WEB_VIP4, WEB_VIP6 = "10.96.0.80", "fd00:10:96::80"
DNS_VIP4, DNS_VIP6 = "10.96.0.53", "fd00:10:96::53"
NODE_PORT = 30080
"""The web Service's node port."""


def backend_name(index: int) -> str:
    """``backend-1`` for the first pod: its pod name in the manifests, and what its servers answer."""
    return f"backend-{index + 1}"


def manifest(node: Node, pods: Sequence[Pod], weights: Sequence[int]) -> str:
    """A YAML stream: Node, the Services, one EndpointSlice per Service and family."""
    by_name = {backend_name(i): weight for i, weight in enumerate(weights)}
    web = {"name": "http", "protocol": "TCP", "port": 80}
    dns = {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 53}
    documents: list[Mapping[str, object]] = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": node.address4},
                    {"type": "InternalIP", "address": node.address6},
                ]
            },
        },
        _service(
            "web",
            (WEB_VIP4, WEB_VIP6),
            web | {"targetPort": 8080, "nodePort": NODE_PORT},
            by_name,
            kind="NodePort",
        ),
        _service("dns", (DNS_VIP4, DNS_VIP6), dns, by_name),
    ]
    for service, port, target in (("web", web, 8080), ("dns", dns, 53)):
        for family, addresses in (
            ("IPv4", [pod.address4 for pod in pods]),
            ("IPv6", [pod.address6 for pod in pods]),
        ):
            documents.append(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{service}-{family.lower()}",
                        "namespace": "lab",
                        "labels": {"kubernetes.io/service-name": service},
                    },
                    "addressType": family,
                    "ports": [{"name": port["name"], "protocol": port["protocol"], "port": target}],
                    "endpoints": [
                        {
                            "addresses": [address],
                            "conditions": {"ready": True},
                            "nodeName": pod.node,
                            "targetRef": {"kind": "Pod", "name": backend_name(i)},
                        }
                        for i, (pod, address) in enumerate(zip(pods, addresses, strict=True))
                    ],
                }
            )
    return yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=None, width=100)


def _service(
    name: str,
    vips: tuple[str, str],
    port: Mapping[str, object],
    weights: Mapping[str, int],
    kind: str = "ClusterIP",
) -> Mapping[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": "lab",
            "annotations": {"nfqproxy.io/weights": json.dumps(weights)},
        },
        "spec": {
            "type": kind,
            "ipFamilyPolicy": "RequireDualStack",
            "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": vips[0],
            "clusterIPs": list(vips),
            "selector": {"app": name},
            "ports": [port],
        },
    }
