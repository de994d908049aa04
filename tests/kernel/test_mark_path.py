"""What is special about the data path ``mark``: who decides, whose bits, twins, restarts, a mask too small.

What both data paths share is held by the other files, which run on both.
"""

import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.proxy import DATA_PATHS, Proxy, wait_until
from tests.kernel.responder import (
    Connection,
    Responder,
    ask_tcp,
    ask_udp,
    new_flow,
    parse,
)
from tests.kernel.snapshot import restore_foreign, snapshot
from tests.kernel.world import NODE4, REMOTE4, SELF4, WEB4, WEB6, World, world

VIP = "10.96.0.80"
PORTS = (
    Port(name="tcp", port=80, target=8080),
    Port(name="udp", port=80, target=8080, protocol="UDP"),
)
NEIGHBOURS = 0x10000
"""A bit that is not ours."""
OURS = 0x3F7F
MASQUERADE = 0x2000


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    with world(data_path="mark", workers=2) as running:
        yield running


def web(built: Topology, *pods: int) -> list[Manifest]:
    """Service web with these pods as endpoints, all by default."""
    chosen = [built.pods[index].address4 for index in pods or range(len(built.pods))]
    return service("web", vips=[VIP], ports=PORTS, endpoints=chosen)


def test_the_mark_alone_translates(cluster: Topology) -> None:
    """Without the fallback's maps, only a marked packet can come to a backend; without ours, none does."""
    node, client = cluster.node.namespace, cluster.client.namespace
    with Proxy(node, web(cluster), data_path="mark") as proxy:
        node.run("nft", "flush map ip nfqproxy slot-count")
        for namespace in (client, node, cluster.pods[0].namespace):
            assert ask_tcp(namespace, VIP, 80).name.startswith("pod-")
            assert ask_udp(namespace, VIP, 80).name.startswith("pod-")
        assert (proxy.packets(), proxy.installed(), proxy.counters()) == (6, 6, {})
        node.run("nft", "flush map ip nfqproxy marked-backends")
        with pytest.raises(ConnectionRefusedError):
            ask_tcp(client, VIP, 80)
        # A hangup puts both back.
        os.kill(proxy.pid, signal.SIGHUP)
        wait_until(
            lambda: all(
                VIP in node.run("nft", "list", "map", "ip", "nfqproxy", name).stdout
                for name in ("marked-backends", "slot-count")
            ),
            "the maps are back",
        )
        node.run("nft", "flush map ip nfqproxy slot-count")
        assert ask_tcp(client, VIP, 80).name.startswith("pod-")
        # A worker that starts anew knows the marks.
        proxy.wait_replaced(proxy.kill_worker())
        assert ask_tcp(client, VIP, 80).name.startswith("pod-")
        assert proxy.installed() == 1


COUNTERS = """\
table ip neighbour {
    counter kept { }
    counter ours { }
    counter routed { }
    chain mark-prerouting {
        type filter hook prerouting priority -160; policy accept;
        meta mark set 0x10000
    }
    chain mark-output {
        type filter hook output priority -160; policy accept;
        meta mark set 0x10000
    }
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state new ip daddr 10.244.0.0/16 meta mark 0x12000 counter name routed
    }
    chain input {
        type filter hook input priority 0; policy accept;
        ct state new tcp dport 8080 meta mark 0x10000 counter name kept
        ct state new meta mark & 0x3f7f != 0 counter name ours
    }
    chain postrouting {
        type filter hook postrouting priority 300; policy accept;
        ct state new tcp dport 8080 meta mark 0x10000 counter name kept
        ct state new meta mark & 0x3f7f != 0 counter name ours
    }
}
"""


def counts(node: Namespace) -> dict[str, int]:
    listing = node.run("nft", "list", "table", "ip", "neighbour").stdout
    found = re.findall(r"counter (\w+) \{\s+packets (\d+)", listing)
    return {name: int(packets) for name, packets in found}


def test_neighbours_keep_their_bits_and_ours_do_not_leave(cluster: Topology) -> None:
    """Each first packet carries another's bit throughout, and none of ours behind POSTROUTING or INPUT."""
    node, client = cluster.node.namespace, cluster.client.namespace
    with (
        Responder() as responder,
        Proxy(
            node,
            [*web(cluster), *service("host", vips=[SELF4], ports=PORTS, endpoints=[NODE4])],
            data_path="mark",
        ) as proxy,
    ):
        responder.serve(node, "host", 8080, NODE4)
        node.run("nft", "-f", "-", stdin=COUNTERS)
        # A chain of a hook with the mark changed by nft is of type filter: nothing is rerouted by it.
        for _ in range(5):
            ask_tcp(client, VIP, 80)
        assert counts(node) == {"kept": 5, "ours": 0, "routed": 5}
        for _ in range(5):
            ask_tcp(node, VIP, 80)
        assert counts(node) == {"kept": 10, "ours": 0, "routed": 5}
        ask_tcp(client, SELF4, 80)
        assert counts(node) == {"kept": 11, "ours": 0, "routed": 5}
        assert proxy.installed() == 11


