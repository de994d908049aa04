"""What a packet meets that no backend may get: the kernel's answer, with no worker anywhere."""

import socket
from collections.abc import Iterator

import pytest

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import Family, FrontendKey, FrontendKind, Protocol

from .probes import REFUSED, SILENCE, ping, probe
from .rules_fixtures import (
    BACKEND,
    CLIENT_IP,
    DROP,
    EXTERNAL_IP,
    MASQUERADED,
    NODE,
    NODE_IP,
    VIP,
    Cluster,
    backends,
    borrowed,
    by_key,
    cluster,
    counted,
    empty,
    gateway,
    inside,
    plan,
    pod_address,
    require_kernel,
    serve,
    sh,
    state,
)

pytestmark = pytest.mark.kernel

UNOWNED = {Family.IPV4: "10.96.77.7", Family.IPV6: "fd00:10:96::7777"}
ROLES = ("client", "node", "b1")
every_family = pytest.mark.parametrize("family", list(Family))
every_protocol = pytest.mark.parametrize("protocol", list(Protocol))


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


@pytest.fixture
def lab(shared_lab: Cluster) -> Iterator[Cluster]:
    with borrowed(shared_lab) as built:
        yield built


@every_protocol
@every_family
def test_without_endpoints_the_port_is_unreachable(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    cluster_ip = FrontendKey(protocol, VIP[family], 80)
    external = FrontendKey(protocol, EXTERNAL_IP[family], 80)
    node_port = FrontendKey(protocol, NODE_IP[family], 30080)
    serve(
        lab,
        empty(cluster_ip),
        empty(external, FrontendKind.EXTERNAL_IP),
        empty(node_port, FrontendKind.NODE_PORT),
    )
    answers = lab.probes(ROLES, cluster_ip, external, node_port)
    assert answers == dict.fromkeys(answers, REFUSED[family])
    counters = counted(lab)
    assert set(counters) == {"no-endpoints-rejected"}
    assert counters["no-endpoints-rejected"] >= 9
    assert "Number of entries: 0" in sh(
        lab.node, "ipset", "list", f"nfqproxy-frontends-{int(family)}"
    ), "what nobody serves is never queued"


@every_family
def test_a_refusal_is_no_reset(lab: Cluster, family: Family) -> None:
    serve(lab, empty(FrontendKey(Protocol.TCP, VIP[family], 80)))
    kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET

    def work() -> None:
        with socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_TCP) as segments:
            segments.settimeout(0.2)
            assert probe(FrontendKey(Protocol.TCP, VIP[family], 80)) == REFUSED[family]
            with pytest.raises(TimeoutError):
                segments.recv(2048)

    inside(lab.names["client"], work)


