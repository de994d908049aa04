"""The shapes in which kube-proxy has written its chains, v1.2 to v1.37, and what they mean.

Each shape is as k8s.io/kubernetes pkg/proxy/iptables/proxier.go of its time makes it.
"""

import json

import pytest

from nfqproxy.control.objects import EndpointSlice, Service
from nfqproxy.control.table import service_ports
from nfqproxy.model import Family, ServicePort, TrafficPolicy
from nfqproxy.sources.file import as_objects
from nfqproxy.sources.iptables.manifests import ELSEWHERE
from nfqproxy.sources.iptables.source import Reading
from tests.kernel.snapshot import shared
from tests.unit.sources.iptables.dumps import (
    CLUSTER_IP,
    PODS,
    A,
    B,
    C,
    endpoint,
    reading,
    save,
    shares,
    web,
)

LOCAL = TrafficPolicy.LOCAL


def port(found: Reading, family: Family = Family.IPV4) -> ServicePort:
    """The one service port of this family; nothing was lost."""
    assert [str(loss) for loss in found.losses] == []
    items = {item.name: item for item in found.objects}
    assert len(items) == len(found.objects)
    keyed = {(type(item), "", item.name): item for item in found.objects}
    table = service_ports(as_objects(keyed), node_name="n1")
    (only,) = (each for each in table.values() if each.name.family is family)
    return only


def local(found: ServicePort) -> list[str]:
    return [each.address for each in found.endpoints if each.node == "n1"]


def weights(found: ServicePort) -> dict[str, int]:
    return {each.address: each.weight for each in found.endpoints}


SAID = '-m comment --comment "what it is for"'
EQUAL = shares(0.33333333349, 0.5, None)
NODE_PORT = '-p tcp -m comment --comment "default/web:http" -m tcp --dport 30080'
"""Of a rule in KUBE-NODEPORTS."""
EXTERNAL_IP = (
    '-d 203.0.113.9/32 -p tcp -m comment --comment "default/web:http external IP" -m tcp --dport 80'
)
VIP = '-d 198.51.100.7/32 -p tcp -m comment --comment "default/web:http loadbalancer IP" -m tcp --dport 80'


# ------------------------------------------------------------------------- policy Cluster

CLUSTER = {
    "v1.2: masquerade in KUBE-SERVICES and KUBE-NODEPORTS": f"""
-A KUBE-SERVICES {EXTERNAL_IP} -j KUBE-MARK-MASQ
-A KUBE-SERVICES {EXTERNAL_IP} -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j KUBE-SVC-W
-A KUBE-SERVICES {EXTERNAL_IP} -m addrtype --dst-type LOCAL -j KUBE-SVC-W
-A KUBE-SERVICES {VIP} -j KUBE-FW-W
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-MARK-MASQ
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-SVC-W
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-MARK-DROP
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-SVC-W""",
    "v1.20: masquerade in KUBE-SVC": f"""
-A KUBE-SERVICES {EXTERNAL_IP} -j KUBE-SVC-W
-A KUBE-SERVICES {VIP} -j KUBE-FW-W
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-MARK-MASQ
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-SVC-W
-A KUBE-FW-W -m comment --comment "default/web:http loadbalancer IP" -j KUBE-MARK-DROP
-A KUBE-SVC-W ! -s {PODS} {EXTERNAL_IP} -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-SVC-W
-A KUBE-SVC-W {NODE_PORT} -j KUBE-MARK-MASQ""",
    "v1.24: KUBE-EXT": f"""
-A KUBE-SERVICES {EXTERNAL_IP} -j KUBE-EXT-W
-A KUBE-SERVICES {VIP} -j KUBE-EXT-W
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W {SAID} -j KUBE-MARK-MASQ
-A KUBE-EXT-W -j KUBE-SVC-W""",
    "v1.30: loopback node ports counted": f"""
-A KUBE-SERVICES {EXTERNAL_IP} -j KUBE-EXT-W
-A KUBE-SERVICES {VIP} -j KUBE-EXT-W
-A KUBE-NODEPORTS -d 127.0.0.0/8 {NODE_PORT} -m nfacct --nfacct-name localhost_nps_accepted_pkts -j KUBE-EXT-W
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W {SAID} -j KUBE-MARK-MASQ
-A KUBE-EXT-W -j KUBE-SVC-W""",
}