@pytest.mark.parametrize("origin", ["outside", "node"])
def test_the_number_of_a_backend_does_not_route(cluster: Topology, origin: str) -> None:
    """A rule of others for a low bit of the mark must not catch our packets: numbers are gone by then."""
    node = cluster.node.namespace
    who = node if origin == "node" else cluster.client.namespace
    with Proxy(node, web(cluster), data_path="mark") as proxy:
        # Our three numbers are 1, 2 and 3. By this table nothing would reach a pod.
        node.ip(
            "rule add fwmark 0x1/0x1 lookup 77",
            "rule add fwmark 0x2/0x2 lookup 77",
            "route add default via 192.0.2.253 dev eth0 table 77",
        )
        assert {ask_tcp(who, VIP, 80).name for _ in range(40)} == {p.name for p in cluster.pods}
        assert proxy.installed() == 40


def test_udp_twins_agree_with_two_workers(running: World) -> None:
    """Eight datagrams of each flow wait undecided, at two workers; every flow comes to one backend."""
    # Workers share by addresses: enough pairs of them for two.
    clients = [
        each.namespace for each in (*running.topology.clients, *running.topology.pods_of("n1"))
    ]
    flows = [
        new_flow(client, vip, 80) for client in clients for vip in (WEB4, WEB6) for _ in range(4)
    ]
    before = [worker["packets"] for worker in running.proxy.status()["workers"]]
    try:
        with running.proxy.held_up():
            for number in range(8):
                for flow in flows:
                    flow.send(b"%d" % number)
            wait_until(
                lambda: sum(running.proxy.waiting().values()) == 8 * len(flows),
                "all datagrams wait",
            )
        for flow in flows:
            answers = [flow.recv(200) for _ in range(8)]
            assert len({parse(answer).name for answer in answers}) == 1
            assert sorted(answer[-1:] for answer in answers) == [b"%d" % n for n in range(8)]
    finally:
        for flow in flows:
            flow.close()
    after = [worker["packets"] for worker in running.proxy.status()["workers"]]
    assert all(now > then for now, then in zip(after, before, strict=True)), "both had some"


def test_a_syn_and_its_retransmission_agree(running: World) -> None:
    """Both wait undecided. The connection comes about, and is one."""
    installed = running.proxy.installed()
    with running.proxy.held_up():
        sock = running.client.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.connect_ex((WEB4, 80))
        wait_until(lambda: sum(running.proxy.waiting().values()) == 2, "the SYN waits twice")
    with sock:
        sock.setblocking(True)
        sock.settimeout(5)
        name = parse(sock.recv(200)).name
    entries = running.node.run("conntrack", "-L", "-p", "tcp", "--orig-dst", WEB4).stdout
    (pod,) = (pod for pod in running.topology.pods if pod.name == name)
    assert f"src={pod.address4}" in entries
    assert running.proxy.installed() == installed + 2


def test_a_one_way_flow_is_queued_once(running: World) -> None:
    """No answer ever comes, so conntrack calls every datagram new; the first alone is queued."""
    with (
        running.queues({(Family.IPV4, Protocol.UDP): 1}),
        _silent(running),
        new_flow(running.client, REMOTE4, 80) as sock,
    ):
        for count in (1, 50):
            for _ in range(count):
                sock.send(b"x")
            wait_until(lambda count=count: _passed(running) >= count, "all have passed the node")


@contextmanager
def _silent(running: World) -> Iterator[None]:
    """The backend of service remote hears nothing."""
    pod = running.topology.pods_of("n2")[0].namespace
    rule = ("INPUT", "-p", "udp", "--dport", "8080", "-j", "DROP")
    pod.run("iptables", "-A", *rule)
    try:
        yield
    finally:
        pod.run("iptables", "-D", *rule)


def _passed(running: World) -> int:
    """Datagrams that the backend of service remote has dropped."""
    pod = running.topology.pods_of("n2")[0].namespace
    listing = pod.run("iptables", "-S", "INPUT", "-v").stdout
    found = re.search(r"--dport 8080 -c (\d+)", listing)
    return int(found[1]) if found else 0


