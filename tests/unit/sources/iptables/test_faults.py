"""Text that is no dump, dumps that are cut, rules that nobody writes: one sentence, or a loss by line."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.control.objects import EndpointSlice, Service
from nfqproxy.errors import ManifestError
from nfqproxy.sources.config import ProxyConfig
from nfqproxy.sources.iptables.source import IptablesSaveSource, LiveRules, Reading
from nfqproxy.sources.iptables.text import Dump
from tests.kernel.snapshot import shared
from tests.unit.conftest import RunCli
from tests.unit.sources.iptables.dumps import CLUSTER_IP, A, B, reading, shares, web

GOOD = web(shares(0.5, None))
NODE_PORT = (
    '-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web:http" -m tcp --dport 30080 -j'
)
FOUR, SIX = "kube-proxy-1.30-iptables.save", "kube-proxy-1.30-ip6tables.save"
EXCERPT = "origin-mysql-service.rules"


# ------------------------------------------------------------------------- no dump at all


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 0, "no chain KUBE-SERVICES in table nat"),
        ("\n# nothing\n", 0, "no chain KUBE-SERVICES"),
        ("*nat\nCOMMIT\n", 0, "no chain KUBE-SERVICES"),
        ("table ip kube-proxy {\n}\n", 1, "'table ip kube-proxy {' is no line of iptables-save"),
        ("apiVersion: v1\nkind: List\n", 1, "is no line of iptables-save"),
        ("*nat\n*filter\nCOMMIT\n", 2, "begins a table before the COMMIT of table nat"),
        ("*nat\nCOMMIT\n-A KUBE-SERVICES -j KUBE-NODEPORTS\n", 3, "stands in no table"),
        ("COMMIT\n*nat\nCOMMIT\n", 1, "stands in no table"),
        ("*nat\n-A\nCOMMIT\n", 2, "'-A' is no line"),
        ("*nat\n-X KUBE-SERVICES\nCOMMIT\n", 2, "is no line"),
        ("*nat\n" + "x" * 10_000 + "\nCOMMIT\n", 2, "x..."),
        ("*nat\n:KUBE-SERVICES - [0:0]\n", 3, "ends inside table nat, before its COMMIT"),
        (GOOD + GOOD, 19, "table nat of IPv4 is given a second time (dump1, line 3, has it too)"),
    ],
)
def test_what_is_no_dump_is_refused(text: str, line: int, part: str) -> None:
    with pytest.raises(ManifestError) as caught:
        reading(text)
    said = str(caught.value)
    assert said.startswith(f"dump1: line {line}: " if line else "dump1: no ")
    assert part in said
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize(
    "command", [["import"], ["explain", "--from", "::1", "--to", "::2/icmpv6"]]
)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"*nat\n\xff\nCOMMIT\n", "is not UTF-8 text at byte 6"),
        (b"nonsense", "line 1: 'nonsense' is no line of iptables-save"),
        (None, "cannot be read: no such file"),
    ],
)
def test_the_commands_say_it_in_one_sentence(
    cli: RunCli, tmp_path: Path, command: list[str], content: bytes | None, part: str
) -> None:
    file = tmp_path / "dump"
    if content is not None:
        file.write_bytes(content)
    flag = ["--iptables-save"] if command[0] == "explain" else []
    status, out, err = cli(*command, *flag, str(file))
    assert (status, out) == (2, "")
    assert err.startswith(f"nfqproxy: {file}: ")
    assert part in err
    assert err.count("\n") == 1


ONE_ODD = f"{NODE_PORT} KUBE-SVC-W".replace("-m tcp", "-m limit")
"""A rule beside a Service that is understood."""


def test_import_prints_the_rest_and_names_what_is_lost(cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "dump"
    text = web(shares(0.5, None), ONE_ODD)
    file.write_text(text)
    line = text.split("\n").index(ONE_ODD) + 1
    said = f'{file}: line {line}: -m "limit" is not understood; the rule is left out'
    status, out, err = cli("import", str(file), "-o", "json")
    assert status == 0
    assert [item["kind"] for item in json.loads(out)["items"]] == ["Service", "EndpointSlice"]
    assert said in err
    status, out, err = cli("import", "--strict", str(file))
    assert (status, out) == (2, "")
    assert said in err
    assert err.splitlines()[-1].startswith("nfqproxy: 1 rules are not understood")


@pytest.mark.parametrize(
    "command", [["import"], ["explain", "--from", "::1", "--to", "::2/icmpv6"]]
)
def test_rules_of_which_none_is_understood(cli: RunCli, tmp_path: Path, command: list[str]) -> None:
    """As of kube-proxy in IPVS mode."""
    file = tmp_path / "dump"
    rule = "-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT"
    file.write_text(f"*nat\n:KUBE-SERVICES - [0:0]\n{rule}\nCOMMIT\n")
    flag = ["--iptables-save"] if command[0] == "explain" else []
    status, out, err = cli(*command, *flag, str(file))
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"nfqproxy: {file}: holds no Service that can be read (line 3: -m ")
    assert "iptables mode" in last


def test_one_source_at_a_time(cli: RunCli, tmp_path: Path) -> None:
    packet = ["--from", "10.0.0.1", "--to", "10.96.0.10:80/tcp"]
    status, out, err = cli("explain", "--manifests", "a", "--iptables-save", "b", *packet)
    assert (status, out) == (2, "")
    assert err == "nfqproxy: --iptables-save: stands beside manifests; give one of the two\n"


def test_overlay_by_rules_needs_all_services(cli: RunCli, tmp_path: Path) -> None:
    """No label is in them that could choose one."""
    file = tmp_path / "dump"
    file.write_text(GOOD)
    asked = ["--from", "10.0.0.1", "--to", "10.96.0.10:80/tcp", "--mode", "overlay"]
    status, out, err = cli("explain", "--iptables-save", str(file), *asked)
    assert (status, out) == (2, "")
    assert "give --steer-all" in err


# ------------------------------------------------------------------ rules that nobody writes


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


ODD = {
    "unknown option": (replaced("-m tcp --dport 80", "-m tcp --dport 80 --limit 1/s"), '"--limit"'),
    "no value": (replaced("-j KUBE-SVC-W", "-j"), "-j has no value"),
    "a module": (replaced("-m tcp", "-m limit"), '-m "limit" is not understood'),
    "mode": (replaced("--mode random", "--mode nth"), '--mode "nth" is not understood'),
    "negated": (replaced("-p tcp", "! -p tcp"), "! -p is not understood"),
    "twice": (replaced("-p tcp", "-p tcp -p tcp"), "-p is given twice"),
    "open quote": (replaced('cluster IP"', "cluster IP"), "has no end"),
    "no address": (replaced("10.96.0.10/32", "10.96.0.300/32"), '"10.96.0.300/32" is no address'),
    "a network": (replaced("10.96.0.10/32", "10.96.0.0/24"), "10.96.0.0/24 is not one address"),
    "other family": (replaced("10.96.0.10/32", "fd00::1/128"), '"fd00::1/128" is not IPv4'),
    "port": (replaced("--dport 80", "--dport 65536"), '--dport "65536" is no number'),
    "long port": (replaced("--dport 80", "--dport " + "1" * 5000), "is no number from 1 to 65535"),
    "chance": (replaced("0.50000000000", "1.5"), '--probability "1.5" is no number from 0 to 1'),
    "protocol": (replaced("-p tcp", "-p icmp"), '-p "icmp" is not understood'),
    "endpoint": (replaced(f"{A}:8080", f"{A}-{B}:8080"), "--to-destination"),
    "endpoint's port": (replaced(f"{A}:8080", f"{A}:0"), "--to-destination"),
    "no name": (replaced("default/web:http cluster IP", "hello"), "no comment that names a Service"),
    "no role": (replaced("cluster IP", "something"), '"something" says not which address'),
    "bad name": (replaced("default/web:http cluster", "Default/w_b:http cluster"), "left out"),
    "quote in a name": (replaced("web:http cluster", 'web:h\\"p cluster'), "no comment that names"),
    "elsewhere": (replaced("-j KUBE-SVC-W", "-j LOG"), "a jump to LOG is not understood here"),
    "an endpoint": (replaced("-j KUBE-SVC-W", "-j KUBE-SEP-A"), "a jump to KUBE-SEP-A is not"),
    "loopback endpoint": (GOOD.replace(A, "127.0.0.1"), "127.0.0.1 is a loopback address"),
    "hairpin": (replaced(f"-s {A}/32", f"-s {B}/32"), f"masquerades {B}/32, though the endpoint"),
    "loop": (replaced("-A KUBE-SVC-W -m stat", "-A KUBE-SVC-W -j KUBE-SVC-W\n-A KUBE-SVC-W -m stat"), "KUBE-SVC"),
    "second endpoint": (GOOD.replace("-A KUBE-SEP-B", "-A KUBE-SEP-A"), "a second endpoint"),
    "rest": (replaced("-A KUBE-SVC-W -j KUBE-SEP-B", ""), "takes not all that is left"),
    "unreached": (web(shares(None, 0.5)), "not in kube-proxy's order"),
    "behind": (web(shares(None, None)), "stands behind a rule of chain KUBE-SVC-W that takes all"),
    "undeclared": (replaced(f"{CLUSTER_IP} KUBE-SVC-W\n", ""), "is led to by no rule"),
    "no cluster IP": (
        web(shares(None)).replace(CLUSTER_IP, NODE_PORT),
        "no rule says its cluster IP",
    ),
    "two cluster IPs": (
        replaced("*nat\n", "*nat\n" + CLUSTER_IP.replace("10.96.0.10", "10.96.0.11") + " KUBE-SVC-W\n"),
        "a second cluster IP beside 10.96.0.11",
    ),
    "two node ports": (
        web(shares(None), f"{NODE_PORT} KUBE-SVC-W\n{NODE_PORT.replace('30080', '30081')} KUBE-SVC-W"),
        "a second node port beside 30080",
    ),
    "affinity": (
        web(
            "\n".join(
                f"-A KUBE-SVC-W -m recent --rcheck --seconds {n} --reap --rsource -j KUBE-SEP-A"
                for n in (5, 6)
            )
            + "\n"
            + shares(None)
        ),
        "an affinity of 6 s after one of 5 s",
    ),
}  # fmt: skip


def test_a_firewall_that_is_not_understood_leaves_nothing_open() -> None:
    vip = CLUSTER_IP.replace("cluster IP", "loadbalancer IP").replace("10.96.0.10", "198.51.100.7")
    ranges = "-A KUBE-FW-W -m set --match-set allowed src -j KUBE-SVC-W"
    found = reading(web(shares(None), f"{vip} KUBE-FW-W\n{ranges}"))
    (service,) = (item for item in found.objects if isinstance(item, Service))
    assert service.load_balancer_ips == ()
    assert [loss.problem.partition(";")[0] for loss in found.losses] == [
        "no rule of chain KUBE-FW-W is understood",
        '-m "set" is not understood',
    ]


@pytest.mark.parametrize(("text", "part"), ODD.values(), ids=ODD)
def test_a_rule_that_is_not_understood_is_named(text: str, part: str) -> None:
    found = reading(text)
    assert found.losses
    lines = text.split("\n")
    for loss in found.losses:
        assert 1 <= loss.line <= len(lines)
        assert "KUBE-" in lines[loss.line - 1]
        assert "\n" not in str(loss)
        assert len(str(loss)) < 350
    assert any(part in loss.problem for loss in found.losses), [str(x) for x in found.losses]


def test_counters_and_bare_words_are_understood() -> None:
    """iptables-save -c, and comments that iptables need not quote."""
    text = GOOD.replace("-A KUBE", "[12:345] -A KUBE").replace(
        '"default/web:http"', "default/web:http"
    )
    assert reading(text) == reading(GOOD)


# ------------------------------------------------------------------------------------ cuts


SOMEWHERE = st.integers(0, 2**20)
"""A place in any dump, counted round."""


def told(found: Reading) -> set[tuple[str, ...]]:
    """Everything the objects say of frontends and endpoints."""
    result: set[tuple[str, ...]] = set()
    for item in found.objects:
        if isinstance(item, Service):
            result |= {(item.name, text) for text in (*item.cluster_ips, *item.external_ips)}
            result |= {(item.name, text) for text in item.load_balancer_ips}
            result |= {(item.name, str(port.port), str(port.node_port)) for port in item.ports}
        elif isinstance(item, EndpointSlice):
            result |= {
                (item.service, port.name, f"{each.address} {port.port}")
                for port in item.ports
                for each in item.endpoints
            }
    return result


@given(at=SOMEWHERE)
def test_a_dump_that_ends_too_soon_is_refused(at: int) -> None:
    text = shared(FOUR)
    at %= len(text) + 1
    try:
        found = reading(text[:at])
    except ManifestError as error:
        assert str(error).startswith("dump1: ")  # noqa: PT017 - either is right
        return
    # Behind the last COMMIT stands nothing but a comment.
    assert at >= text.rindex("COMMIT") + len("COMMIT")
    assert found == reading(text)


@given(data=st.data())
def test_a_dump_with_a_hole_tells_a_part_and_names_what_is_gone(data: st.DataObject) -> None:
    text = shared(FOUR)
    lines = text.split("\n")
    begin = data.draw(st.integers(0, len(lines)))
    end = data.draw(st.integers(begin, len(lines)))
    try:
        found = reading("\n".join(lines[:begin] + lines[end:]))
    except ManifestError:
        return
    whole = told(reading(text))
    left = told(found)
    ports = {each for each in left if len(each) == 3 and each[1].isdecimal()}
    # A port without its node port is a part, too; a stand-in is not in the rules.
    assert {each for each in left - whole - ports if "192.0.0.8" not in each[-1]} == set()
    endpoints = {each for each in whole - left if " " in each[-1] and "192.0.0.8" not in each[-1]}
    if endpoints:
        assert found.losses, endpoints


@given(at=SOMEWHERE)
def test_an_excerpt_that_ends_too_soon_tells_a_part(at: int) -> None:
    text = shared(EXCERPT)
    at %= len(text) + 1
    try:
        found = reading(text[:at])
    except ManifestError:
        return
    assert told(found) <= told(reading(text))
    if told(found) < told(reading(text)):
        assert found.losses


@given(data=st.data())
def test_a_dump_with_a_few_other_bytes_breaks_nothing(data: st.DataObject) -> None:
    text = shared(data.draw(st.sampled_from([FOUR, SIX, EXCERPT])))
    at = data.draw(st.integers(0, len(text)))
    width = data.draw(st.integers(0, 20))
    junk = data.draw(st.text(max_size=20) | st.sampled_from(['"', "! ", "-j ", "KUBE-SVC-", "\n"]))
    try:
        found = reading(text[:at] + junk + text[at + width :])
    except ManifestError as error:
        assert re.match(r"dump1: (line \d+: |no chain)", str(error))  # noqa: PT017
        return
    assert len(found.documents) == len(found.objects)


# ------------------------------------------------------------------------------ the source


def test_what_kube_proxy_goes_by_and_the_proxy_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "dump"
    file.write_text(shared(FOUR))
    for cidr, expected in (
        (
            "",
            [
                "kube-proxy's rules go by clusterCIDR 10.244.0.0/16, this proxy has none; give"
                " --cluster-cidr to decide as they do"
            ],
        ),
        ("10.244.0.0/16", []),
    ):
        caplog.clear()
        config = ProxyConfig(iptables_save=(str(file),), cluster_cidr=cidr)
        source = IptablesSaveSource(config, list, node_name="n1")
        assert len(source.load().services) == 13
        assert [record.getMessage() for record in caplog.records] == expected


def test_live_rules_are_taken_when_they_are_the_same_twice() -> None:
    """kube-proxy writes one table after the other; counters and dates are no change."""
    tables = iter(["a", "b", "# date\nc [1:2]", "# other date\nc [3:4]", "c [5:6]", "d", "d"])
    live = LiveRules(lambda: [Dump("iptables-save", next(tables))])
    assert live()[0].text.endswith("c [3:4]")
    assert live()[0].text == "c [5:6]"
    assert live()[0].text == "d"
    assert next(tables, None) is None
