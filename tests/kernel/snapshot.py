"""Everything rule-like in a namespace as text, so that before and after can be held against each other."""

import os
import re
from pathlib import Path

import pytest
import yaml

from nfqproxy.kernel.netns import Namespace
from tests.kernel.manifests import Manifest

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Rules that a real kube-proxy wrote; beside the repository, not in it."""

_COMMANDS = {
    "iptables-nft-save": ("iptables-nft-save",),
    "ip6tables-nft-save": ("ip6tables-nft-save",),
    "iptables-legacy-save": ("iptables-legacy-save",),
    "ip6tables-legacy-save": ("ip6tables-legacy-save",),
    "ipset list": ("ipset", "list"),
    "nft list ruleset": ("nft", "list", "ruleset"),
}
_COUNTERS = (
    (re.compile(r"\[\d+:\d+\]"), "[]"),
    (re.compile(r"counter packets \d+ bytes \d+"), "counter"),
)


def snapshot(namespace: Namespace) -> dict[str, str]:
    """The listing of each tool, without packet counters and dates."""
    found = {}
    for name, command in _COMMANDS.items():
        text = "".join(
            line + "\n"
            for line in namespace.run(*command).stdout.splitlines()
            if not line.startswith("#")
        )
        for pattern, replacement in _COUNTERS:
            text = pattern.sub(replacement, text)
        found[name] = text
    return found


def programmed(namespace: Namespace) -> dict[str, str]:
    """As ``snapshot``, without what differs by itself: known UDP flows, hash seeds, set sizes."""
    found = snapshot(namespace)
    lines = namespace.run("ipset", "save").stdout.splitlines()
    found["ipset list"] = "\n".join(
        sorted(
            re.sub(r" (hashsize|bucketsize|initval) \S+", "", line)
            for line in lines
            if not line.startswith("add nfqproxy-flows-")
        )
    )
    return found


def shared(name: str) -> str:
    """A file of the shared data; without it the test is skipped, or fails if CI=true."""
    file = SHARED_DATA / name
    if not file.is_file():
        needs = (
            f"needs ../shared/data/{name}, rules and manifests of a real kube-proxy; put it there"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(f"{needs} (CI=true forbids skipping)", pytrace=False)
        pytest.skip(needs)
    return file.read_text()


def shared_objects() -> list[Manifest]:
    """The objects that the kube-proxy of the shared data served."""
    items: list[Manifest] = yaml.safe_load(shared("services.yaml"))["items"]
    return items


def restore_kube_proxy(namespace: Namespace) -> None:
    """Put the rules of a real kube-proxy v1.30 on the node, both families; skips without the data."""
    for family in ("iptables", "ip6tables"):
        namespace.run(f"{family}-restore", stdin=shared(f"kube-proxy-1.30-{family}.save"))


FOREIGN = """\
*raw
:cali-PREROUTING - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -i lo -m comment --comment "cali:loopback" -j RETURN
COMMIT
*mangle
:cali-PREROUTING - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b2" -j cali-PREROUTING
-A cali-PREROUTING -p tcp -m comment --comment "cali:mark" -j MARK --set-xmark 0x10000/0xffff0000
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 172.17.0.2:443
COMMIT
*filter
:DOCKER-USER - [0:0]
:cali-FORWARD - [0:0]
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
-A cali-FORWARD -m mark --mark 0x20000/0x20000 -j ACCEPT
COMMIT
"""
"""Rules like those of Docker, Calico and kubelet, which share a node with the proxy."""


def restore_foreign(namespace: Namespace) -> None:
    """Put neighbours' rules, a set and an nft table beside what is there."""
    namespace.run("iptables-restore", "--noflush", stdin=FOREIGN)
    namespace.run("ipset", "create", "cali40all-ipam-pools", "hash:net")
    namespace.run("ipset", "add", "cali40all-ipam-pools", "10.244.0.0/16")
    namespace.run(
        *["nft", "-f", "-"],
        stdin="table inet firewalld { chain filter_INPUT { type filter hook input priority 10;"
        " counter accept; }; }\n",
    )
