"""Real servers and clients through the proxy: nginx and curl, dnsmasq and dig; thousands of connections.

Weights 5:3:2 are checked by chi-square, with fixed seeds where these decide (by marks it is the flows, which are
others each time); a bulk transfer shows that one packet of a connection, and no invalid one, is all that userspace
and conntrack ever see.
"""

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.chi_square import chi_square
from nfqproxy.lab.jobs import DnsJob, Target, TargetReport, TcpJob
from nfqproxy.lab.load_process import run_load
from nfqproxy.lab.retransmits import syn_retransmits
from nfqproxy.lab.servers import server_directory, start_dns, start_web
from nfqproxy.lab.topology import Topology, topology
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Port, service
from tests.kernel.proxy import RUNS, Proxy

WEB = {"4": "10.96.0.80", "6": "fd00:10:96::80"}
DNS = {"4": "10.96.0.53", "6": "fd00:10:96::53"}
WEIGHTS = (5, 3, 2)
NAMES = ("pod-1-11", "pod-1-12", "pod-1-13")
BULK_BYTES = 200 * 1024 * 1024


@dataclass(frozen=True)
class Cluster:
    topology: Topology
    proxy: Proxy

    @property
    def client(self) -> Namespace:
        return self.topology.client.namespace

    def load(self, job: TcpJob | DnsJob) -> TargetReport:
        """Run a job with one target; nothing may fail, every packet counted must be a new flow's."""
        protocol = Protocol.TCP if isinstance(job, TcpJob) else Protocol.UDP
        family = Family.IPV6 if ":" in job.targets[0].address else Family.IPV4
        queued, packets = self.proxy.queued()[family, protocol], self.proxy.packets()
        retransmits = syn_retransmits(self.client)
        part = run_load(self.client, job).targets[0]
        assert (part.failed, part.errors, part.retries) == (0, {}, 0)
        assert part.ok == part.attempts
        flows = part.flows
        if protocol is Protocol.TCP:
            flows = part.attempts + syn_retransmits(self.client) - retransmits
        assert self.proxy.queued()[family, protocol] - queued == flows
        assert self.proxy.packets() - packets == flows
        return part


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    with topology() as built, server_directory() as directory:
        for pod in built.pods:
            start_web(pod, directory)
            start_dns(pod, directory)
        yield built


@pytest.fixture(scope="module", params=RUNS)
def cluster(request: pytest.FixtureRequest, network: Topology) -> Iterator[Cluster]:
    addresses = [a for pod in network.pods for a in (pod.address4, pod.address6)]
    weights = {
        address: weight
        for pod, weight in zip(network.pods, WEIGHTS, strict=True)
        for address in (pod.address4, pod.address6)
    }
    objects = [
        *service(
            "web",
            vips=list(WEB.values()),
            ports=[Port(name="http", port=80, target=8080, node_port=30080)],
            endpoints=addresses,
            weights=weights,
        ),
        *service(
            "dns",
            vips=list(DNS.values()),
            ports=[
                Port(name="dns", port=53, target=53, protocol="UDP"),
                Port(name="dns-tcp", port=53, target=53),
            ],
            endpoints=addresses,
            weights=weights,
        ),
    ]
    node = network.node.namespace
    # Flows of the run before: conntrack would know them, and no packet of theirs would be queued.
    node.run("conntrack", "-F")
    reader, data_path = request.param
    with Proxy(node, objects, "--seed", "20", reader=reader, data_path=data_path) as proxy:
        yield Cluster(network, proxy)
        proxy.stop()
        proxy.cleanup()


def spread(part: TargetReport) -> list[int]:
    return [part.backends.get(name, 0) for name in NAMES]


@pytest.mark.parametrize("family", ["4", "6"])
def test_tcp_weights_are_kept_and_one_packet_is_seen(cluster: Cluster, family: str) -> None:
    target = Target("web", WEB[family], 80)
    part = cluster.load(TcpJob(targets=(target,), connections=2000))
    assert sum(spread(part)) == 2000
    assert chi_square(spread(part), WEIGHTS).p_value > 1e-6
    assert part.clients == {"192.0.2.1" if family == "4" else "2001:db8:2::1": 2000}


@pytest.mark.parametrize("family", ["4", "6"])
def test_dns_weights_are_kept_and_one_packet_per_flow_is_seen(
    cluster: Cluster, family: str
) -> None:
    target = Target("dns", DNS[family], 53)
    # The kernel may give a port to several sockets in turn: one flow then, and one pick.
    part = cluster.load(DnsJob(targets=(target,), queries=2000, concurrency=4))
    assert sum(spread(part)) == 2000
    assert part.flows > 1500
    assert chi_square(spread(part), WEIGHTS).p_value > 1e-6


