"""kube-proxy's rules as the source: read off a real kernel, imported, run from, and followed.

How Services are decided does not depend on where they come from, so one data path is enough here.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology
from tests.kernel.kube_proxy_network import DNS, DUAL6, SHOP, WEB, network, served
from tests.kernel.proxy import CLUSTER_CIDR, Proxy, run_cli, wait_until
from tests.kernel.responder import ask_tcp, ask_udp
from tests.kernel.snapshot import SHARED_DATA, shared

pytestmark = pytest.mark.kernel

FILES = [str(SHARED_DATA / f"kube-proxy-1.30-{tool}.save") for tool in ("iptables", "ip6tables")]
BAD = "no chain KUBE-SERVICES in table nat"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Topology]:
    with network() as built, served(built) as cluster:
        yield cluster


@pytest.fixture
def node(cluster: Topology) -> Iterator[Namespace]:
    """n1 under kube-proxy's rules, which stand again as they were afterwards."""
    yield cluster.node.namespace
    write_rules(cluster.node.namespace)


def write_rules(node: Namespace, old: str = "", new: str = "") -> None:
    """kube-proxy's rules anew, with one text in place of another."""
    for tool in ("iptables", "ip6tables"):
        node.run(f"{tool}-restore", stdin=shared(f"kube-proxy-1.30-{tool}.save").replace(old, new))


def remove_rules(node: Namespace) -> None:
    for tool in ("iptables", "ip6tables"):
        node.run(f"{tool}-restore", stdin="*nat\nCOMMIT\n*filter\nCOMMIT\n")