@pytest.mark.parametrize("rules", CLUSTER.values(), ids=CLUSTER)
def test_every_frontend_of_policy_cluster(rules: str) -> None:
    found = port(reading(web(EQUAL, rules)))
    assert str(found.name) == "default/web:http"
    assert (found.cluster_ip, found.port, found.node_port) == ("10.96.0.10", 80, 30080)
    assert found.external_ips == ("203.0.113.9",)
    assert found.load_balancer_ips == ("198.51.100.7",)
    assert found.load_balancer_source_ranges == ()
    assert LOCAL not in (found.internal_policy, found.external_policy)
    assert weights(found) == {A: 1, B: 1, C: 1}
    assert {each.port for each in found.endpoints} == {8080}
    assert local(found) == []


# --------------------------------------------------------------------------- policy Local

LOCAL_B = {
    "v1.5: KUBE-XLB": f"""
-A KUBE-NODEPORTS -s 127.0.0.0/8 {NODE_PORT} -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-XLB-W
-A KUBE-XLB-W -s {PODS} {SAID} -j KUBE-SVC-W
-A KUBE-XLB-W -m comment --comment "Balancing rule 0 for default/web:http" -j KUBE-SEP-B""",
    "v1.15: the node too": f"""
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-XLB-W
-A KUBE-XLB-W -s {PODS} {SAID} -j KUBE-SVC-W
-A KUBE-XLB-W {SAID} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-XLB-W {SAID} -m addrtype --src-type LOCAL -j KUBE-SVC-W
-A KUBE-XLB-W -m comment --comment "Balancing rule 0 for default/web:http" -j KUBE-SEP-B""",
    "v1.24: KUBE-EXT and KUBE-SVL": f"""
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W -s {PODS} {SAID} -j KUBE-SVC-W
-A KUBE-EXT-W {SAID} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-W {SAID} -m addrtype --src-type LOCAL -j KUBE-SVC-W
-A KUBE-EXT-W -j KUBE-SVL-W
-A KUBE-SVL-W -m comment --comment "default/web:http -> {B}:8080" -j KUBE-SEP-B""",
    "pods told by their interface": f"""
-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W -i veth+ -j KUBE-SVC-W
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-SVC-W
-A KUBE-EXT-W -j KUBE-SVL-W
-A KUBE-SVL-W -j KUBE-SEP-B""",
}


@pytest.mark.parametrize("rules", LOCAL_B.values(), ids=LOCAL_B)
def test_external_policy_local(rules: str) -> None:
    found = port(reading(web(EQUAL, rules)))
    assert (found.external_policy, found.node_port) == (LOCAL, 30080)
    assert found.internal_policy is not LOCAL
    assert sorted(weights(found)) == [A, B, C]
    assert local(found) == [B]


NOWHERE = '-m comment --comment "default/web:http has no local endpoints"'
LOCAL_NONE = {
    "v1.5": (
        f"-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-XLB-W\n-A KUBE-XLB-W {NOWHERE} -j KUBE-MARK-DROP",
        "",
    ),
    "v1.24": (
        f"""-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-SVC-W
-A KUBE-EXT-W -j KUBE-SVL-W
-A KUBE-SVL-W {NOWHERE} -j KUBE-MARK-DROP""",
        "",
    ),
    "v1.26": (
        f"""-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-SVC-W""",
        f"-A KUBE-EXTERNAL-SERVICES -p tcp {NOWHERE} -m addrtype --dst-type LOCAL -m tcp --dport 30080"
        " -j DROP",
    ),
}


@pytest.mark.parametrize(("rules", "refusals"), LOCAL_NONE.values(), ids=LOCAL_NONE)
def test_external_policy_local_without_a_local_endpoint(rules: str, refusals: str) -> None:
    found = port(reading(web(EQUAL, rules, refusals)))
    assert (found.external_policy, found.node_port) == (LOCAL, 30080)
    assert sorted(weights(found)) == [A, B, C]
    assert local(found) == []


