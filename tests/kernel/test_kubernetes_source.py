"""The real proxy on a node follows an API server over the network, through its outages.

Where its Services come from makes no difference to a data path: all of this runs on one.
"""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nfqproxy.lab.topology import Topology
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.proxy import Proxy, run_cli, wait_until
from tests.kernel.responder import ask_tcp

VIP = "10.96.0.80"
ADDRESS, SERVER_PORT, TOKEN = "192.0.2.254", 6443, "of-the-test"
"""Of the gateway."""
HEALTH_PORT = 32100


def web(built: Topology, pod: int) -> list[Manifest]:
    return service(
        "web",
        vips=[VIP],
        ports=[Port(port=80, target=8080)],
        endpoints=[built.pods[pod].address4],
    )


class Server:
    """The test API server on the gateway, serving the proxy's manifest file."""

    def __init__(self, built: Topology, manifest: Path, kubeconfig: Path) -> None:
        self._namespace = built.router
        self._manifest = manifest
        self.kubeconfig = kubeconfig
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """With new certificates, which it writes into the kubeconfig, and without its history."""
        self.kubeconfig.unlink(missing_ok=True)
        self._process = self._namespace.popen(
            sys.executable,
            *["-m", "nfqproxy.testing", "--manifests", str(self._manifest)],
            *["--host", ADDRESS, "--port", str(SERVER_PORT), "--token", TOKEN],
            *["--kubeconfig", str(self.kubeconfig)],
        )
        wait_until(
            lambda: self.kubeconfig.exists() and self.kubeconfig.read_text().endswith("\n"),
            "the API server listens",
        )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Its connections stand, and it says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def events(self) -> list[dict[str, Any]]:
        url = f"https://{ADDRESS}:{SERVER_PORT}/api/v1/events"
        told = self._namespace.run(
            "curl", "-sk", "--max-time", "5", "-H", f"Authorization: Bearer {TOKEN}", url
        )
        items: list[dict[str, Any]] = json.loads(told.stdout)["items"]
        return items

    def close(self) -> None:
        if self._process is not None:
            self._namespace.stop(self._process)


@contextmanager
def following(
    built: Topology, objects: list[Manifest], directory: Path
) -> Iterator[tuple[Server, Proxy]]:
    kubeconfig = directory / "kubeconfig"
    proxy = Proxy(built.node.namespace, objects, kubeconfig=kubeconfig)
    server = Server(built, proxy.manifest, kubeconfig)
    try:
        server.start()
        with proxy:
            yield server, proxy
    finally:
        proxy.close()
        server.close()


def test_the_api_server_is_followed_and_may_go_and_come_back(
    cluster: Topology, tmp_path: Path
) -> None:
    client = cluster.client.namespace
    one, two, three = (pod.name for pod in cluster.pods)

    def answers() -> set[str]:
        return {ask_tcp(client, VIP, 80).name for _ in range(5)}

    with following(cluster, web(cluster, 0), tmp_path) as (server, proxy):
        assert answers() == {one}
        proxy.follow(web(cluster, 1))
        assert answers() == {two}
        before = proxy.installed()
        with server.frozen():
            assert answers() == {two}
        server.kill()
        wait_until(lambda: proxy.status()["source_error"], "the outage is noticed")
        assert "does not answer" in proxy.status()["source_error"]
        assert answers() == {two}
        assert proxy.installed() == before + 10, "workers decide, not the fallback"
        # A worker that starts meanwhile knows all, too.
        proxy.wait_replaced(proxy.kill_worker())
        assert answers() == {two}
        proxy.write(web(cluster, 2))
        server.start()
        wait_until(lambda: answers() == {three}, "what changed meanwhile is followed")
        wait_until(lambda: proxy.status()["source_error"] is None, "all is well")


def test_nothing_is_programmed_while_no_server_has_answered(
    topology: Topology, tmp_path: Path
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": f"http://{ADDRESS}:1"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c"}}],
                "current-context": "c",
            }
        )
    )
    node = topology.node.namespace
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = node.popen(
            sys.executable,
            *["-m", "nfqproxy", "run", "--kubeconfig", str(kubeconfig), "--node-name", "n1"],
            stdout=sink,
            stderr=sink,
        )
    try:
        wait_until(lambda: "nothing is programmed" in log.read_text(), "it is told")
        assert f"http://{ADDRESS}:1 does not answer: Connection refused" in log.read_text()
        assert "NFQPROXY" not in node.run("iptables-save").stdout
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        assert "Traceback" not in log.read_text()
    finally:
        node.stop(process)


def test_a_kubeconfig_that_cannot_be_used_changes_nothing(
    topology: Topology, tmp_path: Path
) -> None:
    node = topology.node.namespace
    missing = tmp_path / "missing"
    done = run_cli(node, "run", "--kubeconfig", str(missing), "--node-name", "n1")
    assert done.returncode == 2
    assert done.stderr == (
        f"nfqproxy: {missing}: the kubeconfig cannot be read: No such file or directory;"
        " give another with --kubeconfig\n"
    )
    assert "NFQPROXY" not in node.run("iptables-save").stdout


def test_a_health_port_that_is_taken_is_an_event(cluster: Topology, tmp_path: Path) -> None:
    objects = web(cluster, 0)
    objects[0]["spec"] |= {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": HEALTH_PORT,
    }
    with cluster.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.bind(("0.0.0.0", HEALTH_PORT))
        other.listen()
        with following(cluster, objects, tmp_path) as (server, _):
            wait_until(server.events, "an Event is written")
            (event,) = server.events()
    assert event["reason"] == "FailedToStartServiceHealthcheck"
    assert event["involvedObject"]["kind"] == "Service"
    assert event["involvedObject"]["name"] == "web"
    assert event["involvedObject"]["uid"]
    assert event["source"] == {"component": "nfqproxy", "host": "n1"}
    assert f":{HEALTH_PORT}: Address already in use" in event["message"]
