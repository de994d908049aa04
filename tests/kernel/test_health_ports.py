"""Health-check node ports, asked with curl from outside, as a load balancer does."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nfqproxy.kernel.commands import complete_path
from nfqproxy.lab.topology import Topology, topology
from tests.kernel.manifests import Endpoint, Manifest, Port, service
from tests.kernel.proxy import Proxy, run_cli, wait_until

NODE4, NODE6 = "192.0.2.1", "2001:db8:2::1"
HEALTH = 32000
PORTS = (Port(name="http", port=80, target=8080), Port(name="https", port=443, target=8443))
READY = {"ready": True, "serving": True, "terminating": False}
DRAINING = {"ready": False, "serving": True, "terminating": True}


@pytest.fixture
def cluster() -> Iterator[Topology]:
    with topology(pods=(3, 1)) as built:
        yield built


def balanced(
    built: Topology,
    *conditions: dict[str, bool],
    name: str = "web",
    number: int = 80,
    health: int = HEALTH,
    local: bool = True,
) -> list[Manifest]:
    """A load-balanced Service: the first pods of n1 in these conditions, and the pod of n2, ready."""
    pods = [*built.pods_of("n1")[: len(conditions)], *built.pods_of("n2")]
    found = service(
        name,
        vips=[f"10.96.0.{number}", f"fd00:10:96::{number}"],
        ports=PORTS,
        endpoints=[
            Endpoint(address=address, node=pod.node)
            for pod in pods
            for address in (pod.address4, pod.address6)
        ],
        external_local=local,
    )
    found[0]["spec"]["type"] = "LoadBalancer"
    if local:
        found[0]["spec"]["healthCheckNodePort"] = health
    for item in found[1:]:
        for endpoint, told in zip(item["endpoints"], conditions, strict=False):
            endpoint["conditions"] = told
    return found


@dataclass(frozen=True)
class Checked:
    """What curl got: status 0 when nobody listened."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def endpoints(self) -> int:
        found: int = json.loads(self.body)["localEndpoints"]
        return found


def check(built: Topology, address: str = NODE4, port: int = HEALTH, *options: str) -> Checked:
    host = f"[{address}]" if ":" in address else address
    done = built.client.namespace.run(
        *["curl", "-sS", "-g", "-i", "--max-time", "5", *options, f"http://{host}:{port}/healthz"],
        check=False,
    )
    if done.returncode:
        # 7: could not connect.
        assert done.returncode == 7, done.stderr
        return Checked(0, {}, "")
    # Text mode has turned the line ends of HTTP into plain ones.
    head, _, body = done.stdout.partition("\n\n")
    status, *lines = head.splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    return Checked(int(status.split()[1]), headers, body)


def errors(proxy: Proxy) -> dict[tuple[str, str], str]:
    return {
        (port["service"], port["address"]): port["error"]
        for port in proxy.status()["health_check_ports"]
        if port["error"]
    }


def test_the_answer_is_kube_proxys(cluster: Topology) -> None:
    with Proxy(cluster.node.namespace, balanced(cluster, READY, READY)) as proxy:
        for address in (NODE4, NODE6):
            found = check(cluster, address)
            assert found.status == 200
            assert found.headers["Content-Type"] == "application/json"
            assert found.headers["X-Content-Type-Options"] == "nosniff"
            assert found.headers["X-Load-Balancing-Endpoint-Weight"] == "2"
            assert found.body == (
                '{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
                '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
            )
        # Any method and path; a HEAD has no body.
        assert check(cluster, NODE4, HEALTH, "-X", "POST", "-d", "x").endpoints == 2
        headed = check(cluster, NODE4, HEALTH, "--head")
        assert (headed.status, headed.body) == (200, "")
        # The packets of health checks are no Service traffic.
        assert proxy.packets() == 0
        proxy.stop()
        assert check(cluster).status == 0


def test_only_ready_local_endpoints_count(cluster: Topology) -> None:
    with Proxy(cluster.node.namespace, balanced(cluster, READY, READY)) as proxy:
        assert check(cluster).endpoints == 2
        # One drains: it still gets traffic, but the load balancer is told of one.
        proxy.write(balanced(cluster, DRAINING, READY))
        wait_until(lambda: check(cluster).endpoints == 1, "one endpoint is told")
        assert check(cluster).status == 200
        proxy.write(balanced(cluster, DRAINING, DRAINING))
        wait_until(lambda: check(cluster).endpoints == 0, "none is told")
        found = check(cluster, NODE6)
        assert (found.status, found.endpoints) == (503, 0)
        assert found.headers["X-Load-Balancing-Endpoint-Weight"] == "0"
        # The pod of the other node alone: nothing local, the same answer.
        proxy.write(balanced(cluster))
        assert check(cluster).status == 503
        proxy.write(balanced(cluster, READY))
        wait_until(lambda: check(cluster).status == 200, "it is ready again")