def test_internal_policy_local() -> None:
    """KUBE-SVL holds this node's endpoints, and nothing tells the others."""
    found = port(reading(web(shares(None)).replace("KUBE-SVC-", "KUBE-SVL-")))
    assert (found.internal_policy, weights(found), local(found)) == (LOCAL, {A: 1}, [A])


def test_internal_policy_local_without_a_local_endpoint() -> None:
    """Silence and not a refusal: somewhere there are endpoints."""
    rule = CLUSTER_IP.replace("cluster IP", "has no local endpoints")
    found = port(reading(save(filter_=f"{rule} DROP")))
    assert (found.internal_policy, found.cluster_ip) == (LOCAL, "10.96.0.10")
    assert weights(found) == {ELSEWHERE[Family.IPV4]: 1}
    assert local(found) == []


def _external_local(local_endpoints: str) -> str:
    return f"""-A KUBE-NODEPORTS {NODE_PORT} -j KUBE-EXT-W
-A KUBE-EXT-W -m addrtype --src-type LOCAL -j KUBE-SVC-W
-A KUBE-EXT-W -j KUBE-SVL-W
{local_endpoints}"""


def test_what_only_this_node_serves_is_draining_when_nothing_else_here_is_there() -> None:
    found = reading(web(shares(None), _external_local("-A KUBE-SVL-W -j KUBE-SEP-B")))
    by_address = {each.address: each for each in port(found).endpoints}
    assert (by_address[A].ready, by_address[A].node) == (True, None)
    drained = by_address[B]
    assert (drained.ready, drained.serving, drained.terminating) == (False, True, True)
    assert drained.node == "n1"


def test_what_only_this_node_serves_is_hinted_elsewhere_when_more_is_here() -> None:
    both = (
        "-A KUBE-SVL-W -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A\n"
        "-A KUBE-SVL-W -j KUBE-SEP-B"
    )
    found = port(reading(web(shares(None), _external_local(both))))
    by_address = {each.address: each for each in found.endpoints}
    assert {a: (e.ready, e.node, e.node_hints) for a, e in by_address.items()} == {
        A: (True, "n1", ("n1",)),
        B: (True, "n1", ("elsewhere",)),
    }


# ---------------------------------------------------------------------------- refusals

REFUSED = CLUSTER_IP.replace("cluster IP", "has no endpoints")
REFUSED_EXTERNAL = EXTERNAL_IP.replace("external IP", "has no endpoints")
REFUSED_NODE_PORT = NODE_PORT.replace("default/web:http", "default/web:http has no endpoints")
REJECT = "REJECT --reject-with icmp-port-unreachable"


