"""Node ports on 127.0.0.1: served for the node's own processes, closed to everybody else."""

from collections.abc import Iterator

import pytest

from nfqproxy.errors import HostError
from nfqproxy.kernel import node_rules, route_localnet
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import Family, FrontendKey, FrontendKind, FrontendPlan, Protocol

from .probes import REFUSED, SILENCE
from .rules_fixtures import (
    MASQUERADED,
    Cluster,
    backends,
    cluster,
    counted,
    empty,
    gateway,
    inside,
    namespaces,
    plan,
    require_kernel,
    serve,
    sh,
    state,
)

pytestmark = pytest.mark.kernel

LOOPBACK = "127.0.0.1"
ON = RuleSettings(iptables=IptablesBackend.NFT, localhost_node_ports=True)
OFF = RuleSettings(iptables=IptablesBackend.NFT)
KEYS = [FrontendKey(protocol, LOOPBACK, 30080) for protocol in (Protocol.TCP, Protocol.UDP)]


@pytest.fixture
def lab() -> Iterator[Cluster]:
    require_kernel()
    with cluster() as built:
        yield built


@pytest.fixture
def node() -> Iterator[str]:
    require_kernel()
    with namespaces("node") as names:
        yield names["node"]


def loopback(key: FrontendKey) -> FrontendPlan:
    return plan(
        key,
        backends(Family.IPV4, 0, 1),
        kind=FrontendKind.NODE_PORT,
        actions=(MASQUERADED,) * 3,
    )


def is_on(node: str) -> bool:
    return inside(node, route_localnet.is_on)


def test_a_process_of_the_node_is_served_and_masqueraded(lab: Cluster) -> None:
    sctp = FrontendKey(Protocol.SCTP, LOOPBACK, 30080)
    none = FrontendKey(Protocol.TCP, LOOPBACK, 30081)
    serve(
        lab,
        *(loopback(key) for key in (*KEYS, sctp)),
        empty(none, FrontendKind.NODE_PORT),
        settings=ON,
    )
    for key in KEYS:
        assert lab.probe("node", key) == f"b2 {gateway(Family.IPV4, 2)}"
    assert lab.probe("node", none) == REFUSED[Family.IPV4]
    assert counted(lab) == {"localhost-node-ports-accepted": 2, "no-endpoints-rejected": 1}
    # The pod's kernel has no SCTP, and says so about the packet that came from the node.
    lab.probe("node", sctp)
    assert counted(lab)["localhost-node-ports-accepted"] == 3


def test_without_the_sysctl_nothing_could_leave(lab: Cluster) -> None:
    serve(lab, *map(loopback, KEYS), settings=OFF)
    assert not lab.probe("node", KEYS[0]).startswith("b")


def test_nobody_from_outside_reaches_127(lab: Cluster) -> None:
    """Neither the node port nor a server of the node, translated or not, queued or not."""
    serve(lab, *map(loopback, KEYS), settings=ON)
    lab.servers.add(lab.node, "node", LOOPBACK, 9999)
    for role, via in (("client", "192.0.2.1"), ("b1", "10.244.1.1")):
        # The sender's own routing would keep 127.0.0.0/8 at home.
        name = lab.names[role]
        sh(name, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        sh(name, "ip", "route", "del", "local", "127.0.0.0/8", "table", "local", check=False)
        sh(name, "ip", "route", "del", "local", LOOPBACK, "table", "local", check=False)
        sh(name, "ip", "route", "add", "127.0.0.0/8", "via", via)
        source = ("192.0.2.2" if role == "client" else "10.244.1.2", 0)
        for key in (*KEYS, FrontendKey(Protocol.TCP, LOOPBACK, 9999)):
            before = counted(lab).get("martian-dropped", 0)
            assert lab.probe(role, key, source) == SILENCE
            assert counted(lab)["martian-dropped"] > before
    assert "localhost-node-ports-accepted" not in counted(lab)
    raw = sh(lab.node, "iptables-nft-save", "-c", "-t", "raw")
    assert "[0:0] -A NFQPROXY-QUEUE -p tcp" in raw, "not even queued"
    # The node itself still reaches its server.
    assert lab.probe("node", FrontendKey(Protocol.TCP, LOOPBACK, 9999)) == "node 127.0.0.1"


def test_the_sysctl_is_ours_only_if_we_set_it(node: str) -> None:
    before = state(node)
    for settings, expected in ((OFF, False), (ON, True), (ON, True), (OFF, False), (ON, True)):
        inside(node, lambda settings=settings: node_rules.apply(settings))
        assert is_on(node) is expected
        assert ("martian" in sh(node, "nft", "list", "ruleset")) is expected
    removed = inside(node, node_rules.cleanup)
    assert any("route_localnet" in line for line in removed)
    assert not is_on(node)
    assert state(node) == before

    sh(node, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    for settings in (ON, OFF, ON):
        inside(node, lambda settings=settings: node_rules.apply(settings))
        assert is_on(node)
    assert not any("route_localnet" in line for line in inside(node, node_rules.cleanup))
    assert is_on(node), "somebody else's"


@pytest.mark.parametrize(
    "settings",
    [
        RuleSettings(
            iptables=IptablesBackend.NFT, localhost_node_ports=True, mode=RuleMode.OVERLAY
        ),
        RuleSettings(
            iptables=IptablesBackend.NFT, localhost_node_ports=True, families=(Family.IPV6,)
        ),
    ],
)
def test_where_127_is_not_ours_nothing_is_touched(node: str, settings: RuleSettings) -> None:
    inside(node, lambda: node_rules.apply(settings))
    assert not is_on(node)
    assert "martian" not in sh(node, "nft", "list", "ruleset")


def test_turning_it_on_keeps_the_fallback(lab: Cluster) -> None:
    key = FrontendKey(Protocol.TCP, "10.96.0.10", 80)
    serve(lab, plan(key, backends(Family.IPV4, 1)), settings=OFF)
    for settings in (ON, OFF):
        inside(lab.node, lambda settings=settings: node_rules.apply(settings))
        assert lab.probe("client", key).startswith("b1 "), "no sync in between"


def test_a_read_only_sysctl_is_said_before_anything_changes(
    node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose /proc/sys cannot be written: no file there can be made either."""
    monkeypatch.setattr(route_localnet, "_FILE", route_localnet._FILE.with_name("no_such_sysctl"))
    before = state(node)
    with pytest.raises(HostError, match=r"route_localnet cannot be set.*localhostNodePorts off"):
        inside(node, lambda: node_rules.apply(ON))
    assert state(node) == before
