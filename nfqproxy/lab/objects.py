"""Kubernetes objects of a lab from a few words: Services with their slices, Nodes, the ServiceCIDR."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from msgspec import Struct

from nfqproxy.lab import addresses as plan
from nfqproxy.lab.topology import Node, Pod

__all__ = ["Endpoint", "Object", "Port", "Service", "node_object", "service_cidr", "to_yaml"]

Object = dict[str, Any]
"""One manifest."""


class Port(Struct, frozen=True, kw_only=True):
    """One port of a Service."""

    name: str
    port: int
    target: int
    """The port its backends listen on."""
    protocol: str = "TCP"
    node_port: int = 0
    """0: none."""


class Endpoint(Struct, frozen=True, kw_only=True):
    """A pod behind a Service, by both its addresses."""

    pod: Pod
    name: str = ""
    """The pod's name in the manifests; empty: the one it has in the topology."""
    ready: bool = True
    serving: bool = True
    terminating: bool = False


class Service(Struct, frozen=True, kw_only=True):
    """A dual-stack Service and what is behind it."""

    name: str
    number: int
    """Last part of its cluster IPs (addresses.py)."""
    ports: tuple[Port, ...]
    endpoints: tuple[Endpoint, ...]
    spec: Mapping[str, object] = {}
    """Further fields of its spec, or others in place of the usual ones."""
    has_load_balancer: bool = False
    """Whether a load balancer has given it the addresses of its number."""
    weights: Mapping[str, int] | None = None
    """``nfqproxy.io/weights``."""

    @property
    def cluster_ips(self) -> tuple[str, str]:
        """IPv4, IPv6."""
        return plan.service4(self.number), plan.service6(self.number)

    @property
    def load_balancer_ips(self) -> tuple[str, str]:
        """IPv4, IPv6; its own only if it has a load balancer."""
        return plan.load_balancer4(self.number), plan.load_balancer6(self.number)

    def objects(self) -> list[Object]:
        """The Service, and one EndpointSlice per family if it has endpoints."""
        metadata: Object = {"name": self.name, "namespace": "lab"}
        if self.weights is not None:
            metadata["annotations"] = {"nfqproxy.io/weights": json.dumps(dict(self.weights))}
        service: Object = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": self._kind(),
                "ipFamilyPolicy": "RequireDualStack",
                "ipFamilies": ["IPv4", "IPv6"],
                "clusterIP": self.cluster_ips[0],
                "clusterIPs": list(self.cluster_ips),
                "selector": {"app": self.name},
                "ports": [_service_port(port) for port in self.ports],
                **self.spec,
            },
        }
        if self.has_load_balancer:
            ingress = [{"ip": address} for address in self.load_balancer_ips]
            service["status"] = {"loadBalancer": {"ingress": ingress}}
        families = ("IPv4", "IPv6") if self.endpoints else ()
        return [service, *(self._slice(family) for family in families)]

    def _kind(self) -> str:
        if self.has_load_balancer:
            return "LoadBalancer"
        return "NodePort" if any(port.node_port for port in self.ports) else "ClusterIP"

    def _slice(self, family: str) -> Object:
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{self.name}-{family.lower()}",
                "namespace": "lab",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family,
            "ports": [
                {"name": port.name, "protocol": port.protocol, "port": port.target}
                for port in self.ports
            ],
            "endpoints": [
                {
                    "addresses": [end.pod.address6 if family == "IPv6" else end.pod.address4],
                    "conditions": {
                        "ready": end.ready,
                        "serving": end.serving,
                        "terminating": end.terminating,
                    },
                    "nodeName": end.pod.node,
                    "targetRef": {"kind": "Pod", "name": end.name or end.pod.name},
                }
                for end in self.endpoints
            ],
        }


def _service_port(port: Port) -> Object:
    written: Object = {
        "name": port.name,
        "protocol": port.protocol,
        "port": port.port,
        "targetPort": port.target,
    }
    if port.node_port:
        written["nodePort"] = port.node_port
    return written


def node_object(node: Node) -> Object:
    """A Node with both its addresses."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": address}
                for address in (node.address4, node.address6)
            ]
        },
    }


def service_cidr() -> Object:
    """The networks all cluster IPs are taken from."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [plan.SERVICES4, plan.SERVICES6]},
    }


def to_yaml(objects: Sequence[Object]) -> str:
    """A YAML stream."""
    return yaml.safe_dump_all(objects, sort_keys=False, default_flow_style=None, width=100)
