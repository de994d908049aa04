"""What is queued, what keeps conntrack and NAT at work, and the set of known UDP flows."""

import re
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkCookieEcho, SCTPChunkData, SCTPChunkInit

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.counters import rule_counters
from nfqproxy.kernel.kernel_table import FlowMember, KernelTable
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import Backend, Family, FrontendKey, NodeContext, Protocol

from .rules_fixtures import Cluster, ask, by_key, cluster, inside, plan, require_kernel, sh

pytestmark = pytest.mark.kernel

BACKENDS = [IptablesBackend.NFT, IptablesBackend.LEGACY]
VIP = {Family.IPV4: "10.96.0.10", Family.IPV6: "fd00:10:96::10"}
POD = {Family.IPV4: "10.244.1.2", Family.IPV6: "fd00:10:244:1::2"}
CLIENT = {Family.IPV4: "192.0.2.2", Family.IPV6: "2001:db8:2::2"}


@pytest.fixture
def lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


def steer(lab: Cluster, settings: RuleSettings, *protocols: Protocol) -> KernelTable:
    table = KernelTable(settings)

    def work() -> None:
        node_rules.apply(settings)
        plans = [
            plan(FrontendKey(protocol, VIP[f], 80), [Backend(address=POD[f], port=8080)])
            for f in Family
            for protocol in protocols
        ]
        table.sync(by_key(*plans), NodeContext(node_name="n1"))

    inside(lab.node, work)
    return table


def insert_entry(lab: Cluster, family: Family, protocol: Protocol, source_port: int) -> None:
    """Install the translation of one flow, as the worker does."""
    state = ["--state", "SYN_SENT"] if protocol is Protocol.TCP else []
    bracket = f"[{POD[family]}]:8080" if family is Family.IPV6 else f"{POD[family]}:8080"
    argv = [
        "conntrack", "-I", "-p", protocol.name.lower(), "-t", "20",
        "-s", CLIENT[family], "-d", VIP[family], "--sport", str(source_port), "--dport", "80",
        "--dst-nat", bracket, *state,
    ]  # fmt: skip
    sh(lab.node, *argv)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", list(RuleMode))
@pytest.mark.parametrize("family", list(Family))
def test_an_inserted_entry_translates(
    lab: Cluster, family: Family, mode: RuleMode, backend: IptablesBackend
) -> None:
    """With nothing but our rules on the node, conntrack and the NAT hooks are at work."""
    settings = RuleSettings(mode=mode, iptables=backend)
    inside(lab.node, lambda: node_rules.apply(settings))  # no Service: the fallback cannot help
    source = (CLIENT[family], 40001)
    for protocol in (Protocol.TCP, Protocol.UDP):
        insert_entry(lab, family, protocol, 40001)
        reply = inside(
            lab.names["client"],
            lambda protocol=protocol: ask(protocol, VIP[family], 80, source),
        )
        assert reply == f"b1 {CLIENT[family]}"


def test_without_the_rules_an_entry_is_useless(lab: Cluster) -> None:
    insert_entry(lab, Family.IPV4, Protocol.UDP, 40001)
    reply = inside(
        lab.names["client"],
        lambda: ask(Protocol.UDP, VIP[Family.IPV4], 80, (CLIENT[Family.IPV4], 40001)),
    )
    assert not reply.startswith("b1")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", list(Family))
def test_a_translated_udp_flow_skips_the_queue(
    lab: Cluster, family: Family, backend: IptablesBackend
) -> None:
    settings = RuleSettings(mode=RuleMode.OVERLAY, iptables=backend)
    table = steer(lab, settings, Protocol.UDP)
    kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET

    def talk() -> None:
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.bind((CLIENT[family], 40002))
            sock.connect((VIP[family], 80))
            for _ in range(5):
                sock.send(b"?")
                assert sock.recv(200) == f"b1 {CLIENT[family]}".encode()

    def queued() -> int:
        return inside(lab.node, rule_counters)[family, Protocol.UDP]

    def members() -> str:
        return sh(lab.node, "ipset", "list", f"nfqproxy-flows-{int(family)}")

    insert_entry(lab, family, Protocol.UDP, 40002)
    inside(lab.names["client"], talk)
    # The entry was there first, yet only conntrack's word counts: the first datagram is queued.
    assert queued() == 1
    assert f"{CLIENT[family]},udp:40002,{VIP[family]} timeout 2" in members()
    flow = FlowMember(CLIENT[family], 40002, VIP[family])
    inside(lab.node, lambda: table.forget_flows([flow, flow]))
    assert "udp:40002" not in members()
    inside(lab.names["client"], talk)
    assert queued() == 2


