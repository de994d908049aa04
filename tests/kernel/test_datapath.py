"""First."""

from collections.abc import Iterator

import pytest

from nfqproxy.lab.topology import Topology, topology
from tests.kernel.manifests import Port, service
from tests.kernel.proxy import READERS, Proxy
from tests.kernel.responder import Responder, ask_tcp, ask_udp

VIP4, VIP6 = "10.96.0.80", "fd00:10:96::80"


@pytest.fixture(scope="module", params=READERS)
def world(request: pytest.FixtureRequest) -> Iterator[tuple[Topology, Proxy]]:
    with topology() as built, Responder() as responder:
        for pod in built.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        addresses = [a for pod in built.pods for a in (pod.address4, pod.address6)]
        objects = service(
            "web",
            vips=[VIP4, VIP6],
            ports=[
                Port(name="tcp", port=80, target=8080, node_port=30080),
                Port(name="udp", port=80, target=8080, protocol="UDP", node_port=30080),
            ],
            endpoints=addresses,
        )
        with Proxy(built.node.namespace, objects, reader=request.param) as proxy:
            yield built, proxy


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_first(world: tuple[Topology, Proxy], vip: str) -> None:
    built, proxy = world
    for ns in (built.client.namespace, built.node.namespace, built.pods[0].namespace):
        print(ask_tcp(ns, vip, 80), ask_udp(ns, vip, 80))
    print(proxy.status(), proxy.queued())
