"""The Services of the lab with weights: ``web`` (TCP) and ``dns`` (UDP), dual stack."""

from collections.abc import Sequence

from nfqproxy.lab import addresses as plan
from nfqproxy.lab.objects import Endpoint, Port, Service, node_object, to_yaml
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

_WEB, _DNS = 80, 53
WEB_VIP4, WEB_VIP6 = plan.service4(_WEB), plan.service6(_WEB)
DNS_VIP4, DNS_VIP6 = plan.service4(_DNS), plan.service6(_DNS)
NODE_PORT = 30080
"""The web Service's node port."""


def backend_name(index: int) -> str:
    """``backend-1`` for the first pod: its pod name in the manifests, and what its servers answer."""
    return f"backend-{index + 1}"


def manifest(node: Node, pods: Sequence[Pod], weights: Sequence[int]) -> str:
    """A YAML stream: Node, the Services, one EndpointSlice per Service and family."""
    objects = [node_object(node)]
    web = Port(name="http", port=80, target=8080, node_port=NODE_PORT)
    dns = Port(name="dns", port=53, target=53, protocol="UDP")
    for name, number, port in (("web", _WEB, web), ("dns", _DNS, dns)):
        service = Service(
            name=name,
            number=number,
            ports=(port,),
            endpoints=tuple(Endpoint(pod=pod, name=backend_name(i)) for i, pod in enumerate(pods)),
            weights={backend_name(i): weight for i, weight in enumerate(weights)},
        )
        objects += service.objects()
    return to_yaml(objects)