def test_a_mask_too_small_leaves_the_rest_to_the_fallback(cluster: Topology) -> None:
    """One bit for numbers: one backend of three has one. All are served, and it is said once."""
    node, client = cluster.node.namespace, cluster.client.namespace
    flags = ("--mark-mask", "0x7000", "--seed", "1")
    with Proxy(node, web(cluster), *flags, data_path="mark") as proxy:
        assert proxy.status()["marks"] == {
            "mask": "0x7000",
            "backends": 2,
            "backends_without_mark": 4,
        }
        assert proxy.log.count("has more backends than markMask 0x7000 has numbers (1): 2") == 2
        names = [ask_tcp(client, VIP, 80).name for _ in range(40)]
        assert set(names) == {pod.name for pod in cluster.pods}
        unmarked = proxy.counters()["unmarked"]
        assert 0 < unmarked < 40
        assert proxy.installed() == 40 - unmarked
        # The one with the number leaves, and another one gets it.
        proxy.follow(web(cluster, 1))
        assert proxy.status()["marks"]["backends_without_mark"] == 0
        assert {ask_tcp(client, VIP, 80).name for _ in range(10)} == {cluster.pods[1].name}
        assert proxy.counters()["unmarked"] == unmarked


def test_numbers_change_hands_without_a_wrong_backend(cluster: Topology) -> None:
    """Endpoints come and go under load with hardly any numbers; a proxy that starts anew counts anew."""
    node, client = cluster.node.namespace, cluster.client.namespace
    with Proxy(node, web(cluster, 0, 1), "--mark-mask", "0x3c00", data_path="mark") as proxy:
        for pods in ((1, 2), (2, 0), (0, 1), (2,), (1,), (0,)) * 2:
            proxy.follow(web(cluster, *pods))
            names = {ask_tcp(client, VIP, 80).name for _ in range(30)}
            assert names == {cluster.pods[index].name for index in pods}
        assert "unmarked" not in proxy.counters()
        elements = node.run("nft", "list", "map", "ip", "nfqproxy", "marked-backends").stdout
        assert len(re.findall(r" : 10\.244\.", elements)) == 2, "gone backends have gone"
        proxy.kill()
        proxy.write(web(cluster, 2, 1))
        proxy.start()
        assert {ask_tcp(client, VIP, 80).name for _ in range(30)} == {
            cluster.pods[index].name for index in (2, 1)
        }


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_source_that_is_kept_is_kept_from_others_rules_too(
    cluster: Topology, data_path: str
) -> None:
    """What a worker decides is not masqueraded by a CNI's rule afterwards."""
    node, pod = cluster.node.namespace, cluster.pods[0]
    node.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    with Proxy(node, web(cluster, 1), data_path=data_path):
        for ask in (ask_tcp, ask_udp):
            assert ask(pod.namespace, VIP, 80).client == pod.address4


@pytest.mark.parametrize("mode", ["replace", "overlay"])
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_data_paths_change_places_and_leave_no_trace(
    cluster: Topology, mode: str, backend: str
) -> None:
    node, client = cluster.node.namespace, cluster.client.namespace
    restore_foreign(node)
    before = snapshot(node)
    flags = ("--iptables", backend) + (("--steer-all",) if mode == "overlay" else ())
    paths: Sequence[str] = ("mark", "ctnetlink", "mark")
    with ExitStack() as stack:
        held = []
        for data_path in paths:
            proxy = stack.enter_context(
                Proxy(node, web(cluster), *flags, data_path=data_path, mode=mode)
            )
            held.append(stack.enter_context(Connection(client, VIP, 80)))
            assert ask_udp(client, VIP, 80).name.startswith("pod-")
            assert (proxy.packets(), proxy.installed()) == (2, 2)
            for connection in held:
                assert connection.echo("still here") == "still here"
            raw = node.run(f"iptables-{backend}", "-t", "raw", "-S").stdout
            assert ("NFQPROXY" in raw) == (data_path == "ctnetlink")
            flows = node.run("ipset", "list", "-name").stdout
            assert ("nfqproxy-flows-4" in flows) == (data_path == "ctnetlink")
            proxy.stop()
        proxy.cleanup()
        after = snapshot(node)
        if backend == "legacy":
            # A table of the legacy back end cannot be unregistered by anybody: they remain, empty.
            for tool in ("iptables-legacy-save", "ip6tables-legacy-save"):
                before[tool] = after[tool] = re.sub(
                    r"(?m)^(\*|:[A-Z]+ |COMMIT).*\n", "", after[tool]
                )
                assert not after[tool]
        assert after == before