@pytest.mark.parametrize("chain", ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"])
def test_no_endpoints(chain: str) -> None:
    """External addresses stood in KUBE-SERVICES before v1.9."""
    found = port(
        reading(
            save(
                filter_=f"""{REFUSED} {REJECT}
-A {chain} {REFUSED_EXTERNAL} -j {REJECT}
-A {chain} -m addrtype --dst-type LOCAL {REFUSED_NODE_PORT} -j {REJECT}"""
            )
        )
    )
    assert (found.cluster_ip, found.port, found.node_port) == ("10.96.0.10", 80, 30080)
    assert found.external_ips == ("203.0.113.9",)
    assert found.endpoints == ()


# ------------------------------------------------------------------- ranges, affinity, health

RANGES = {
    "v1.5": """-A KUBE-FW-W -m comment --comment "x" -j KUBE-MARK-MASQ
-A KUBE-FW-W -s 192.0.2.0/24 -m comment --comment "x" -j KUBE-SVC-W
-A KUBE-FW-W -s 198.18.0.0/15 -m comment --comment "x" -j KUBE-SVC-W
-A KUBE-FW-W -m comment --comment "x" -j KUBE-MARK-DROP""",
    "v1.26": """-A KUBE-FW-W -s 192.0.2.0/24 -m comment --comment "x" -j KUBE-EXT-W
-A KUBE-FW-W -s 198.18.0.0/15 -m comment --comment "x" -j KUBE-EXT-W
-A KUBE-FW-W -m comment --comment "other traffic to default/web:http will be dropped by KUBE-PROXY-FIREWALL"
-A KUBE-EXT-W -j KUBE-MARK-MASQ
-A KUBE-EXT-W -j KUBE-SVC-W""",
}


@pytest.mark.parametrize("rules", RANGES.values(), ids=RANGES)
def test_source_ranges(rules: str) -> None:
    found = port(reading(web(EQUAL, f"-A KUBE-SERVICES {VIP} -j KUBE-FW-W\n{rules}")))
    assert found.load_balancer_ips == ("198.51.100.7",)
    assert found.load_balancer_source_ranges == ("192.0.2.0/24", "198.18.0.0/15")


def test_affinity() -> None:
    recent = "-m recent --rcheck --seconds 600 --reap --name KUBE-SEP-{0} --mask 255.255.255.255 --rsource"
    checks = "\n".join(f"-A KUBE-SVC-W {recent.format(each)} -j KUBE-SEP-{each}" for each in "ABC")
    remembers = "-m recent --set --name KUBE-SEP --mask 255.255.255.255 --rsource -m tcp -j DNAT"
    found = port(reading(web(f"{checks}\n{EQUAL}").replace("-m tcp -j DNAT", remembers)))
    assert found.affinity_timeout_s == 600
    assert weights(found) == {A: 1, B: 1, C: 1}


def test_health_check_node_port() -> None:
    rules = f"-A KUBE-SERVICES {VIP} -j KUBE-XLB-W\n-A KUBE-XLB-W -j KUBE-SEP-A"
    health = (
        '-p tcp -m comment --comment "default/web:http health check node port" -m tcp --dport 30999'
    )
    found = port(reading(web(EQUAL, rules, f"-A KUBE-NODEPORTS {health} -j ACCEPT")))
    assert found.health_check_node_port == 30999


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        ((0.33332999982, 0.5, None), {A: 1, B: 1, C: 1}),  # five digits, before v1.19
        ((0.5, 0.6, None), {A: 5, B: 3, C: 2}),
        ((0.9, None), {A: 9, B: 1}),
        ((0.0, None), {A: 0, B: 1}),
    ],
)
def test_chances_become_weights(
    chances: tuple[float | None, ...], expected: dict[str, int]
) -> None:
    found = reading(web(shares(*chances)))
    assert weights(port(found)) == expected
    (service,) = (item for item in found.objects if isinstance(item, Service))
    assert bool(service.weights) is (set(expected.values()) != {1})


def test_weights_that_differ_by_port_stand_on_slices() -> None:
    """The Service's annotation goes by address, whatever the port."""
    other = CLUSTER_IP.replace("web:http", "web:https").replace("80", "443")
    chain = shares(0.5, None).replace("SVC-W", "SVC-X")
    found = reading(web(shares(0.75, None), f"{other} KUBE-SVC-X\n{chain}"))
    assert found.losses == ()
    slices = [item for item in found.objects if isinstance(item, EndpointSlice)]
    assert {
        (
            item.weight,
            *(each.name for each in item.ports),
            *(each.address for each in item.endpoints),
        )
        for item in slices
    } == {(3, "http", A), (None, "http", B), (None, "https", A, B)}


def test_ports_of_the_same_endpoints_share_a_slice() -> None:
    dns = shared("kube-proxy-1.30-iptables.save")
    slices = [
        item
        for item in reading(dns).objects
        if isinstance(item, EndpointSlice) and item.service == "kube-dns"
    ]
    (only,) = slices
    assert {(each.name, each.protocol.name) for each in only.ports} == {
        ("dns", "UDP"),
        ("dns-tcp", "TCP"),
    }


# ------------------------------------------------------------------------------ families


def test_both_families_become_one_service() -> None:
    six = save(
        CLUSTER_IP.replace("10.96.0.10/32", "fd00:10:96::10/128")
        + " KUBE-SVC-W\n-A KUBE-SVC-W -j KUBE-SEP-D\n"
        + endpoint("KUBE-SEP-D", "fd00:10:244:1::10", 8080)
    )
    four = web(EQUAL)
    for texts in ((four, six), (six, four), (four + six,)):
        found = reading(*texts)
        (service,) = (item for item in found.objects if isinstance(item, Service))
        assert service.cluster_ips == ("10.96.0.10", "fd00:10:96::10")
        assert weights(port(found, Family.IPV6)) == {"fd00:10:244:1::10": 1}