def test_listeners_come_and_go_with_their_services(cluster: Topology) -> None:
    web = balanced(cluster, READY)
    with Proxy(cluster.node.namespace, web) as proxy:
        assert check(cluster).status == 200
        proxy.follow(web + balanced(cluster, READY, name="shop", number=81, health=32001))
        wait_until(lambda: check(cluster, NODE4, 32001).status == 200, "the second is there")
        assert '"shop"' in check(cluster, NODE6, 32001).body
        # Another number for it; the first one is not touched: its connection stays.
        with cluster.client.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as kept:
            kept.settimeout(5.0)
            kept.connect((NODE4, HEALTH))

            def ask() -> bytes:
                kept.sendall(b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n")
                data = b""
                while not re.search(rb"\}$", data):
                    data += kept.recv(4096)
                return data

            assert b"200 OK" in ask()
            proxy.write(web + balanced(cluster, READY, name="shop", number=81, health=32002))
            wait_until(lambda: check(cluster, NODE4, 32002).status == 200, "it has moved")
            assert check(cluster, NODE4, 32001).status == 0
            assert b"200 OK" in ask()
        # Policy Cluster has none; neither has a Service that is gone.
        proxy.follow(balanced(cluster, READY, local=False))
        wait_until(lambda: check(cluster).status == 0, "the first is closed")
        wait_until(lambda: check(cluster, NODE4, 32002).status == 0, "the second is closed")
        assert proxy.status()["health_check_ports"] == []


def test_a_port_that_is_taken_is_told_and_hinders_nothing(cluster: Topology) -> None:
    node = cluster.node.namespace
    shop = balanced(cluster, READY, name="shop", number=81, health=32001)
    with node.socket(socket.AF_INET, socket.SOCK_STREAM) as squatter:
        squatter.bind((NODE4, HEALTH))
        squatter.listen()
        with Proxy(node, balanced(cluster, READY) + shop) as proxy:
            assert errors(proxy) == {("web", NODE4): "Address already in use; tried again later"}
            assert check(cluster, NODE6).status == 200
            assert check(cluster, NODE4, 32001).status == 200
            complaint = f"default/web: cannot listen on its health-check node port {NODE4}:{HEALTH}"
            assert proxy.log.count(complaint) == 1
            shown = run_cli(node, "status").stdout
            assert f"health-check node port {HEALTH} on {NODE4} of default/web" in shown
            squatter.close()
            # Any change is an occasion to try again.
            proxy.write(balanced(cluster, READY, READY) + shop)
            wait_until(lambda: check(cluster).status == 200, "it is served")
            assert errors(proxy) == {}
            assert proxy.log.count(complaint) == 1


def test_two_services_with_one_port(cluster: Topology) -> None:
    items = balanced(cluster, READY) + balanced(cluster, READY, name="shop", number=81)
    with Proxy(cluster.node.namespace, items) as proxy:
        assert '"shop"' in check(cluster).body
        assert "default/shop has the same port" in errors(proxy)["web", NODE4]
        # The winner goes: the other one takes its place, on the listener that stands.
        proxy.write(balanced(cluster, READY))
        wait_until(lambda: '"web"' in check(cluster).body, "the other one is answered for")
        assert errors(proxy) == {}


IMPATIENT = """
import sys
from nfqproxy.supervisor import sync_health
sync_health.LIMIT_S = 0.2
from nfqproxy.cli.main import main
sys.argv[0] = "nfqproxy"
main()
"""
"""The program, with a limit that a test can wait for; kube-proxy's is a minute."""

STUBBORN = """#!/bin/sh
[ -e {flag} ] && {{ echo "Error: Cannot allocate memory" >&2; exit 1; }}
exec {nft} "$@"
"""
"""An nft that the kernel refuses everything while ``flag`` exists."""


def test_unhealthy_while_the_kernel_does_not_take_a_change(
    cluster: Topology, tmp_path: Path
) -> None:
    """A load balancer must not send clients to a node whose rules are out of date."""
    flag, nft = tmp_path / "flag", tmp_path / "nft"
    nft.write_text(STUBBORN.format(flag=flag, nft=shutil.which("nft", path=complete_path(""))))
    nft.chmod(0o755)
    path = f"{tmp_path}:{complete_path(os.environ['PATH'])}"
    with Proxy(
        cluster.node.namespace,
        balanced(cluster, READY, READY),
        env={"PATH": path},
        program=("-c", IMPATIENT),
    ) as proxy:
        assert check(cluster).status == 200
        flag.touch()
        proxy.write(balanced(cluster, READY))
        wait_until(lambda: check(cluster).status == 503, "the proxy counts as unhealthy")
        assert "the kernel did not take a change" in proxy.log
        for address in (NODE4, NODE6):
            found = check(cluster, address)
            assert found.status == 503
            assert json.loads(found.body) == {
                "service": {"namespace": "default", "name": "web"},
                # What it last served, and what the load balancer is told to keep away from.
                "localEndpoints": 2,
                "serviceProxyHealthy": False,
            }
        # It tries again by itself.
        flag.unlink()
        wait_until(lambda: check(cluster).status == 200, "it is healthy again")
        wait_until(lambda: check(cluster).endpoints == 1, "the change is told")


def test_overlay_mode_leaves_them_to_kube_proxy(cluster: Topology) -> None:
    with Proxy(
        cluster.node.namespace, balanced(cluster, READY), "--steer-all", mode="overlay"
    ) as proxy:
        assert proxy.status()["services"] == 1
        assert proxy.status()["health_check_ports"] == []
        assert check(cluster).status == 0
