"""nginx, dnsmasq and the echo server answer, and the load generator counts what really happened.

Known counts come from plain iptables DNAT in the node: a round robin (nth) spreads exactly.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.lab.jobs import DnsJob, HeldJob, LatencyJob, Progress, Target, TcpJob
from nfqproxy.lab.load_process import LoadProcess, run_load
from nfqproxy.lab.servers import (
    BULK_BYTES,
    server_directory,
    start_dns,
    start_echo,
    start_web,
)
from nfqproxy.lab.topology import Topology, topology

WEB = Target("web", "10.96.0.99", 80)
WEB6 = Target("web6", "fd00:10:96::99", 80)
DNS = Target("dns", "10.96.0.99", 53)
BLACK_HOLE = Target("hole", "10.96.0.98", 80)
REFUSED = Target("refused", "192.0.2.1", 9)


@pytest.fixture(scope="module")
def private_umask() -> Iterator[None]:
    """Root's files are nobody else's: the umask of a hardened host."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def served(private_umask: None) -> Iterator[Topology]:
    """Three pods with both servers; the node spreads WEB and DNS over them one by one."""
    with topology() as built, server_directory() as directory:
        rules = []
        for index, pod in enumerate(built.pods):
            name = f"backend-{index + 1}"
            start_web(pod, directory, name=name)
            start_dns(pod, directory, name=name)
            nth = f"-m statistic --mode nth --every {3 - index} --packet 0" if index < 2 else ""
            rules += [
                f"iptables -t nat -A PREROUTING -d {WEB.address} -p tcp --dport 80 {nth}"
                f" -j DNAT --to {pod.address4}:8080",
                f"iptables -t nat -A PREROUTING -d {DNS.address} -p udp --dport 53 {nth}"
                f" -j DNAT --to {pod.address4}:53",
                f"ip6tables -t nat -A PREROUTING -d {WEB6.address} -p tcp --dport 80 {nth}"
                f" -j DNAT --to [{pod.address6}]:8080",
            ]
        rules.append(f"iptables -A FORWARD -d {BLACK_HOLE.address} -j DROP")
        for rule in rules:
            built.node.namespace.run(*rule.split())
        yield built


def test_nginx_tells_its_name_and_the_client(served: Topology) -> None:
    for pod, name in zip(served.pods, ("backend-1", "backend-2", "backend-3"), strict=True):
        for host in (pod.address4, f"[{pod.address6}]"):
            for port in (80, 8080):
                answer = served.client.namespace.run(
                    "curl", "--silent", "--include", f"http://{host}:{port}/"
                ).stdout
                client = served.client.address6 if "[" in host else served.client.address4
                assert f"X-Backend: {name}" in answer
                assert f"X-Client: {client}" in answer
                assert answer.endswith(f"\n{name}\n")


def test_nginx_serves_the_bulk_file(served: Topology) -> None:
    size = served.client.namespace.run(
        *["curl", "--silent", "--output", "/dev/null", "--write-out", "%{size_download}"],
        f"http://{WEB.address}/bulk",
    ).stdout
    assert int(size) == BULK_BYTES


def test_dnsmasq_answers_over_udp_and_tcp(served: Topology) -> None:
    pod = served.pods[1]
    for server in (pod.address4, pod.address6):
        for how in ("+notcp", "+tcp"):
            got = [
                served.client.namespace.run(
                    "dig", "+short", how, f"@{server}", "whoami.lab.", kind
                ).stdout.strip()
                for kind in ("TXT", "A", "AAAA")
            ]
            assert got == ['"backend-2"', pod.address4, pod.address6]


@pytest.mark.parametrize("family", [4, 6])
def test_echo_tells_the_peer(session_topology: Topology, family: int) -> None:
    pod, client = session_topology.pods[0], session_topology.client
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    address = pod.address4 if family == 4 else pod.address6
    peer = client.address4 if family == 4 else client.address6
    server = start_echo(pod.namespace, 9000 + family, name="e1")
    try:
        with client.namespace.socket(kind, socket.SOCK_STREAM) as stream:
            stream.settimeout(5.0)
            stream.connect((address, 9000 + family))
            with stream.makefile("rwb") as lines:
                said = json.loads(lines.readline())
                assert said == {
                    "backend": "e1",
                    "peer": peer,
                    "peer_port": stream.getsockname()[1],
                }
                lines.write(b"there and back\n")
                lines.flush()
                assert lines.readline() == b"there and back\n"
        with client.namespace.socket(kind, socket.SOCK_DGRAM) as datagrams:
            datagrams.settimeout(5.0)
            datagrams.connect((address, 9000 + family))
            datagrams.send(b"ping")
            said = json.loads(datagrams.recv(2000))
            assert (said["backend"], said["peer"], said["payload"]) == ("e1", peer, "ping")
    finally:
        pod.namespace.stop(server)


