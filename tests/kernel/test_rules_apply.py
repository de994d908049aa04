"""Putting the rules on a node and taking them off, on the real kernel."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfqproxy.errors import HostError, KernelError
from nfqproxy.kernel import node_rules
from nfqproxy.kernel.host_check import check_host
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.kernel.rule_text import render
from nfqproxy.model import Backend, Family, FrontendKey, NodeContext, Protocol

from .rules_fixtures import by_key, inside, namespaces, plan, require_kernel, sh, state

pytestmark = pytest.mark.kernel

BACKENDS = [IptablesBackend.NFT, IptablesBackend.LEGACY]
KUBE_PROXY_RULES = Path(__file__).parents[3] / "shared" / "data"
PLAN = plan(FrontendKey(Protocol.TCP, "10.96.0.10", 80), [Backend(address="10.244.1.2", port=8080)])

# Rules as Docker and Calico write them: in tables and chains that ours must live beside.
FOREIGN = """\
*raw
:cali-PREROUTING - [0:0]
:cali-OUTPUT - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT
-A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i cali+ -j MARK --set-xmark 0x40000/0x40000
-A cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER -d 192.0.2.77/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 192.0.2.64/28 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 192.0.2.77:80
COMMIT
"""
FOREIGN_6 = FOREIGN.replace("192.0.2.77/32", "2001:db8:2::77/128").replace(
    "192.0.2.64/28", "2001:db8:2::/96").replace("192.0.2.77:80", "[2001:db8:2::77]:80")  # fmt: skip


@pytest.fixture
def node() -> Iterator[str]:
    require_kernel()
    with namespaces("node") as names:
        yield names["node"]


def use_legacy_tables(node: str) -> None:
    """Register the tables: with the legacy back end they can never be unregistered."""
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("raw", "mangle"):
            sh(node, tool, "-t", table, "-S")


@pytest.mark.parametrize("mode", list(RuleMode))
@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_twice_is_once_and_cleanup_removes_all(
    node: str, backend: IptablesBackend, mode: RuleMode
) -> None:
    if backend is IptablesBackend.LEGACY:
        use_legacy_tables(node)
    before = state(node)
    settings = RuleSettings(mode=mode, iptables=backend)
    inside(node, lambda: node_rules.apply(settings))
    once = state(node)
    assert "NFQPROXY-QUEUE" in once[f"iptables-{backend.value}"]
    assert "NFQPROXY-QUEUE" in once[f"ip6tables-{backend.value}"]
    inside(node, lambda: node_rules.apply(settings))
    assert state(node) == once
    assert inside(node, node_rules.cleanup)
    assert state(node) == before
    assert inside(node, node_rules.cleanup) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_rules_survive_byte_for_byte(node: str, backend: IptablesBackend) -> None:
    for family, tool, foreign in (("", "iptables", FOREIGN), ("6", "ip6tables", FOREIGN_6)):
        save = KUBE_PROXY_RULES / f"kube-proxy-1.30-ip{family}tables.save"
        restore = f"{tool}-{backend.value}-restore"
        if save.exists():
            sh(node, restore, stdin=save.read_text())
        sh(node, restore, "--noflush", stdin=foreign)
    sh(node, "ipset", "create", "cali40all-ipam-pools", "hash:net", "family", "inet")
    sh(node, "nft", "add", "table", "inet", "somebody")
    if backend is IptablesBackend.LEGACY:
        use_legacy_tables(node)
    before = state(node)
    settings = RuleSettings()
    table = KernelTable(settings)

    def work() -> IptablesBackend:
        chosen = node_rules.apply(settings)
        table.sync(by_key(PLAN), NodeContext(node_name="n1", cluster_cidrs=("10.244.0.0/16",)))
        return chosen

    assert inside(node, work) is backend, "auto follows the rules that are there"
    raw = sh(node, f"iptables-{backend.value}-save", "-t", "raw").splitlines()
    jumps = [line.split()[-1] for line in raw if line.startswith("-A PREROUTING")]
    assert jumps == ["cali-PREROUTING", "NFQPROXY-QUEUE", "NFQPROXY-QUEUE"], (
        "Calico's checks come first"
    )
    inside(node, node_rules.cleanup)
    assert state(node) == before


def test_cleanup_leaves_what_others_added_to_a_chain_we_made(node: str) -> None:
    inside(node, lambda: node_rules.apply(RuleSettings(iptables=IptablesBackend.NFT)))
    sh(node, "iptables-nft", "-t", "raw", "-A", "OUTPUT", "-p", "icmp", "-j", "ACCEPT")
    sh(node, "iptables-nft", "-t", "mangle", "-P", "OUTPUT", "DROP")
    removed = inside(node, node_rules.cleanup)
    assert "nft chain ip raw PREROUTING (empty, made by nfqproxy)" in removed
    chains = sh(node, "nft", "list", "chains", "ip")
    assert "policy drop" in chains
    assert "-A OUTPUT -p icmp -j ACCEPT" in sh(node, "iptables-nft-save", "-t", "raw")
    assert "ip6" not in sh(node, "nft", "list", "tables")


def test_settings_may_change_between_runs(node: str) -> None:
    before = state(node)
    nft = RuleSettings(iptables=IptablesBackend.NFT, flow_timeout_s=20, queue_count=2)
    inside(node, lambda: node_rules.apply(nft))
    assert "--queue-balance 100:101" in sh(node, "iptables-nft-save", "-t", "raw")
    v4 = RuleSettings(iptables=IptablesBackend.NFT, families=(Family.IPV4,), mode=RuleMode.OVERLAY)
    inside(node, lambda: node_rules.apply(v4))
    now = state(node)
    assert "timeout 25" in now["ipset"]
    assert "NFQPROXY" not in now["ip6tables-nft"]
    assert "ip6 nfqproxy" not in now["nft"]
    assert "slot-0" not in now["nft"]
    inside(node, lambda: node_rules.apply(nft))
    inside(node, lambda: node_rules.apply(RuleSettings(iptables=IptablesBackend.LEGACY)))
    now = state(node)
    assert "NFQPROXY" not in now["iptables-nft"]
    assert "NFQPROXY" in now["iptables-legacy"]
    inside(node, node_rules.cleanup)
    after = state(node)
    assert after["nft"] == before["nft"]
    assert "NFQPROXY" not in after["iptables-legacy"]


def test_a_repeated_apply_keeps_the_elements(node: str) -> None:
    settings = RuleSettings(iptables=IptablesBackend.NFT)

    def work() -> None:
        node_rules.apply(settings)
        KernelTable(settings).sync(by_key(PLAN), NodeContext(node_name="n1"))

    inside(node, work)
    before = state(node)
    inside(node, lambda: node_rules.apply(settings))
    assert state(node) == before
    assert "10.244.1.2 . 8080" in before["nft"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [False, True])
def test_a_failing_apply_leaves_what_was_there(
    node: str, backend: IptablesBackend, first: bool
) -> None:
    use_legacy_tables(node)
    old = RuleSettings(iptables=backend, first_queue=7)
    if not first:
        inside(node, lambda: node_rules.apply(old))
    # Only its owner, a live process, may touch such a table: the last step of apply fails.
    sh(node, "nft", "delete", "table", "ip6", "nfqproxy", check=False)
    argv = ["ip", "netns", "exec", node, "nft", "-i"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as owner:
        assert owner.stdin
        owner.stdin.write(b"add table ip6 nfqproxy { flags owner; }\n")
        owner.stdin.flush()
        while "ip6 nfqproxy" not in sh(node, "nft", "list", "tables"):
            time.sleep(0.01)
        before = state(node)
        with pytest.raises(KernelError, match="nft -f -"):
            inside(node, lambda: node_rules.apply(RuleSettings(iptables=backend, first_queue=8)))
        assert state(node) == before
        owner.stdin.close()
        owner.wait(timeout=10)


def test_a_set_of_another_type_in_the_way_is_reported(node: str) -> None:
    sh(node, "ipset", "create", "nfqproxy-flows-6", "bitmap:port", "range", "1-9")
    before = state(node)
    with pytest.raises(KernelError, match="ipset"):
        inside(node, lambda: node_rules.apply(RuleSettings(iptables=IptablesBackend.NFT)))
    assert state(node) == before
    assert inside(node, node_rules.cleanup) == ["ipset nfqproxy-flows-6"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_check_host_changes_nothing(node: str, backend: IptablesBackend) -> None:
    before = state(node)
    settings = RuleSettings(iptables=backend)
    assert inside(node, lambda: check_host(settings)) is backend
    assert state(node) == before


def test_rendered_text_loads_by_hand(node: str) -> None:
    rules = render(RuleSettings())
    for command, text in rules.sections().items():
        sh(node, *command.split(), stdin=text)
    assert "NFQPROXY-QUEUE" in sh(node, "ip6tables-save")
    inside(node, node_rules.cleanup)
    for tool in ("iptables-save", "ip6tables-save"):
        assert "NFQPROXY" not in sh(node, tool)


def count_rules(node: str) -> tuple[int, int]:
    listing = sh(node, "iptables-nft-save") + sh(node, "ip6tables-nft-save")
    chains = sh(node, "nft", "list", "chains")
    return listing.count("\n-A "), chains.count("chain ")


def test_five_thousand_services_add_no_rule(
    node: str, record_property: Callable[[str, object], None]
) -> None:
    settings = RuleSettings(iptables=IptablesBackend.NFT)
    table = KernelTable(settings)
    inside(node, lambda: node_rules.apply(settings))
    before = count_rules(node)
    plans = by_key(
        *(
            plan(
                FrontendKey(Protocol.TCP, f"10.96.{n // 250}.{n % 250 + 1}", 80),
                [
                    Backend(address=f"10.244.{e // 250}.{e % 250 + 1}", port=8080)
                    for e in range(3 * n, 3 * n + 3)
                ],
            )
            for n in range(5000)
        )
    )
    started = time.perf_counter()
    result = inside(node, lambda: table.sync(plans, NodeContext(node_name="n1")))
    elapsed = time.perf_counter() - started
    record_property("first_sync_of_5000_services_s", round(elapsed, 3))
    print(f"first sync of 5,000 Services, 15,000 endpoints: {elapsed:.3f} s")
    assert result.members_added == 5000
    assert count_rules(node) == before
    assert "Number of entries: 5000" in sh(node, "ipset", "list", "-t", "nfqproxy-frontends-4")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("plugin", "ability", "module"),
    [
        ("libxt_NFQUEUE.so", "the NFQUEUE target", "xt_NFQUEUE"),
        ("libxt_set.so", "the set match", "xt_set"),
        ("libxt_sctp.so", "the sctp match", "xt_sctp"),
    ],
)
def test_a_lacking_ability_is_named_before_anything_is_changed(
    node: str,
    backend: IptablesBackend,
    plugin: str,
    ability: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host whose iptables cannot use an extension stands for a kernel that lacks it."""
    (plugins,) = Path("/usr/lib").glob("*/xtables")
    for each in plugins.iterdir():
        if each.name != plugin:
            (tmp_path / each.name).symlink_to(each)
    monkeypatch.setenv("XTABLES_LIBDIR", str(tmp_path))
    before = state(node)
    settings = RuleSettings(iptables=backend)
    with pytest.raises(HostError, match=f"lacks {ability}.*modprobe -a .*{module}"):
        inside(node, lambda: check_host(settings))
    assert state(node) == before
    use_legacy_tables(node)
    before = state(node)
    with pytest.raises(KernelError, match="tables"):
        inside(node, lambda: node_rules.apply(settings))
    assert state(node) == before


def test_a_flow_timeout_beyond_the_kernels_is_refused(node: str) -> None:
    settings = RuleSettings(flow_timeout_s=30)
    with pytest.raises(HostError, match=r"nf_conntrack_udp_timeout 30.*lower it to 25"):
        inside(node, lambda: check_host(settings))
