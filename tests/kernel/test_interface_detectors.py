"""Pods told by the interface they come in by: BridgeInterface and InterfaceNamePrefix.

Node ports with externalTrafficPolicy Local show the class of a client: a local pod draws from all
endpoints, everybody from outside from the local ones. A pod of another node is from outside here, though
the ClusterCIDR detector would call it a pod (SEMANTICS 2.4, vector 33). The worker and, when it is gone,
the fallback must agree.
"""

import itertools
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nfqproxy.kernel.links import Links
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab import addresses
from nfqproxy.lab.topology import Pod, Topology, topology
from nfqproxy.model import FrontendKey, Protocol
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.probes import SILENCE, probe
from tests.kernel.proxy import RUNS, Proxy, wait_until
from tests.kernel.responder import Responder
from tests.kernel.world import NODE4, NODE6
from tests.kernel.world import addresses as endpoints_of

MIXED, ELSEWHERE = 30087, 30088
"""Node ports of Services with endpoints on both nodes, and on the other node alone."""
VIPS = {MIXED: ["10.96.0.87", "fd00:10:96::87"], ELSEWHERE: ["10.96.0.88", "fd00:10:96::88"]}
BRIDGE = "cni0"
_CONFIG = """\
kind: NfqproxyConfiguration
detectLocalMode: {mode}
detectLocal: {local}
"""
_DETECTORS = {
    "bridge": ("BridgeInterface", "{bridgeInterface: cni0}"),
    "prefix": ("InterfaceNamePrefix", "{interfaceNamePrefix: pod}"),
}
_ports = itertools.count(20000)


@pytest.fixture(scope="module")
def built() -> Iterator[Topology]:
    """Pods 1-11 and 2-11 serve; 1-12 (by veth), 1-13 (by bridge) and 2-12 ask, and so do c1 and n1."""
    with topology(pods=(3, 2)) as made, Responder() as responder:
        for pod in (made.pods_of("n1")[0], made.pods_of("n2")[0]):
            responder.serve(pod.namespace, pod.name, 8080)
        _put_on_bridge(made.node.namespace, made.pods_of("n1")[2])
        yield made


def _put_on_bridge(node: Namespace, pod: Pod) -> None:
    """As a CNI with a bridge has it: the node speaks on the bridge, the veth is a port."""
    mac = addresses.POD_GATEWAY_MAC
    node.ip(
        f"link add {BRIDGE} address {mac} type bridge mcast_snooping 0",
        f"link set {BRIDGE} up",
        f"addr add {addresses.POD_GATEWAY6}/64 dev {BRIDGE} nodad",
        f"addr flush dev {pod.host_device}",
        f"link set {pod.host_device} master {BRIDGE}",
        f"route replace {pod.address4}/32 dev {BRIDGE} scope link",
        f"route replace {pod.address6}/128 dev {BRIDGE}",
    )
    node.sysctl(
        {
            f"net/ipv4/conf/{BRIDGE}/proxy_arp": 1,
            f"net/ipv4/neigh/{BRIDGE}/proxy_delay": 0,
        }
    )


def services(built: Topology) -> list[Manifest]:
    here, there = built.pods_of("n1")[0], built.pods_of("n2")[0]
    return [
        item
        for number, members in ((MIXED, (here, there)), (ELSEWHERE, (there,)))
        for item in service(
            f"s{number}",
            vips=VIPS[number],
            ports=[
                Port(name=name, port=80, target=8080, node_port=number, protocol=name.upper())
                for name in ("tcp", "udp")
            ],
            endpoints=endpoints_of(members),
            external_local=True,
        )
    ]


def serving(built: Topology, directory: Path, detector: str, run: tuple[str, str]) -> Proxy:
    mode, local = _DETECTORS[detector]
    reader, data_path = run
    config = directory / "config.yaml"
    config.write_text(_CONFIG.format(mode=mode, local=local))
    return Proxy(
        built.node.namespace,
        services(built),
        *("--config", str(config)),
        reader=reader,
        data_path=data_path,
        cluster_cidr="",
    )


def asked(
    namespace: Namespace, address: str, port: int, protocol: Protocol, times: int
) -> set[str]:
    """ "backend source" or SILENCE of each of so many first packets."""
    key = FrontendKey(protocol, address, port)

    def ask() -> set[str]:
        # A port that was free for the kernel to give again would make a datagram one of an old flow.
        sources = [("", next(_ports)) if protocol is Protocol.UDP else None for _ in range(times)]
        return {" ".join(probe(key, source).split()[:2]) for source in sources}

    return namespace.call(ask)


def experience(built: Topology) -> dict[tuple[str, int, str, Protocol], set[str]]:
    """What every asker gets at both node ports, in both families: all at once."""
    one, two = built.pods_of("n1"), built.pods_of("n2")
    askers = {
        "client": built.client.namespace,
        "node": built.node.namespace,
        "veth": one[1].namespace,
        "bridge": one[2].namespace,
        "other": two[1].namespace,
    }
    # Silence over IPv6 is awaited for long with TCP; a datagram tells as much.
    asks = [(NODE4, Protocol.TCP), (NODE4, Protocol.UDP), (NODE6, Protocol.UDP)]
    with ThreadPoolExecutor(len(askers)) as pool:
        runs = {
            (who, port, address, protocol): pool.submit(
                asked, namespace, address, port, protocol, 24 if port == MIXED else 1
            )
            for who, namespace in askers.items()
            for address, protocol in asks
            for port in (MIXED, ELSEWHERE)
        }
        return {key: run.result() for key, run in runs.items()}


