"""The generated rules are those that a real kube-proxy v1.30 wrote for the same Services.

Compared is the whole dump but for the Services that no contender has: node ports, external
addresses, affinity, refusals.
"""

import re
from pathlib import Path

import pytest

from bench.contenders.kubeproxy_rules import iptables_rules, nftables_rules
from bench.services import Endpoint, ServicePort

DATA = Path(__file__).parents[3] / "../shared/data"
IPTABLES = DATA / "kube-proxy-1.30-iptables.save"
NFTABLES = DATA / "kube-proxy-1.30-nftables.nft"
CLUSTER_CIDR = "10.244.0.0/16"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the dumps lie beside the repository")


def service(
    name: str, address: str, port: str, *endpoints: str, namespace: str = "default"
) -> ServicePort:
    """``port`` as ``name number/protocol``, endpoints as ``address:port``."""
    port_name, number, protocol = re.split("[ /]", port)
    pairs = [endpoint.split(":") for endpoint in endpoints]
    return ServicePort(
        namespace=namespace,
        name=name,
        port_name=port_name,
        protocol=protocol,
        address=address,
        port=int(number),
        endpoints=tuple(Endpoint(address=where, port=int(at)) for where, at in pairs),
    )


def dns(port: str) -> ServicePort:
    endpoints = ("10.244.1.53:53", "10.244.2.53:53")
    return service("kube-dns", "10.96.0.53", port, *endpoints, namespace="kube-system")


WEB = service(
    "web", "10.96.0.10", "http 80/tcp", "10.244.1.10:8080", "10.244.1.11:8080", "10.244.2.10:8080"
)
API = service("kubernetes", "10.96.0.1", "https 443/tcp", "192.0.2.1:6443")
DRAINING = service("draining", "10.96.0.62", "http 80/tcp", "10.244.1.62:8080")
DNS = dns("dns 53/udp")
DNS_TCP = dns("dns-tcp 53/tcp")
OTHERS = ("shop", "shop-local", "lb", "lb-local", "ext", "sticky", "empty", "itp-remote", "dual")


def test_iptables_rules_are_line_by_line_those_of_kube_proxy() -> None:
    foreign = re.compile(rf"default/({'|'.join(OTHERS)}):|-A KUBE-EXT-")
    lines = [line for line in IPTABLES.read_text().splitlines() if not line.startswith("#")]
    foreign_chains = {
        name
        for line in lines
        if foreign.search(line)
        for name in re.findall(r"KUBE-(?:SVC|SEP|EXT|FW|SVL)-[A-Z2-7]{16}", line)
    }
    expected = [
        line
        for line in lines
        if not foreign.search(line) and line.split()[0][1:] not in foreign_chains
    ]
    # The order in which this kube-proxy happened to take its Services.
    services = [WEB, DNS, DNS_TCP, API, DRAINING]
    assert iptables_rules(services, CLUSTER_CIDR).splitlines() == expected


def nft_blocks(text: str) -> list[tuple[str, list[str]]]:
    """Head and body of each set, map and chain of the first table."""
    table = text.split("\ntable ")[0]
    blocks = []
    for head, body in re.findall(r"^\t((?:set|map|chain) \S+) \{\n(.*?)^\t\}", table, re.M | re.S):
        blocks.append((head, [line.strip() for line in body.splitlines()]))
    return blocks


def elements(body: list[str]) -> set[str]:
    """What a set or map holds, without the Services that no contender has."""
    text = " ".join(body)
    held = re.search(r"elements = \{ (.*) \}", text)
    found = {part.strip() for part in held[1].split(",")} if held else set()
    return {part for part in found if not re.search(rf"default/({'|'.join(OTHERS)})[/:]", part)}


def test_nftables_rules_are_block_by_block_those_of_kube_proxy() -> None:
    foreign = re.compile(rf"default/({'|'.join(OTHERS)})/")
    expected = [block for block in nft_blocks(NFTABLES.read_text()) if not foreign.search(block[0])]
    services = [DNS_TCP, API, DRAINING, WEB, DNS]
    made = nft_blocks(nftables_rules(services, CLUSTER_CIDR, "192.0.2.1"))
    assert [head for head, _body in made] == [head for head, _body in expected]
    for (head, body), (_head, wanted) in zip(made, expected, strict=True):
        if head.startswith("chain"):
            assert body == wanted
        elif head == "set cluster-ips":
            # It holds the addresses of the other Services as well.
            assert body[:2] == wanted[:2]
            assert elements(body) < elements(wanted)
        else:
            assert body[:2] == wanted[:2]
            assert elements(body) == elements(wanted)
    table = 'table ip kube-proxy {\n\tcomment "rules for kube-proxy"\n'
    assert NFTABLES.read_text().startswith(table)
    assert nftables_rules(services, CLUSTER_CIDR, "192.0.2.1").startswith(table)