@pytest.mark.parametrize("target", [WEB, WEB6])
def test_tcp_load_counts_a_known_spread(served: Topology, target: Target) -> None:
    seen: list[Progress] = []
    report = run_load(
        served.client.namespace, TcpJob(targets=(target,), connections=300), seen.append
    )
    part = report.target(target.name)
    assert part.backends == {"backend-1": 100, "backend-2": 100, "backend-3": 100}
    assert (part.attempts, part.ok, part.failed, part.errors) == (300, 300, 0, {})
    client = served.client.address6 if target is WEB6 else served.client.address4
    assert part.clients == {client: 300}
    assert part.connect_us.samples == 300
    assert 0 < part.connect_us.p50 <= part.connect_us.p99 <= part.connect_us.max
    assert seen
    assert all(0 < p.done <= 300 and p.failed == 0 for p in seen)


def test_dns_load_counts_a_known_spread(served: Topology) -> None:
    job = DnsJob(targets=(DNS,), queries=300, first_port=50000)
    part = run_load(served.client.namespace, job).target("dns")
    assert part.backends == {"backend-1": 100, "backend-2": 100, "backend-3": 100}
    assert (part.ok, part.flows, part.failed, part.retries) == (300, 300, 0, 0)


def test_failures_are_told_apart(served: Topology) -> None:
    report = run_load(
        served.client.namespace,
        TcpJob(targets=(WEB, BLACK_HOLE, REFUSED), connections=30, timeout_s=0.3, concurrency=30),
    )
    assert report.target("web").ok == 10
    assert report.target("hole").errors == {"TIMEOUT": 10}
    assert report.target("refused").errors == {"ECONNREFUSED": 10}
    assert report.target("hole").connect_us.samples == 0


def test_dns_retries_and_time_outs_are_counted_apart(served: Topology) -> None:
    hole = Target("hole", BLACK_HOLE.address, 53)
    job = DnsJob(targets=(hole,), queries=4, timeout_s=0.1, retries=2)
    part = run_load(served.client.namespace, job).target("hole")
    assert (part.ok, part.failed, part.retries, part.errors) == (0, 4, 8, {"TIMEOUT": 4})


def test_latency_is_measured_per_target(served: Topology) -> None:
    direct = Target("direct", served.pods[0].address4, 8080)
    job = LatencyJob(targets=(WEB, direct), rounds=50, warm_up=5)
    report = run_load(served.client.namespace, job)
    for part in report.targets:
        assert (part.attempts, part.ok, part.failed, part.connect_us.samples) == (55, 55, 0, 50)


def test_source_ports_stay_in_the_range(served: Topology) -> None:
    """The node's conntrack table lists the client's ports."""
    low, high = 41000, 41049
    job = TcpJob(targets=(WEB,), connections=200, port_range=(low, high), concurrency=1)
    assert run_load(served.client.namespace, job).target("web").ok == 200
    listed = served.node.namespace.run(
        "conntrack", "-L", "-p", "tcp", "--orig-dst", WEB.address
    ).stdout
    ports = {int(line.split("sport=")[1].split()[0]) for line in listed.splitlines()}
    assert len([port for port in ports if low <= port <= high]) >= 25


def test_a_source_port_range_the_kernel_would_ignore_is_refused(served: Topology) -> None:
    job = TcpJob(targets=(WEB,), connections=1, port_range=(21000, 21049))
    with pytest.raises(NfqproxyError, match="21000-21049 are not within"):
        run_load(served.client.namespace, job)


def test_open_loop_keeps_its_schedule(served: Topology) -> None:
    """100 connections at 200/s take half a second at least; no upper bound is asserted."""
    job = TcpJob(targets=(WEB,), connections=100, rate=200.0)
    report = run_load(served.client.namespace, job)
    assert report.target("web").ok == 100
    assert report.elapsed_s >= 0.49


def test_held_connections_see_one_backend_each(served: Topology) -> None:
    job = HeldJob(targets=(WEB,), connections=6, duration_s=0.3, interval_s=0.02)
    part = run_load(served.client.namespace, job).target("web")
    assert part.backends == {"backend-1": 2, "backend-2": 2, "backend-3": 2}
    assert (part.ok, part.failed) == (6, 0)
    assert part.retries > 0


def test_a_held_connection_that_breaks_is_a_failure(served: Topology) -> None:
    """The backend resets its connections while they are held."""
    with server_directory() as directory, topology(pods=(1,)) as own:
        server = start_web(own.pods[0], directory)
        load = LoadProcess(
            own.client.namespace,
            HeldJob(
                targets=(Target("web", own.pods[0].address4, 80),), connections=3, duration_s=60.0
            ),
        )
        # They are connected once the server's side shows them established.
        while (
            own.pods[0].namespace.run("ss", "-Htn", "state", "established").stdout.count("\n") < 3
        ):
            pass
        own.pods[0].namespace.stop(server)
        part = load.wait().target("web")
    assert (part.ok, part.failed) == (0, 3)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with topology(pods=(1,)) as own, server_directory() as directory:
        pod = own.pods[0]
        start_dns(pod, directory, name="first")
        with pytest.raises(HostError, match="port 53 of pod-1-11 is taken"):
            start_dns(pod, directory, name="second")


def test_a_server_that_exits_says_why() -> None:
    with topology(pods=(1,)) as own, server_directory() as directory:
        pod = own.pods[0]
        with pytest.raises(HostError, match=r"exited with status 1.*duplicate listen"):
            start_web(pod, directory, ports=(8080, 8080))