def expected(built: Topology, pods: set[str]) -> dict[tuple[str, int, str, Protocol], set[str]]:
    """The same, if askers of these names are local pods."""
    (here, veth, bridge), (there, other) = built.pods_of("n1"), built.pods_of("n2")
    found = {}
    for address in (NODE4, NODE6):
        six = ":" in address
        own = {
            "client": built.client.address6 if six else built.client.address4,
            "node": address,
            **{
                who: pod.address6 if six else pod.address4
                for who, pod in (("veth", veth), ("bridge", bridge), ("other", other))
            },
        }
        for who, source in own.items():
            insider = who in pods or who == "node"
            everywhere = {f"{here.name} {source}", f"{there.name} {source}"}
            results = {
                MIXED: everywhere if insider else {f"{here.name} {source}"},
                ELSEWHERE: {f"{there.name} {source}"} if insider else {SILENCE},
            }
            for protocol in (Protocol.UDP,) if six else (Protocol.TCP, Protocol.UDP):
                for port, result in results.items():
                    found[who, port, address, protocol] = result
    return found


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("detector", list(_DETECTORS))
def test_worker_and_fallback_tell_pods_by_their_interface(
    built: Topology, tmp_path: Path, detector: str, run: tuple[str, str]
) -> None:
    # The bridge's port is called pod13, but what arrives by it arrives by the bridge: as iptables' -i.
    right = expected(built, {"bridge"} if detector == "bridge" else {"veth"})
    with serving(built, tmp_path, detector, run) as proxy:
        assert experience(built) == right
        # All of it was the worker's doing; a TCP client may have sent its SYN again.
        assert proxy.packets() >= 25 * 15
        assert "unknown_frontend" not in proxy.counters()
        proxy.stop()
        assert experience(built) == right


@pytest.mark.parametrize("run", RUNS)
def test_with_br_netfilter_the_bridge_is_still_the_interface(
    built: Topology, tmp_path: Path, run: tuple[str, str]
) -> None:
    """Then the port is told as well, as NFQA_IFINDEX_PHYSINDEV, and the layout of messages differs."""
    node, pod = built.node.namespace, built.pods_of("n1")[2]
    switches = [f"net/bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    if not node.call(lambda: Path("/proc/sys", switches[0]).exists()):
        pytest.skip("this kernel has no br_netfilter")
    before = {switch: node.read_sysctl(switch) for switch in switches}
    with serving(built, tmp_path, "bridge", run) as proxy:
        node.sysctl(dict.fromkeys(switches, 1))
        try:
            for address in (NODE4, NODE6):
                source = pod.address6 if ":" in address else pod.address4
                for protocol in (Protocol.TCP, Protocol.UDP):
                    found = asked(pod.namespace, address, ELSEWHERE, protocol, 1)
                    assert found == {f"{built.pods_of('n2')[0].name} {source}"}
            assert proxy.packets() == 4
        finally:
            node.sysctl(before)


def _replace_link(node: Namespace, pod: Pod, old: str, new: str, index: int) -> None:
    """Another veth under the same index, for IPv4."""
    node.ip(
        f"link del {old}",
        f"link add name {new} index {index} address {addresses.POD_GATEWAY_MAC} type veth"
        f" peer name eth0 netns {pod.namespace.name}",
        f"link set {new} up",
        f"route add {pod.address4}/32 dev {new} scope link",
    )
    node.sysctl({f"net/ipv4/conf/{new}/proxy_arp": 1, f"net/ipv4/neigh/{new}/proxy_delay": 0})
    pod.namespace.ip(
        "link set eth0 up",
        f"addr add {pod.address4}/32 dev eth0",
        f"route add {addresses.POD_GATEWAY4} dev eth0 scope link",
        f"route add default via {addresses.POD_GATEWAY4}",
    )
    # The kernel's link watch runs later than the commands: until it has, whatever the node sends is lost, its
    # answer to the pod's first ARP request too, and the pod asks again only after a second.
    wait_until(
        lambda: "state UP" in node.run("ip", "link", "show", "dev", new).stdout,
        f"{new} carries packets",
    )


@pytest.mark.parametrize("run", RUNS)
def test_an_interface_index_that_is_given_out_again_takes_its_new_name(
    built: Topology, tmp_path: Path, run: tuple[str, str]
) -> None:
    """A pod goes, and what comes next under its index is no pod; and the other way round."""
    node, pod = built.node.namespace, built.pods_of("n1")[1]
    index = node.call(lambda: socket.if_nametoindex(pod.host_device))
    there = built.pods_of("n2")[0].name
    with serving(built, tmp_path, "prefix", run) as proxy:
        name = pod.host_device
        for fresh in (None, "uplink12", pod.host_device):
            if fresh:
                _replace_link(node, pod, name, fresh, index)
                name = fresh
            found = asked(pod.namespace, NODE4, ELSEWHERE, Protocol.UDP, 1)
            assert found == ({SILENCE} if fresh == "uplink12" else {f"{there} {pod.address4}"})
        assert proxy.packets() == 3


def test_links_tell_names_and_changes(built: Topology) -> None:
    node = built.node.namespace

    links = Links(lambda arrival: arrival)
    try:
        assert node.call(links.changed)
        assert not links.changed()
        node.ip("link add one type bridge")
        assert links.changed()
        assert not links.changed()
        number = node.call(lambda: socket.if_nametoindex("one"))
        assert node.call(lambda: (links.name(number), links.name(0))) == ("one", "")
        node.ip("link set one name two")
        assert links.changed()
        assert node.call(lambda: links.name(number)) == "two"
        node.ip("link del two")
        assert links.changed()
        assert node.call(lambda: links.name(number)) is None
    finally:
        links.close()