def test_an_untranslated_udp_flow_is_queued_every_time(lab: Cluster) -> None:
    """Nobody answers and nobody translates: the flow never becomes a known one."""
    steer(lab, RuleSettings(mode=RuleMode.OVERLAY, iptables=IptablesBackend.NFT), Protocol.UDP)

    def talk() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("", 40003))
            for _ in range(3):
                sock.sendto(b"?", (VIP[Family.IPV4], 80))

    inside(lab.names["client"], talk)
    assert inside(lab.node, rule_counters)[Family.IPV4, Protocol.UDP] == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_tcp_connection_the_syn_alone_jumps(lab: Cluster, backend: IptablesBackend) -> None:
    """Packets of connections leave raw and mangle in the built-in chains; datagrams jump each time."""
    steer(lab, RuleSettings(iptables=backend), Protocol.TCP, Protocol.UDP)

    def jumped() -> int:
        listing = "".join(
            sh(lab.node, f"iptables-{backend.value}", "-t", table, "-S", "PREROUTING", "-v")
            for table in ("raw", "mangle")
        )
        return sum(int(n) for n in re.findall(r"-c (\d+) \d+ -j NFQPROXY-", listing))

    assert jumped() == 0
    assert lab.ask("client", Protocol.TCP, VIP[Family.IPV4], 80).startswith("b1")
    # The pod answers by SYN and ACK at once, which is no first packet either.
    assert jumped() == 1
    assert lab.ask("client", Protocol.UDP, VIP[Family.IPV4], 80).startswith("b1")
    assert jumped() == 5, "there and back, in raw and in mangle"


def test_only_the_first_packet_of_a_tcp_connection_is_queued(lab: Cluster) -> None:
    steer(lab, RuleSettings(iptables=IptablesBackend.NFT), Protocol.TCP)
    for role in ("client", "node", "b2"):
        assert lab.ask(role, Protocol.TCP, VIP[Family.IPV4], 80).startswith("b1")
    counters = inside(lab.node, rule_counters)
    assert counters[Family.IPV4, Protocol.TCP] == 3
    assert counters[Family.IPV6, Protocol.TCP] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", list(Family))
def test_sctp_is_queued_by_its_init_chunk(
    lab: Cluster, family: Family, backend: IptablesBackend
) -> None:
    steer(lab, RuleSettings(iptables=backend), Protocol.SCTP)
    kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET
    init = SCTPChunkInit(init_tag=7, a_rwnd=65535)
    data = SCTPChunkData(data=b"x")

    def send(port: int, *chunks: object, to: int = 80) -> None:
        packet = SCTP(sport=port, dport=to, tag=0)
        for chunk in chunks:
            packet = packet / chunk
        with socket.socket(kind, socket.SOCK_RAW, 132) as sock:
            sock.sendto(bytes(packet), (VIP[family], 0))

    def queued() -> int:
        return inside(lab.node, rule_counters)[family, Protocol.SCTP]

    client = lab.names["client"]
    inside(client, lambda: send(5001, data))
    inside(client, lambda: send(5002, SCTPChunkCookieEcho(cookie=b"1234")))
    inside(client, lambda: send(5003, init, to=81))
    assert queued() == 0
    inside(client, lambda: send(5004, init))
    assert queued() == 1
    listing = sh(lab.node, "conntrack", "-L", "-f", f"ipv{int(family)}", "-p", "sctp")
    (entry,) = (line for line in listing.splitlines() if "sport=5004" in line)
    assert f"src={POD[family]} dst={CLIENT[family]} sport=8080 dport=5004" in entry


@pytest.mark.parametrize("backend", BACKENDS)
def test_checks_of_others_in_raw_hold(lab: Cluster, backend: IptablesBackend) -> None:
    """As Calico's guard against spoofed sources: what it drops never reaches the queue."""
    settings = RuleSettings(iptables=backend)
    guard = (
        "*raw\n:cali-rpf - [0:0]\n-A PREROUTING -j cali-rpf\n"
        "-A cali-rpf -s 192.0.2.2 -j DROP\nCOMMIT\n"
    )
    sh(lab.node, f"iptables-{backend.value}-restore", "--noflush", stdin=guard)
    steer(lab, settings, Protocol.TCP)
    with_guard = inside(lab.names["client"], lambda: attempt(VIP[Family.IPV4]))
    assert with_guard == "timeout"
    assert inside(lab.node, rule_counters)[Family.IPV4, Protocol.TCP] == 0
    assert lab.ask("b2", Protocol.TCP, VIP[Family.IPV4], 80).startswith("b1")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", list(Family))
def test_what_others_leave_untracked_is_not_queued(
    lab: Cluster, family: Family, backend: IptablesBackend
) -> None:
    """As NodeLocal DNSCache: it has the address of a Service that is served, and answers itself."""
    tool = "ip6tables" if family is Family.IPV6 else "iptables"
    length = 128 if family is Family.IPV6 else 32
    sh(lab.node, "ip", "addr", "add", f"{VIP[family]}/{length}", "dev", "lo", "nodad")
    for chain in ("PREROUTING", "OUTPUT"):
        for way, port in (("-d", "--dport"), ("-s", "--sport")):
            for protocol in ("tcp", "udp"):
                sh(
                    lab.node, f"{tool}-{backend.value}", "-t", "raw", "-A", chain, way, VIP[family],
                    "-p", protocol, port, "80", "-j", "CT", "--notrack",
                )  # fmt: skip
    lab.servers.add(lab.node, "cache", VIP[family], 80)
    steer(lab, RuleSettings(iptables=backend), Protocol.TCP, Protocol.UDP)
    for role in ("client", "node", "b2"):
        for protocol in (Protocol.TCP, Protocol.UDP):
            assert lab.ask(role, protocol, VIP[family], 80).startswith("cache ")
    assert not any(inside(lab.node, rule_counters).values())


def attempt(address: str) -> str:
    with socket.socket() as sock:
        sock.settimeout(0.5)
        try:
            sock.connect((address, 80))
        except TimeoutError:
            return "timeout"
        return "connected"