@every_protocol
@every_family
def test_local_policy_without_local_endpoint_is_silence_for_outsiders(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    key = FrontendKey(protocol, NODE_IP[family], 30080)
    serve(
        lab,
        plan(
            key,
            backends(family, 1),
            kind=FrontendKind.NODE_PORT,
            actions=(BACKEND, MASQUERADED, DROP),
        ),
    )
    assert lab.probe("client", key) == SILENCE
    dropped = counted(lab)
    assert set(dropped) == {"no-local-endpoint-dropped"}
    if protocol is not Protocol.SCTP:
        assert lab.probe("b2", key) == f"b1 {pod_address(family, 2)}"
        assert lab.probe("node", key) == f"b1 {gateway(family, 1)}"
        assert counted(lab) == dropped


@every_protocol
@every_family
def test_internal_local_policy_without_local_endpoint_is_silence_for_all(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    key = FrontendKey(protocol, VIP[family], 80)
    serve(lab, plan(key, backends(family, 1), actions=(DROP, DROP, DROP)))
    answers = lab.probes(ROLES, key)
    assert answers == dict.fromkeys(answers, SILENCE)
    assert set(counted(lab)) == {"no-local-endpoint-dropped"}


@every_family
def test_a_live_cluster_ip_refuses_what_it_has_no_port_for(lab: Cluster, family: Family) -> None:
    key = FrontendKey(Protocol.TCP, VIP[family], 80)
    serve(lab, plan(key, backends(family, 1)))
    answers = lab.probes(
        ROLES,
        FrontendKey(Protocol.TCP, VIP[family], 81),
        FrontendKey(Protocol.UDP, VIP[family], 80),
        FrontendKey(Protocol.SCTP, VIP[family], 80),
    )
    assert answers == dict.fromkeys(answers, REFUSED[family])
    for role in ROLES:
        assert lab.probe(role, key).startswith("b1 ")
    assert set(counted(lab)) == {"no-port-rejected"}


@every_family
def test_a_live_cluster_ip_answers_no_ping(lab: Cluster, family: Family) -> None:
    serve(lab, plan(FrontendKey(Protocol.TCP, VIP[family], 80), backends(family, 1)))
    for role in ROLES:
        answer = inside(lab.names[role], lambda: ping(VIP[family]))
        assert answer == REFUSED[family]
        assert inside(lab.names[role], lambda: ping(NODE_IP[family])) == "echo"
    assert counted(lab) == {"no-port-rejected": len(ROLES)}


@every_protocol
@every_family
def test_an_address_nobody_owns_is_silence(
    lab: Cluster, family: Family, protocol: Protocol
) -> None:
    table = serve(lab, plan(FrontendKey(protocol, VIP[family], 80), backends(family, 1)))
    key = FrontendKey(protocol, UNOWNED[family], 80)
    answers = lab.probes(ROLES, key)
    assert answers == dict.fromkeys(answers, SILENCE)
    dropped = counted(lab)
    assert set(dropped) == {"no-owner-dropped"}
    # A Service takes the address: its other ports are refused now.
    own = FrontendKey(protocol, UNOWNED[family], 443)
    inside(lab.node, lambda: table.sync(by_key(plan(own, backends(family, 1))), NODE))
    assert lab.probe("client", key) == REFUSED[family]
    # And the address it had falls to nobody.
    assert lab.probe("client", FrontendKey(protocol, VIP[family], 80)) == SILENCE


@pytest.mark.parametrize("backend", [IptablesBackend.NFT, IptablesBackend.LEGACY])
@every_family
def test_what_a_neighbour_translates_is_never_refused(
    lab: Cluster, family: Family, backend: IptablesBackend
) -> None:
    """NodeLocal caches and the like: rules of their own for an address inside the service network."""
    tool = "iptables" if family is Family.IPV4 else "ip6tables"
    target = pod_address(family, 3)
    target = f"[{target}]:8080" if family is Family.IPV6 else f"{target}:8080"
    for chain in ("PREROUTING", "OUTPUT"):
        sh(
            lab.node, f"{tool}-{backend.value}", "-t", "nat", "-A", chain, "-d", UNOWNED[family],
            "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", target,
        )  # fmt: skip
    serve(
        lab,
        plan(FrontendKey(Protocol.TCP, VIP[family], 80), backends(family, 1)),
        settings=RuleSettings(iptables=backend),
    )
    for role in ROLES:
        assert lab.probe(role, FrontendKey(Protocol.TCP, UNOWNED[family], 80)).startswith("b3 ")
    assert counted(lab) == {}


@every_family
def test_an_untracked_local_server_is_never_refused(lab: Cluster, family: Family) -> None:
    """As NodeLocal DNSCache does it: the ClusterIP is bound on the node, its packets are untracked."""
    address, length = VIP[family], 32 if family is Family.IPV4 else 128
    sh(lab.node, "ip", "addr", "add", f"{address}/{length}", "dev", "lo", "nodad")
    tool = "iptables-nft" if family is Family.IPV4 else "ip6tables-nft"
    untracked = [
        ["-t", "raw", "-A", chain, way, address, "-p", "tcp", port, "5353", "-j", "CT", "--notrack"]
        for chain in ("PREROUTING", "OUTPUT")
        for way, port in (("-d", "--dport"), ("-s", "--sport"))
    ]
    for rule in untracked:
        sh(lab.node, tool, *rule)
    try:
        lab.servers.add(lab.node, "cache", address, 5353)
        serve(lab, plan(FrontendKey(Protocol.TCP, address, 80), backends(family, 1)))
        key = FrontendKey(Protocol.TCP, address, 5353)
        for role in ROLES:
            assert lab.probe(role, key).startswith("cache ")
        assert counted(lab) == {}
        # Its UDP side is not untracked: what the node itself sends meets the refusal.
        assert lab.probe("node", FrontendKey(Protocol.UDP, address, 5353)) == REFUSED[family]
    finally:
        for rule in untracked:
            rule[2] = "-D"
            sh(lab.node, tool, *rule)
        sh(lab.node, "ip", "addr", "del", f"{address}/{length}", "dev", "lo")


@every_family
def test_a_workers_entry_is_never_refused(lab: Cluster, family: Family) -> None:
    """The entry was made before the endpoints went; conntrack translates, so nothing refuses."""
    key = FrontendKey(Protocol.UDP, VIP[family], 80)
    serve(lab, empty(key))
    source = (CLIENT_IP[family], 40001)
    target = pod_address(family, 1)
    target = f"[{target}]:8080" if family is Family.IPV6 else f"{target}:8080"
    sh(
        lab.node, "conntrack", "-I", "-p", "udp", "-t", "20", "-s", source[0], "-d", key.address,
        "--sport", str(source[1]), "--dport", "80", "--dst-nat", target,
    )  # fmt: skip
    assert lab.probe("client", key, source) == f"b1 {CLIENT_IP[family]}"
    assert lab.probe("client", key) == REFUSED[family]


@every_family
def test_established_connections_outlive_their_service(lab: Cluster, family: Family) -> None:
    key = FrontendKey(Protocol.UDP, VIP[family], 80)
    table = serve(lab, plan(key, backends(family, 1)))
    kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET

    def work() -> None:
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect((key.address, key.port))
            for plans in (None, by_key(empty(key)), {}):
                if plans is not None:
                    inside(lab.node, lambda plans=plans: table.sync(plans, NODE))
                sock.send(b"?")
                assert sock.recv(100).startswith(b"b1 ")

    inside(lab.names["client"], work)
    assert lab.probe("client", key) == SILENCE, "the address is nobody's now"


@pytest.mark.parametrize("backend", [IptablesBackend.NFT, IptablesBackend.LEGACY])
def test_neighbours_filter_rules_neither_hide_nor_forbid_a_refusal(
    lab: Cluster, backend: IptablesBackend
) -> None:
    tool = f"iptables-{backend.value}"
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    local = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 443)
    before = state(lab.node)
    serve(
        lab,
        empty(key),
        plan(local, [], actions=(DROP, DROP, DROP)),
        settings=RuleSettings(iptables=backend),
    )
    for chain in ("INPUT", "FORWARD", "OUTPUT"):
        sh(lab.node, tool, "-I", chain, "-j", "ACCEPT")
    assert lab.probe("client", key) == "icmp 3/3"
    assert lab.probe("client", local) == SILENCE
    for chain in ("INPUT", "FORWARD", "OUTPUT"):
        sh(lab.node, tool, "-D", chain, "-j", "ACCEPT")
    sh(lab.node, tool, "-P", "FORWARD", "DROP")
    assert lab.probe("client", key) == "icmp 3/3"
    sh(lab.node, tool, "-P", "FORWARD", "ACCEPT")
    inside(lab.node, node_rules.cleanup)
    after = state(lab.node)
    assert after["nft"].replace(before["nft"], "").count("nfqproxy") == 0
    assert after["ipset"] == before["ipset"]


def test_traffic_that_is_not_for_services_is_left_alone(lab: Cluster) -> None:
    serve(lab, empty(FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)))
    for family in Family:
        for protocol in (Protocol.TCP, Protocol.UDP):
            direct = FrontendKey(protocol, pod_address(family, 2), 8080)
            assert lab.probe("b1", direct) == f"b2 {pod_address(family, 1)}"
            assert lab.probe("node", direct) == f"b2 {gateway(family, 2)}"
            assert lab.probe("b1", FrontendKey(protocol, EXTERNAL_IP[family], 80)) == SILENCE
    assert counted(lab) == {}


def test_overlay_refuses_nothing(lab: Cluster) -> None:
    key = FrontendKey(Protocol.TCP, VIP[Family.IPV4], 80)
    settings = RuleSettings(mode=RuleMode.OVERLAY, iptables=IptablesBackend.NFT)
    serve(lab, empty(key), settings=settings)
    assert lab.probe("client", key) == SILENCE
    assert counted(lab) == {}
    assert "refus" not in sh(lab.node, "nft", "list", "ruleset")
