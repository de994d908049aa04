"""What the proxy leaves on a node: nothing after cleanup, a serving fallback before, no rule per Service."""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from nfqproxy.kernel.counters import queue_statistics
from nfqproxy.kernel.netns import ProcessRef
from nfqproxy.lab.topology import Topology, topology
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.proxy import READERS, Proxy, run_cli, wait_until
from tests.kernel.responder import Connection, Responder, ask_tcp, ask_udp
from tests.kernel.snapshot import (
    SHARED_DATA,
    programmed,
    restore_foreign,
    restore_kube_proxy,
    snapshot,
)
from tests.kernel.world import addresses

VIP4, VIP6 = "10.96.0.80", "fd00:10:96::80"
PORTS = (
    Port(name="tcp", port=80, target=8080, node_port=30123),
    Port(name="udp", port=80, target=8080, protocol="UDP"),
)


@pytest.fixture
def cluster() -> Iterator[Topology]:
    """A node with the rules of kube-proxy, Docker and Calico, and three pods."""
    with topology() as built, Responder() as responder:
        for pod in built.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        if SHARED_DATA.is_dir():
            restore_kube_proxy(built.node.namespace)
        restore_foreign(built.node.namespace)
        yield built


def web(built: Topology) -> list[Manifest]:
    return service("web", vips=[VIP4, VIP6], ports=PORTS, endpoints=addresses(built.pods))


def talk(built: Topology) -> None:
    """Traffic of every kind: all of it must be answered."""
    for namespace in (built.client.namespace, built.node.namespace, built.pods[0].namespace):
        for vip in (VIP4, VIP6):
            ask_tcp(namespace, vip, 80)
            ask_udp(namespace, vip, 80)
        ask_tcp(namespace, built.node.address4, 30123)