def test_curl_by_cluster_ip_and_node_port(cluster: Cluster) -> None:
    places = [
        (cluster.client, "http://10.96.0.80/", "192.0.2.1"),
        (cluster.client, "http://[fd00:10:96::80]/", "2001:db8:2::1"),
        (cluster.client, "http://192.0.2.1:30080/", "192.0.2.1"),
        (cluster.client, "http://[2001:db8:2::1]:30080/", "2001:db8:2::1"),
        (cluster.topology.node.namespace, "http://10.96.0.80/", "192.0.2.1"),
        (cluster.topology.node.namespace, "http://192.0.2.1:30080/", "192.0.2.1"),
    ]
    for namespace, url, source in places:
        answer = namespace.run("curl", "--silent", "--include", "--max-time", "5", url).stdout
        name = re.search(r"^X-Backend: (\S+)", answer, re.MULTILINE)
        assert name is not None, answer
        assert name[1] in NAMES
        assert f"X-Client: {source}\n" in answer


def test_dig_over_udp_and_tcp(cluster: Cluster) -> None:
    for vip in DNS.values():
        for how in ("+notcp", "+tcp"):
            got = cluster.client.run(
                "dig", "+short", "+tries=1", how, f"@{vip}", "whoami.lab.", "TXT"
            ).stdout
            assert got.strip().strip('"') in NAMES


@pytest.fixture
def invalid_packets(cluster: Cluster) -> Iterator["InvalidPackets"]:
    counter = InvalidPackets(cluster.topology.node.namespace)
    try:
        yield counter
    finally:
        counter.close()


class InvalidPackets:
    """Counts what conntrack calls INVALID, in mangle chains of the test, and in conntrack itself."""

    def __init__(self, node: Namespace) -> None:
        self._node = node
        for tool in ("iptables", "ip6tables"):
            self._run(tool, "-N TEST-INVALID")
            self._run(tool, "-A TEST-INVALID -m conntrack --ctstate INVALID")
            for chain in ("PREROUTING", "OUTPUT", "POSTROUTING"):
                self._run(tool, f"-A {chain} -j TEST-INVALID")

    def _run(self, tool: str, arguments: str) -> str:
        return self._node.run(tool, "-t", "mangle", *arguments.split()).stdout

    def counts(self) -> list[int]:
        """By the rules of both families, then by conntrack -S over all processors."""
        found = []
        for tool in ("iptables", "ip6tables"):
            listing = self._run(tool, "-S TEST-INVALID -v")
            found.append(sum(map(int, re.findall(r"--ctstate INVALID -c (\d+)", listing))))
        statistics = self._node.run("conntrack", "-S").stdout
        counts = re.findall(r"\binvalid=(\d+)", statistics)
        assert counts
        return [*found, sum(map(int, counts))]

    def close(self) -> None:
        for tool in ("iptables", "ip6tables"):
            for chain in ("PREROUTING", "OUTPUT", "POSTROUTING"):
                self._run(tool, f"-D {chain} -j TEST-INVALID")
            self._run(tool, "-F TEST-INVALID")
            self._run(tool, "-X TEST-INVALID")


@pytest.mark.parametrize("family", ["4", "6"])
def test_bulk_transfer_has_no_invalid_packet_and_stays_in_the_kernel(
    cluster: Cluster, invalid_packets: InvalidPackets, family: str, tmp_path: Path
) -> None:
    invalid = invalid_packets.counts()
    queued, packets = cluster.proxy.queued(), cluster.proxy.packets()
    address = WEB[family] if family == "4" else f"[{WEB[family]}]"
    size = cluster.client.run(
        *["curl", "--silent", "--output", "/dev/null", "--write-out", "%{size_download}"],
        *["--range", f"0-{BULK_BYTES - 1}", f"http://{address}/bulk"],
        timeout_s=60.0,
    ).stdout
    assert int(size) == BULK_BYTES
    assert invalid_packets.counts() == invalid
    place = (Family(int(family)), Protocol.TCP)
    assert cluster.proxy.queued() == {**queued, place: queued[place] + 1}
    assert cluster.proxy.packets() == packets + 1


def test_an_invalid_packet_would_be_counted(
    cluster: Cluster, invalid_packets: InvalidPackets
) -> None:
    """The counters of the test above do count: half of a TCP header is invalid."""
    before = invalid_packets.counts()
    with cluster.client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(bytes(10), ("192.0.2.1", 0))
    after = invalid_packets.counts()
    assert after[0] > before[0]
    assert after[2] > before[2]
