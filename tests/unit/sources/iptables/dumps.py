"""Dumps written for the tests, one for each way in which kube-proxy has written a thing."""

from collections.abc import Iterable

from nfqproxy.sources.iptables.source import Reading, interpret
from nfqproxy.sources.iptables.text import Dump

PODS = "10.244.0.0/16"
LAST = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"


def table(name: str, rules: Iterable[str]) -> str:
    """A table as iptables-save prints it, every chain declared."""
    rules = list(rules)
    chains = sorted({rule.split()[1] for rule in rules})
    lines = [f"*{name}", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT"]
    return "\n".join(lines) + "\n"


def save(nat: str = "", filter_: str = "") -> str:
    """Both tables, of rules one on a line."""
    both = (("filter", filter_), ("nat", f"{nat}\n{LAST}"))
    return "".join(table(name, [r for r in text.split("\n") if r]) for name, text in both)


def endpoint(chain: str, address: str, port: int, protocol: str = "tcp") -> str:
    """Rules of a KUBE-SEP chain, as all versions write them."""
    host = f"[{address}]" if ":" in address else address
    bits = 128 if ":" in address else 32
    return (
        f'-A {chain} -s {address}/{bits} -m comment --comment "default/web:http" -j KUBE-MARK-MASQ\n'
        f'-A {chain} -p {protocol} -m comment --comment "default/web:http" -m {protocol}'
        f" -j DNAT --to-destination {host}:{port}"
    )


def reading(*texts: str) -> Reading:
    """What these dumps say, of node n1."""
    dumps = [Dump(f"dump{number}", text) for number, text in enumerate(texts, 1)]
    return interpret(dumps, node_name="n1")


A, B, C = "10.244.1.10", "10.244.1.11", "10.244.2.10"
ENDPOINTS = {
    name: endpoint(f"KUBE-SEP-{name}", address, 8080)
    for name, address in zip("ABC", (A, B, C), strict=True)
}
"""Chains of the endpoints by name."""
CLUSTER_IP = (
    '-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "default/web:http cluster IP"'
    " -m tcp --dport 80 -j"
)


def web(balancing: str, more: str = "", filter_: str = "") -> str:
    """Service default/web of one port, with those endpoints that the rules lead to."""
    rules = f"{CLUSTER_IP} KUBE-SVC-W\n{balancing}\n{more}"
    chains = [each for name, each in ENDPOINTS.items() if f"-j KUBE-SEP-{name}" in rules]
    return save("\n".join((rules, *chains)), filter_)


def shares(*chances: float | None) -> str:
    """Rules of chain KUBE-SVC-W to endpoints A, B, ... with these chances; None: no condition."""
    return "\n".join(
        "-A KUBE-SVC-W"
        + ("" if chance is None else f" -m statistic --mode random --probability {chance:.11f}")
        + f" -j KUBE-SEP-{name}"
        for name, chance in zip("ABC", chances, strict=False)
    )