def tables(listing: str) -> dict[str, list[str]]:
    """The lines of each table of an iptables-save listing."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if line.startswith("*"):
            lines = found.setdefault(line, [])
        elif line != "COMMIT":
            lines.append(line)
    return found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mode", ["replace", "overlay"])
def test_stop_leaves_the_fallback_and_cleanup_leaves_nothing(
    cluster: Topology, mode: str, reader: str
) -> None:
    node = cluster.node.namespace
    before = snapshot(node)
    assert "KUBE-KUBELET-CANARY" in before["iptables-nft-save"]
    assert "DOCKER" in before["iptables-nft-save"]
    with Proxy(node, web(cluster), "--steer-all", mode=mode, reader=reader) as proxy:
        talk(cluster)
        with Connection(cluster.client.namespace, VIP4, 80) as held:
            proxy.stop()
            assert held.echo("the proxy is gone") == "the proxy is gone"
            assert snapshot(node) != before
            if mode == "replace":
                talk(cluster)
            removed = proxy.cleanup()
            assert "NFQPROXY-QUEUE" in removed
            assert snapshot(node) == before
            assert held.echo("its rules as well") == "its rules as well"
        assert proxy.cleanup() == "nothing to remove\n"
        assert snapshot(node) == before


def test_neighbours_rules_stay_as_they_are_while_the_proxy_runs(cluster: Topology) -> None:
    node = cluster.node.namespace
    before = snapshot(node)
    with Proxy(node, web(cluster)) as proxy:
        talk(cluster)
        now = snapshot(node)
        for tool in ("iptables-nft-save", "ip6tables-nft-save"):
            was, others = tables(before[tool]), tables(now[tool])
            for table, lines in was.items():
                assert [line for line in others.pop(table) if "NFQPROXY-" not in line] == lines
            # Tables that were not there hold nothing but ours.
            for lines in others.values():
                assert all("NFQPROXY-" in line or line.startswith(":") for line in lines)
        assert before["ipset list"] in now["ipset list"]
        proxy.stop()


@pytest.mark.parametrize("reader", READERS)
def test_cleanup_after_a_kill_and_restart_after_a_kill(cluster: Topology, reader: str) -> None:
    node = cluster.node.namespace
    before = snapshot(node)
    with Proxy(node, web(cluster), reader=reader) as proxy:
        talk(cluster)
        proxy.kill()
        # Nobody decides any more: --queue-bypass and the fallback serve.
        talk(cluster)
        with_rules = programmed(node)
        proxy.start()
        talk(cluster)
        assert proxy.packets() > 0
        assert programmed(node) == with_rules
        proxy.kill()
        proxy.cleanup()
        assert snapshot(node) == before
        assert proxy.cleanup() == "nothing to remove\n"


def test_once_leaves_a_serving_fallback_and_no_process(cluster: Topology) -> None:
    node = cluster.node.namespace
    before = snapshot(node)
    with Proxy(node, web(cluster)) as proxy:
        proxy.stop()
        with_rules = programmed(node)
        proxy.cleanup()
        manifests = ["--manifests", str(proxy.manifest), "--node-name", "n1"]
        cidr = ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56"]
        done = run_cli(node, "run", *manifests, *cidr, "--once")
        assert (done.returncode, done.stdout) == (0, "")
        assert run_cli(node, "status").returncode == 1
        assert programmed(node) == with_rules
        talk(cluster)
        # The rules count what passed; no queue has a reader.
        assert proxy.queued()[Family.IPV4, Protocol.TCP] > 0
        queues = node.call(queue_statistics)
        assert queues == {}
        # Once more is no harm, and the running proxy takes it over.
        assert run_cli(node, "run", *manifests, *cidr, "--once").returncode == 0
        assert programmed(node) == with_rules
        proxy.start()
        talk(cluster)
        assert proxy.packets() > 0
        proxy.stop()
        proxy.cleanup()
        assert snapshot(node) == before


def test_second_proxy_in_a_namespace_is_refused(cluster: Topology) -> None:
    node = cluster.node.namespace
    with Proxy(node, web(cluster)) as proxy:
        before, pids = programmed(node), proxy.worker_pids()
        done = run_cli(node, "run", "--manifests", str(proxy.manifest), "--queue", "200")
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "another nfqproxy runs in this network namespace" in done.stderr
        assert programmed(node) == before
        assert proxy.worker_pids() == pids
        packets = proxy.packets()
        talk(cluster)
        assert proxy.packets() > packets
        # Another network namespace is another node.
        with Proxy(cluster.client.namespace, web(cluster)) as other:
            assert other.worker_pids() != pids
            other.stop()
        proxy.stop()


def _many(built: Topology, count: int) -> list[Manifest]:
    """``count`` Services with the pods in turn, the first and last on all pods."""
    found = web(built)
    ports = (Port(name="tcp", port=80, target=8080),)
    for number in range(1, count):
        pod = built.pods[number % len(built.pods)]
        vip = f"10.96.{16 + number // 250}.{number % 250 + 1}"
        found += service(f"s{number}", vips=[vip], ports=ports, endpoints=[pod.address4])
    return found


def test_rules_do_not_grow_with_services(cluster: Topology) -> None:
    """5,000 Services: as many rules as with one, the first and the last one work."""
    node, client = cluster.node.namespace, cluster.client.namespace

    def rules() -> dict[str, int]:
        listings = snapshot(node)
        chains = json.loads(node.run("nft", "-j", "list", "ruleset").stdout)["nftables"]
        return {
            "iptables": sum(
                line.startswith("-A")
                for tool, text in listings.items()
                if tool.endswith("-save")
                for line in text.splitlines()
            ),
            "nft": sum("rule" in item for item in chains),
        }

    with Proxy(node, web(cluster)) as proxy:
        talk(cluster)
        with_one = rules()
        proxy.follow(_many(cluster, 5000))
        assert proxy.status()["services"] == 5000
        assert rules() == with_one
        talk(cluster)
        packets = proxy.packets()
        last = cluster.pods[4999 % 3].name
        assert ask_tcp(client, "10.96.35.250", 80).name == last
        assert ask_tcp(client, "10.96.25.1", 80).name == cluster.pods[2250 % 3].name
        assert proxy.packets() == packets + 2
        # Without workers the fallback knows the last one too.
        proxy.kill()
        assert ask_tcp(client, "10.96.35.250", 80).name == last
        proxy.start()
        assert proxy.status()["services"] == 5000
        assert ask_tcp(client, "10.96.35.250", 80).name == last
        proxy.stop()


def test_a_dead_supervisor_takes_its_workers_along(cluster: Topology) -> None:
    with Proxy(cluster.node.namespace, web(cluster), workers=2) as proxy:
        workers = [ProcessRef.of(pid) for pid in proxy.worker_pids()]
        assert len(workers) == 2
        os.kill(proxy.pid, signal.SIGKILL)
        wait_until(lambda: not any(ref.is_alive() for ref in workers), "the workers have ended")
        talk(cluster)