def imported(node: Namespace, *arguments: str) -> str:
    done = run_cli(node, "import", "--node-name", "n1", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def reached(cluster: Topology, address: str, times: int = 24) -> set[str]:
    client = cluster.client.namespace
    return {ask_tcp(client, address, 80).name for _ in range(times)}


# ------------------------------------------------------------------------------- import


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_what_the_kernel_holds_reads_as_what_was_put_there(
    cluster: Topology, backend: str, tmp_path: Path
) -> None:
    """Both back ends print options in orders of their own; of n2, which has no rules yet."""
    node = cluster.nodes[1].namespace
    try:
        for tool in ("iptables", "ip6tables"):
            node.run(f"{tool}-{backend}-restore", stdin=shared(f"kube-proxy-1.30-{tool}.save"))
        live = json.loads(imported(node, "live", "-o", "json"))
        assert live == json.loads(imported(node, *FILES, "-o", "json"))
        assert len(live["items"]) == 26
        assert imported(node, "-o", "config") == imported(node, *FILES, "-o", "config")
    finally:
        for tool in ("iptables", "ip6tables"):
            node.run(f"{tool}-{backend}-restore", stdin="*nat\nCOMMIT\n*filter\nCOMMIT\n")


def test_what_is_imported_runs(cluster: Topology, node: Namespace, tmp_path: Path) -> None:
    """From the rules to manifests; the rules go, and the manifests serve by themselves."""
    file = tmp_path / "imported.yaml"
    file.write_text(imported(node, "live", "--node-address", cluster.node.address4))
    remove_rules(node)
    try:
        flags = ["--node-name", "n1", "--cluster-cidr", CLUSTER_CIDR]
        done = run_cli(node, "run", "--once", "--manifests", str(file), *flags)
        assert done.returncode == 0, done.stderr
        pods = {cluster.pods[0].name, cluster.pods[2].name}
        assert reached(cluster, WEB) == reached(cluster, SHOP) == pods
        assert reached(cluster, DUAL6, 2) == {cluster.pods[0].name}
        assert ask_tcp(cluster.client.namespace, cluster.node.address4, 30080).name in pods
        assert ask_udp(cluster.client.namespace, DNS, 53).name in pods
    finally:
        done = run_cli(node, "cleanup")
        assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- as a source


def without_n2(dump: str) -> str:
    """The rules with the endpoint of default/web on n2 gone, the other two sharing alike."""
    dump = re.sub(r".*KUBE-SEP-IQIBSY2R4USWK4F3.*\n", "", dump)
    last = '"default/web:http -> 10.244.1.11:8080"'
    dump = dump.replace(f"{last} -m statistic --mode random --probability 0.50000000000", last)
    return dump.replace("0.33333333349", "0.50000000000")


@pytest.mark.parametrize("is_asked", [False, True], ids=["by the clock", "by SIGHUP"])
def test_the_node_s_own_rules_are_followed(
    cluster: Topology, node: Namespace, tmp_path: Path, is_asked: bool
) -> None:
    """Beside kube-proxy without the API: its next rules are ours, its end is not."""
    file = tmp_path / "config.yaml"
    seconds = 86_400 if is_asked else 1
    file.write_text(f"kind: NfqproxyConfiguration\niptablesSaveIntervalSeconds: {seconds}\n")
    flags = ["--steer-all", "--config", str(file)]
    pods = {cluster.pods[0].name, cluster.pods[2].name}
    with Proxy(node, [], *flags, mode="overlay", source=("--iptables-save", "live")) as proxy:

        def look() -> None:
            if is_asked:
                os.kill(proxy.pid, signal.SIGHUP)

        assert reached(cluster, WEB) == pods
        assert reached(cluster, DUAL6, 2) == {cluster.pods[0].name}
        assert proxy.packets() == 26
        node.run("iptables-restore", stdin=without_n2(shared("kube-proxy-1.30-iptables.save")))
        look()
        wait_until(lambda: "nfqproxy: revision 2" in proxy.log, "the endpoint's end is followed")
        assert reached(cluster, WEB) == {cluster.pods[0].name}
        # kube-proxy is removed: what it said last stays in force.
        remove_rules(node)
        look()
        wait_until(lambda: BAD in str(proxy.status()["source_error"]), "the loss is noticed")
        assert reached(cluster, WEB) == {cluster.pods[0].name}
        assert proxy.log.count(BAD) == 1
        write_rules(node)
        look()
        wait_until(lambda: "nfqproxy: revision 3" in proxy.log, "the rules are back")
        assert reached(cluster, WEB) == pods
        assert proxy.status()["source_error"] is None
        proxy.stop()
        proxy.cleanup()


def test_dumps_in_files_are_followed(cluster: Topology, node: Namespace, tmp_path: Path) -> None:
    """Replace mode: the proxy alone, by what a node's rules were."""
    files = [tmp_path / "four", tmp_path / "six"]
    for file, name in zip(files, FILES, strict=True):
        file.write_text(shared(Path(name).name))
    remove_rules(node)
    source = [text for file in files for text in ("--iptables-save", str(file))]
    with Proxy(node, [], "--node-address", cluster.node.address4, source=source) as proxy:
        assert reached(cluster, WEB) == {cluster.pods[0].name, cluster.pods[2].name}
        files[0].write_text(without_n2(files[0].read_text()))
        wait_until(lambda: "nfqproxy: revision 2" in proxy.log, "the file is followed")
        assert reached(cluster, WEB) == {cluster.pods[0].name}
        files[0].write_text(files[0].read_text()[:5000])
        wait_until(lambda: proxy.status()["source_error"], "the cut is noticed")
        assert "it is cut off" in proxy.status()["source_error"]
        assert reached(cluster, WEB) == {cluster.pods[0].name}
        proxy.stop()
        proxy.cleanup()


@pytest.mark.parametrize("verb", [["run", "--iptables-save"], ["import"]])
def test_a_node_without_kube_proxy(cluster: Topology, verb: list[str]) -> None:
    done = run_cli(cluster.nodes[1].namespace, *verb, "live")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nfqproxy: ")
    assert done.stderr.count("\n") == 1
    assert BAD in done.stderr
