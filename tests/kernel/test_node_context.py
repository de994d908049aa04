"""A running proxy follows its node: podCIDR, ServiceCIDRs, zone, addresses; by manifest and by event.

Both data paths where the worker tells clients apart or node ports come and go. ServiceCIDRs are the kernel's sets
alone, zones and primary addresses are in the plans before any data path is asked.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology, topology
from nfqproxy.model import FrontendKey, Protocol
from tests.kernel.manifests import Endpoint, Manifest, Port, service
from tests.kernel.probes import SILENCE, probe
from tests.kernel.proxy import DATA_PATHS, Proxy, wait_until
from tests.kernel.responder import Responder

NODE4, NODE6 = "192.0.2.1", "2001:db8:2::1"
VIP, PORT = "10.96.0.89", 30089
ADDED4, ADDED6, OUTSIDE = "192.0.2.77", "2001:db8:2::77", "198.18.0.77"


@pytest.fixture(scope="module")
def built() -> Iterator[Topology]:
    """Pods 1-11 and 2-11 serve, 1-12 asks."""
    with topology(pods=(2, 1)) as made, Responder() as responder:
        for pod in (made.pods[0], made.pods[2]):
            responder.serve(pod.namespace, pod.name, 8080)
        yield made


def node_object(*pod_cidrs: str, address: str = NODE4, zone: str = "") -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {"podCIDRs": list(pod_cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def service_cidr(*cidrs: str) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": list(cidrs)},
    }


def elsewhere(built: Topology) -> list[Manifest]:
    """externalTrafficPolicy Local, the only endpoint on n2: local pods and n1 get it, nobody else."""
    pod = built.pods[2]
    return service(
        "elsewhere",
        vips=[VIP, "fd00:10:96::89"],
        ports=[Port(port=80, target=8080, protocol="UDP", node_port=PORT)],
        endpoints=[Endpoint(address=a, node="n2") for a in (pod.address4, pod.address6)],
        external_local=True,
    )


class Ask:
    """Datagrams of ever new flows to the node port."""

    def __init__(self) -> None:
        self._port = 21000

    def __call__(
        self, asker: Namespace, address: str, *, source: str = "", port: int = PORT
    ) -> str:
        """ "backend source", or what else came back."""
        self._port += 1
        key = FrontendKey(Protocol.UDP, address, port)
        number = self._port
        return " ".join(asker.call(lambda: probe(key, (source, number))).split()[:2])


@pytest.fixture(scope="module")
def ask() -> Ask:
    """One for all tests: entries of the flows of one outlive it."""
    return Ask()


def unowned_dropped(node: Namespace) -> int:
    listing = node.run("nft", "-j", "list", "counter", "ip", "nfqproxy", "no-owner-dropped").stdout
    (found,) = (each["counter"] for each in json.loads(listing)["nftables"] if "counter" in each)
    return int(found["packets"])


def config(directory: Path, text: str) -> list[str]:
    file = directory / "config.yaml"
    file.write_text(f"kind: NfqproxyConfiguration\n{text}\n")
    return ["--config", str(file)]


def serves(proxy: Proxy, *addresses: str) -> None:
    """Wait until workers and kernel serve node ports on exactly these."""
    wait_until(
        lambda: sorted(proxy.status()["node_port_addresses"]) == sorted(addresses),
        f"node ports are served on {addresses}",
    )


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_another_pod_cidr_is_followed_by_workers_and_fallback(
    built: Topology, tmp_path: Path, ask: Ask, data_path: str
) -> None:
    """No plan changes by it: the detector is another, in the worker, the next worker and the fallback."""
    node, pod = built.node.namespace, built.pods[1]
    served = f"{built.pods[2].name} {pod.address4}"
    flags = config(tmp_path, "detectLocalMode: NodeCIDR")
    start = [*elsewhere(built), node_object("10.244.9.0/24")]
    with Proxy(node, start, *flags, cluster_cidr="", data_path=data_path) as proxy:
        assert ask(pod.namespace, NODE4) == SILENCE
        proxy.follow([*elsewhere(built), node_object("10.244.1.0/24")])
        assert ask(pod.namespace, NODE4) == served
        assert proxy.packets() == 2
        killed = proxy.kill_worker()
        wait_until(lambda: killed not in proxy.worker_pids(), "the worker has gone")
        proxy.wait_ready()
        assert ask(pod.namespace, NODE4) == served
        assert proxy.packets() == 1
        proxy.follow([*elsewhere(built), node_object("10.244.9.0/24")])
        assert ask(pod.namespace, NODE4) == SILENCE
        assert proxy.packets() == 2
        proxy.follow([*elsewhere(built), node_object("10.244.1.0/24")])
        proxy.stop()
        assert ask(pod.namespace, NODE4) == served


def test_service_cidrs_come_and_go(built: Topology, ask: Ask) -> None:
    node, client = built.node.namespace, built.client.namespace
    with Proxy(node, elsewhere(built)) as proxy:
        dropped = []
        for cidrs in ((), ("10.96.0.0/16",), ("10.97.0.0/16",)):
            extra = [service_cidr(*cidrs)] if cidrs else []
            if dropped:
                proxy.follow([*elsewhere(built), *extra])
            ask(client, "10.96.7.7")
            dropped.append(unowned_dropped(node))
        assert dropped == [0, 1, 1]


def test_the_zone_of_the_node_is_followed(built: Topology, ask: Ask) -> None:
    node, client = built.node.namespace, built.client.namespace
    here, there = built.pods[0], built.pods[2]
    hinted = service(
        "zoned",
        vips=[VIP],
        ports=[Port(port=80, target=8080, protocol="UDP")],
        endpoints=[here.address4, there.address4],
    )
    for endpoint, zone in zip(hinted[1]["endpoints"], ("a", "b"), strict=True):
        endpoint["hints"] = {"forZones": [{"name": zone}]}
    with Proxy(node, [*hinted, node_object(zone="a")]) as proxy:
        for zone, pod in (("a", here), ("b", there)):
            if zone == "b":
                proxy.follow([*hinted, node_object(zone=zone)])
            found = {ask(client, VIP, port=80).split()[0] for _ in range(10)}
            assert found == {pod.name}


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_node_ports_follow_the_addresses_of_interfaces(
    built: Topology, tmp_path: Path, ask: Ask, data_path: str
) -> None:
    """Inside nodePortAddresses, by address events alone; and so does who counts as this node."""
    node, client = built.node.namespace, built.client.namespace
    there = built.pods[2].name
    own4, own6 = built.client.address4, built.client.address6
    objects = [
        *elsewhere(built),
        *service(
            "anywhere",
            vips=["10.96.0.90", "fd00:10:96::90"],
            ports=[Port(port=80, target=8080, protocol="UDP", node_port=PORT + 1)],
            endpoints=[built.pods[0].address4, built.pods[0].address6],
            external_local=True,
        ),
    ]
    balanced = next(item for item in objects if item["metadata"]["name"] == "anywhere")
    balanced["spec"] |= {"type": "LoadBalancer", "healthCheckNodePort": PORT + 2}
    here = built.pods[0].name
    flags = config(tmp_path, "nodePortAddresses: [192.0.2.0/24, '2001:db8:2::/64']")

    with Proxy(node, objects, *flags, data_path=data_path) as proxy:
        serves(proxy, NODE4, NODE6)
        # Not the node's yet: whoever has this address is from outside.
        client.ip(f"addr add {ADDED4}/32 dev eth0")
        assert ask(client, NODE4, source=ADDED4) == SILENCE
        client.ip(f"addr del {ADDED4}/32 dev eth0")
        node.ip(
            f"addr add {OUTSIDE}/32 dev eth0",
            f"addr add {ADDED4}/24 dev eth0",
            f"addr add {ADDED6}/64 dev eth0 nodad",
        )
        serves(proxy, NODE4, NODE6, ADDED4, ADDED6)
        proxy_packets = proxy.packets()
        assert ask(client, ADDED4, port=PORT + 1) == f"{here} {own4}"
        assert ask(client, ADDED6, port=PORT + 1) == f"{here} {own6}"
        assert ask(node, NODE4, source=ADDED4) == f"{there} {NODE4}"
        assert proxy.packets() == proxy_packets + 3
        client.wait_for_port(ADDED4, PORT + 2)  # the load balancer's health check
        listing = node.run("ipset", "list", "nfqproxy-frontends-4").stdout
        assert f"{ADDED4},udp:{PORT}" in listing
        assert OUTSIDE not in listing
        node.ip(f"addr del {ADDED4}/24 dev eth0", f"addr del {ADDED6}/64 dev eth0")
        serves(proxy, NODE4, NODE6)
        assert ADDED4 not in node.run("ipset", "list", "nfqproxy-frontends-4").stdout
        client.ip(f"addr add {ADDED4}/32 dev eth0")
        node.ip("neigh flush dev eth0")
        assert ask(client, NODE4, source=ADDED4) == SILENCE
        client.ip(f"addr del {ADDED4}/32 dev eth0")
        # The same by the fallback, which holds what was published last.
        node.ip(f"addr add {ADDED4}/24 dev eth0")
        serves(proxy, NODE4, NODE6, ADDED4)
        proxy.stop()
        assert ask(client, ADDED4, port=PORT + 1) == f"{here} {own4}"
        assert ask(node, NODE4, source=ADDED4) == f"{there} {NODE4}"
        node.ip(f"addr del {ADDED4}/24 dev eth0", f"addr del {OUTSIDE}/32 dev eth0")


def test_primary_addresses_without_a_node_object_are_those_with_which_the_node_speaks(
    ask: Ask,
) -> None:
    """A default route that is away for a moment takes no node port along; another address does."""
    with topology(pods=(1, 1)) as made, Responder() as responder:
        node, client, pod = made.node.namespace, made.client.namespace, made.pods[1]
        responder.serve(pod.namespace, pod.name, 8080)
        objects = service(
            "web",
            vips=[VIP],
            ports=[Port(port=80, target=8080, protocol="UDP", node_port=PORT)],
            endpoints=[pod.address4],
        )
        with Proxy(node, objects) as proxy:
            serves(proxy, NODE4, NODE6)
            # The address that app._ANYWHERE asks a route for is one of this link.
            node.ip("route add unreachable 192.0.2.254/32")
            # Seen to be followed by what comes behind it: the IPv6 address is another.
            node.ip(f"addr add {ADDED6}/64 dev eth0 nodad", f"addr del {NODE6}/64 dev eth0")
            serves(proxy, NODE4, ADDED6)
            node.ip(
                f"addr del {NODE4}/24 dev eth0",
                f"addr add {ADDED4}/24 dev eth0",
                "route del unreachable 192.0.2.254/32",
                f"route replace 10.244.2.0/24 via {made.nodes[1].address4}",
            )
            serves(proxy, ADDED4, ADDED6)
            assert ask(client, ADDED4) == f"{pod.name} {ADDED4}"
