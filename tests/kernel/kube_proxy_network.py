"""Nodes n1 and n2 with the rules of a real kube-proxy on n1, and pods that bear the addresses in them."""

from collections.abc import Iterator
from contextlib import contextmanager

from nfqproxy.lab.topology import Topology, topology
from tests.kernel.responder import Responder
from tests.kernel.snapshot import restore_kube_proxy

WEB = "10.96.0.10"
"""default/web of the dump -> 10.244.1.10, 10.244.1.11, 10.244.2.10, port 8080."""
SHOP = "10.96.0.20"
"""default/shop -> 10.244.1.20, 10.244.2.20, port 8080; node port 30080."""
DNS = "10.96.0.53"
"""kube-system/kube-dns, UDP 53 -> 10.244.1.53, 10.244.2.53."""
DUAL6 = "fd00:10:96::70"
"""default/dual -> fd00:10:244:1::70, port 8080."""


@contextmanager
def network() -> Iterator[Topology]:
    """The first pod of each node bears the addresses that the dump's rules translate to."""
    with topology(pods=(2, 1)) as built:
        for pod, node, number in (
            (built.pods[0], built.nodes[0], 1),
            (built.pods[2], built.nodes[1], 2),
        ):
            extra = [f"10.244.{number}.{last}" for last in (10, 11, 20, 53)]
            extra = [address for address in extra if address != pod.address4]
            pod.namespace.ip(*(f"addr add {address}/32 dev eth0" for address in extra))
            node.namespace.ip(
                *(f"route add {address}/32 dev {pod.host_device} scope link" for address in extra)
            )
        pod, node = built.pods[0], built.node
        pod.namespace.ip("addr add fd00:10:244:1::70/128 dev eth0 nodad")
        node.namespace.ip(f"route add fd00:10:244:1::70/128 dev {pod.host_device}")
        restore_kube_proxy(built.node.namespace)
        yield built


@contextmanager
def served(network: Topology) -> Iterator[Topology]:
    """The same with servers in all pods."""
    with Responder() as responder:
        for pod in network.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        for pod, address in ((network.pods[0], "10.244.1.53"), (network.pods[2], "10.244.2.53")):
            responder.serve(pod.namespace, pod.name, 53, address)
        yield network
