"""Beside a real kube-proxy: its rules as it wrote them, nfqproxy on top, and nfqproxy gone."""

import re
from collections.abc import Iterator

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.jobs import Target, TcpJob
from nfqproxy.lab.load_process import LoadProcess, run_load
from nfqproxy.lab.retransmits import syn_retransmits
from nfqproxy.lab.servers import server_directory, start_web
from nfqproxy.lab.topology import Topology
from nfqproxy.model import Family, Protocol
from tests.kernel.kube_proxy_network import DNS, DUAL6, SHOP, WEB, network, served
from tests.kernel.manifests import Port, service
from tests.kernel.proxy import DATA_PATHS, RUNS, Proxy, run_cli, wait_until
from tests.kernel.responder import Connection, ask_tcp, ask_udp
from tests.kernel.snapshot import shared_objects, snapshot


@pytest.fixture(name="network")
def network_of_kube_proxy() -> Iterator[Topology]:
    with network() as built:
        yield built


@pytest.fixture
def cluster(network: Topology) -> Iterator[Topology]:
    with served(network) as built:
        yield built


def kube_services(node: Namespace) -> int:
    """Packets that kube-proxy's nat rules for Services have matched, both families."""
    total = 0
    for tool in ("iptables", "ip6tables"):
        listing = node.run(tool, *["-t", "nat", "-S", "KUBE-SERVICES", "-v"]).stdout
        listing += node.run(tool, *["-t", "nat", "-S", "KUBE-NODEPORTS", "-v"]).stdout
        rules = re.findall(r" -c (\d+) \d+ -j KUBE-(?:SVC|SVL|EXT|FW)-", listing)
        total += sum(map(int, rules))
    return total


def ask_all(built: Topology, namespace: Namespace, count: int = 10) -> int:
    """Connections and datagrams to four Services and a node port; returns how many."""
    for _ in range(count):
        ask_tcp(namespace, WEB, 80)
        ask_tcp(namespace, SHOP, 80)
        ask_tcp(namespace, DUAL6, 80)
        ask_udp(namespace, DNS, 53)
        ask_tcp(namespace, built.node.address4, 30080)
    return 5 * count


@pytest.mark.parametrize("run", RUNS)
def test_steer_all_decides_everything_and_kube_proxy_takes_over(
    cluster: Topology, run: tuple[str, str]
) -> None:
    reader, data_path = run
    node, client = cluster.node.namespace, cluster.client.namespace
    before = snapshot(node)
    kube = kube_services(node)
    count = ask_all(cluster, client)
    assert kube_services(node) == kube + count, "kube-proxy's rules serve by themselves"
    with Proxy(
        node, shared_objects(), "--steer-all", mode="overlay", reader=reader, data_path=data_path
    ) as proxy:
        kube = kube_services(node)
        sources = (client, node, cluster.pods[1].namespace)
        count = sum(ask_all(cluster, namespace) for namespace in sources)
        assert proxy.packets() == count
        assert sum(proxy.queued().values()) == count
        assert proxy.counters() == {}
        assert kube_services(node) == kube
        with Connection(client, WEB, 80) as held:
            proxy.stop()
            count = ask_all(cluster, client)
            assert kube_services(node) == kube + count
            assert held.echo("established") == "established"
            proxy.cleanup()
            assert snapshot(node) == before
            assert held.echo("still") == "still"
        ask_all(cluster, node)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_without_steer_all_only_labelled_services_are_steered(
    cluster: Topology, data_path: str
) -> None:
    node, client = cluster.node.namespace, cluster.client.namespace
    items = shared_objects()
    for item in items:
        if item["kind"] == "Service" and item["metadata"]["name"] == "shop":
            item["metadata"]["labels"] = {"nfqproxy.io/steer": "true"}
    with Proxy(node, items, mode="overlay", data_path=data_path) as proxy:
        assert proxy.status()["services"] == 1
        kube = kube_services(node)
        for _ in range(10):
            ask_tcp(client, SHOP, 80)
            ask_tcp(client, cluster.node.address4, 30080)
        assert (proxy.packets(), kube_services(node)) == (20, kube)
        for _ in range(10):
            ask_tcp(client, WEB, 80)
            ask_udp(client, DNS, 53)
        assert (proxy.packets(), kube_services(node)) == (20, kube + 20)
        # The label goes, and kube-proxy has it again; another comes by annotation.
        for item in items:
            if item["kind"] == "Service" and item["metadata"]["name"] in ("shop", "web"):
                item["metadata"]["labels"] = {}
                if item["metadata"]["name"] == "web":
                    item["metadata"]["annotations"] = {"nfqproxy.io/steer": "true"}
        proxy.follow(items)
        for _ in range(10):
            ask_tcp(client, SHOP, 80)
            ask_tcp(client, WEB, 80)
        assert (proxy.packets(), kube_services(node)) == (30, kube + 30)
        proxy.stop()


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_weights_apply_to_services_of_kube_proxy(cluster: Topology, data_path: str) -> None:
    """What an overlay is for: kube-proxy knows no weights."""
    node, client = cluster.node.namespace, cluster.client.namespace
    weighted = service(
        "web",
        vips=[WEB],
        ports=[Port(name="http", port=80, target=8080)],
        endpoints=["10.244.1.10", "10.244.2.10"],
        weights={"10.244.1.10": 0, "10.244.2.10": 1},
    )
    with Proxy(node, weighted, "--steer-all", mode="overlay", data_path=data_path) as proxy:
        assert {ask_tcp(client, WEB, 80).name for _ in range(20)} == {cluster.pods[2].name}
        proxy.stop()


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_worker_costs_no_connection(network: Topology, run: tuple[str, str]) -> None:
    reader, data_path = run
    """SIGKILL under load: kube-proxy's rules serve until the next worker is there."""
    node, client = network.node.namespace, network.client.namespace
    with (
        server_directory() as directory,
        Proxy(
            node,
            shared_objects(),
            "--steer-all",
            mode="overlay",
            reader=reader,
            data_path=data_path,
        ) as proxy,
    ):
        for pod in network.pods:
            start_web(pod, directory)
        target = Target("web", WEB, 80)
        kube, retransmits = kube_services(node), syn_retransmits(client)
        assert run_load(client, TcpJob(targets=(target,), connections=500)).targets[0].ok == 500
        assert kube_services(node) == kube
        job = TcpJob(targets=(target,), connections=4000, rate=1500.0, concurrency=256)
        load = LoadProcess(client, job)
        for round_number in range(1, 4):
            decided = proxy.packets()
            wait_until(lambda decided=decided: proxy.packets() >= decided + 200, "load is decided")
            victim = proxy.kill_worker()
            wait_until(
                lambda n=round_number: (
                    (worker := proxy.status()["workers"][0])["restarts"] >= n and worker["ready"]
                ),
                "another worker is ready",
            )
            assert proxy.worker_pids() != [victim]
        part = load.wait().targets[0]
        assert (part.ok, part.failed, part.errors) == (4000, 0, {})
        queued = proxy.queued()[Family.IPV4, Protocol.TCP]
        assert queued == 4500 + syn_retransmits(client) - retransmits
        shown = run_cli(node, "status")
        assert "3 restarts, the last because" in shown.stdout
        proxy.stop()