# --------------------------------------------------------------------------- configuration

MASQUERADE = CLUSTER_IP.replace("-A KUBE-SERVICES", "-A KUBE-SVC-W {}") + " KUBE-MARK-MASQ"
OLD_MASQUERADE = CLUSTER_IP.replace("-A KUBE-SERVICES", "-A KUBE-SERVICES {}") + " KUBE-MARK-MASQ"


@pytest.mark.parametrize("rule", [MASQUERADE, OLD_MASQUERADE])
@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (f"! -s {PODS}", {"clusterCIDR": PODS}),
        (
            "! -i cni0",
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
        ),
        (
            "! -i veth+",
            {
                "detectLocalMode": "InterfaceNamePrefix",
                "detectLocal": {"interfaceNamePrefix": "veth"},
            },
        ),
        ("", {"masqueradeAll": True}),
    ],
)
def test_whom_kube_proxy_masquerades(rule: str, who: str, expected: dict[str, object]) -> None:
    found = reading(web(EQUAL, rule.format(who)))
    assert found.losses == ()
    settings = found.configuration
    names = ("clusterCIDR", "detectLocalMode", "detectLocal", "masqueradeAll")
    assert {name: settings[name] for name in names if name in settings} == expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            ["-m addrtype --dst-type LOCAL"],
            {"nodePortAddresses": ["0.0.0.0/0"], "localhostNodePorts": True},
        ),
        (["! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL"], {"nodePortAddresses": ["0.0.0.0/0"]}),
        (
            ["-d 192.0.2.1/32", "-d 192.0.2.101/32"],
            {"nodePortAddresses": ["192.0.2.1/32", "192.0.2.101/32"]},
        ),
    ],
)
def test_where_kube_proxy_serves_node_ports(rules: list[str], expected: dict[str, object]) -> None:
    last = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
    jumps = "\n".join(f"-A KUBE-SERVICES {rule} -j KUBE-NODEPORTS" for rule in rules)
    found = reading(web(EQUAL).replace(last, jumps))
    assert found.losses == ()
    assert {name: found.configuration.get(name) for name in expected} == expected
    assert ("localhostNodePorts" in found.configuration) is ("localhostNodePorts" in expected)


# --------------------------------------------------------------- excerpts, as iptables -S prints


def test_the_project_s_first_excerpt() -> None:
    found = port(reading(shared("origin-mysql-service.rules")))
    assert str(found.name) == "default/mysql-service"
    assert (found.cluster_ip, found.port, found.node_port) == ("10.254.162.44", 3306, 30964)
    assert weights(found) == {"192.168.125.129": 1, "192.168.125.131": 1}


def test_an_excerpt_names_what_is_missing_in_it() -> None:
    """It was sorted and cut: of three endpoints one is told."""
    found = reading(shared("origin-kubernetes-bootcamp.rules"))
    (service,) = (item for item in found.objects if isinstance(item, Service))
    assert (service.name, service.cluster_ips) == ("kubernetes-bootcamp-v1", ("10.106.224.41",))
    (only,) = (item for item in found.objects if isinstance(item, EndpointSlice))
    assert [each.address for each in only.endpoints] == ["10.244.1.2"]
    assert [(loss.line, loss.problem) for loss in found.losses] == [
        (5, "leads to chain KUBE-SEP-IAZPHGLZVO2SWOVD, which is not there"),
        (
            5,
            "the rules of chain KUBE-SVC-RPP7DHNHMGOIIFDC are not in kube-proxy's order (was the text"
            " sorted?); all its endpoints are taken to share alike",
        ),
        (7, "leads to chain KUBE-SEP-SQBK6CVV7ZCKBTVI, which is not there"),
    ]


def test_the_documents_are_the_objects() -> None:
    """What import prints decodes to what the source gives."""
    found = reading(
        shared("kube-proxy-1.30-iptables.save"), shared("kube-proxy-1.30-ip6tables.save")
    )
    assert found.losses == ()
    assert json.loads(json.dumps(found.documents)) == list(found.documents)
    assert len(found.documents) == len(found.objects) == 26
