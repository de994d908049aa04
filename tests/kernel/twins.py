"""Twin clusters: the same hosts, pods and addresses; on node n1 nfqproxy, or the rules of a real kube-proxy.

The network is that of nfqproxy/lab/topology.py with two clients, three pods on n1 and two on n2, and:

- pod-1-11 and pod-1-12 are the endpoints on n1. Two of one Service are never in one namespace, or their packets
  to each other would stay inside it.
- pod-1-13 is no endpoint, and neither is pod-2-11. pod-2-12 is the endpoints on n2.
- n2 has no proxy, so its pods' packets come to n1 as they are; all that they send goes there, answers too.
- c2 also has addresses in the second source range of Service lb, and in none.
- The router of the segment owns all Service addresses: what n1 does not translate is answered by "outside",
  and is not merely silent.

Each endpoint answers with its own address and the client it saw.
"""

import errno
import socket
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address, ip_network

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Topology, topology
from nfqproxy.model import Family
from tests.kernel.manifests import Manifest
from tests.kernel.probes import REFUSED, SILENCE, ping, probe
from tests.kernel.responder import Responder, parse
from tests.kernel.rules_fixtures import ask
from tests.kernel.twin_cases import (
    BOUND_VIP,
    HEALTH_PORT,
    NODE,
    SECOND,
    SERVICE_CIDRS,
    SOURCES,
    Case,
    Place,
    Target,
    Who,
    targets,
)

_DRAWS = (1, 2, 32, 48)
"""Most connections by number of endpoints: a fair draw misses one of two in 5 of 10^10 cases, of three in 1 of
10^8."""
_FEW = 8
"""Fewest connections, where there are several endpoints; enough to see a client leave its sticky one."""
_AT_ONCE = 64
"""Probes at once from one namespace; those that meet silence only wait."""
_PATIENCE = 2
"""How often an unforeseen silence is asked again."""
OUTSIDE, HERE = "outside", "node"
_AROUND = (*SERVICE_CIDRS, "198.51.100.0/24", "203.0.113.0/24")
_SECOND_RANGE = "198.18.0.0/24"
_NO_ICMP_LIMIT = {"net/ipv4/icmp_ratemask": 0, "net/ipv6/icmp/ratemask": 2}


class Kind(StrEnum):
    """What becomes of a connection; the values stand in the documentation."""

    SERVED = "served"
    REFUSED = "refused"
    """ICMP port unreachable."""
    SILENCE = "silence"
    LEAVES = "leaves the node"
    """Untranslated, by the node's routes."""
    HERE = "answered by the node"
    CLOSED = "closed port"
    """Left to the node itself, where nobody listens: a TCP reset."""
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the connections of one case met."""

    kind: Kind
    seen: frozenset[tuple[str, str]] = frozenset()
    """Who answered (an endpoint's address or OUTSIDE), and the client address it saw."""
    other: str = ""
    """Of OTHER: what it was."""
    draws: Counter[str] = field(default_factory=Counter, compare=False)
    """How often each endpoint answered."""

    def __str__(self) -> str:
        pairs = ", ".join(f"{name} sees {client}" for name, client in sorted(self.seen))
        return f"{self.kind}{f' ({self.other or pairs})' if self.other or pairs else ''}"


Outcomes = dict[Case, Outcome]


class Twin:
    """One cluster; what its node n1 runs is the business of whoever has it built."""

    def __init__(self, built: Topology, responder: Responder, objects: Sequence[Manifest]) -> None:
        self.topology = built
        self.node = built.node.namespace
        self.responder = responder
        self._homes = {a: pod for pod in built.pods for a in (pod.address4, pod.address6)}
        self.node.sysctl(_NO_ICMP_LIMIT)
        # Deprecated (RFC 4862), as kubelet's dual-stack nodes do not have it: never chosen as a source.
        self.node.ip(*(f"{_address(address)} preferred_lft 0" for address in SECOND.values()))
        self._set_up_clients()
        devices = [pod.host_device for pod in built.pods_of("n2")]
        rules = [(family, "iif", device) for device in devices for family in Family]
        _by_way_of_n1(built.nodes[1].namespace, rules)
        asked = targets(objects)
        self._set_up_endpoints(asked)
        self._set_up_outside(asked)

    def _set_up_clients(self) -> None:
        client = self.topology.clients[1]
        outsiders = SOURCES[Who.OUTSIDER].values()
        client.namespace.ip(
            *(_address(address) for address in outsiders), f"route add local {_SECOND_RANGE} dev lo"
        )
        self.node.ip(
            f"route add {_SECOND_RANGE} via {client.address4}",
            *(
                f"route add {address} via {client.address6 if ':' in address else client.address4}"
                for address in outsiders
            ),
        )

    def _set_up_endpoints(self, asked: Sequence[Target]) -> None:
        nodes = {node.name: node.namespace for node in self.topology.nodes}
        for node, address, port in sorted({e for target in asked for e in target.endpoints}):
            if address not in self._homes:
                home = self.topology.pods_of(node)[1]
                home.namespace.ip(_address(address))
                scope = "" if ":" in address else " scope link"
                nodes[node].ip(f"route add {address} dev {home.host_device}{scope}")
                self._homes[address] = home
            self.responder.serve(self._homes[address].namespace, address, port, address)

    def _set_up_outside(self, asked: Sequence[Target]) -> None:
        outside = self.topology.router
        # A local route alone lets IPv4 sockets be bound, not those of IPv6.
        outside.sysctl(_NO_ICMP_LIMIT | {"net/ipv6/ip_nonlocal_bind": 1})
        outside.ip(*(f"route add local {network} dev lo" for network in _AROUND))
        # Answers pass n1 as the questions did: its conntrack sees both directions.
        networks = [ip_network(network) for network in _AROUND]
        rules = [(Family(network.version), "from", str(network)) for network in networks]
        _by_way_of_n1(outside, rules)
        for address, port in sorted({(t.address, t.port) for t in asked if t.port}):
            if any(ip_address(address) in network for network in networks):
                self.responder.serve(outside, OUTSIDE, port, address)

    def _namespace(self, case: Case) -> Namespace:
        if case.who in (Who.NODE, Who.VIP_OWNER):
            return self.node
        if case.who is Who.CLIENT:
            return self.topology.client.namespace
        if case.who in (Who.CLIENT_2, Who.OUTSIDER):
            return self.topology.clients[1].namespace
        return self._homes[case.source].namespace

    def observe(self, asked: Sequence[Case], may_be_silent: Container[Case]) -> Outcomes:
        """Ask all at once; what is served is asked as often as shows every endpoint.

        Silence where none is foreseen may be that of a busy machine, and is asked again.
        """
        # Apart, because a probe must not take the answer to a ping for its own.
        found = self._ask_at_once([case for case in asked if case.target.protocol is None])
        found |= self._ask_at_once([case for case in asked if case.target.protocol is not None])
        for _ in range(_PATIENCE):
            strange = [
                case
                for case, outcome in found.items()
                if outcome.kind is Kind.SILENCE and case not in may_be_silent
            ]
            found |= self._ask_at_once(strange)
        return found

    @contextmanager
    def bound_vip(self) -> Iterator[None]:
        """BOUND_VIP is an address of the node inside the block, as MetalLB's or kube-vip's users have it."""
        self.node.ip(f"addr add {BOUND_VIP}/32 dev lo")
        try:
            yield
        finally:
            self.node.ip(f"addr del {BOUND_VIP}/32 dev lo")

    def listen_for_health(self) -> None:
        """Answer on the health-check node port in place of a proxy's process."""
        self.responder.serve(self.node, HERE, HEALTH_PORT, NODE[Family.IPV4])

    def forget_connections(self) -> None:
        """Empty conntrack and the set of known UDP flows: nothing of before answers for what comes."""
        self.node.run("conntrack", "-F")
        for family in Family:
            self.node.run("ipset", "flush", f"nfqproxy-flows-{int(family)}")

    def _ask_at_once(self, asked: Iterable[Case]) -> Outcomes:
        places: dict[Namespace, list[Case]] = {}
        for case in asked:
            places.setdefault(self._namespace(case), []).append(case)

        def ask_from(place: Namespace) -> Outcomes:
            # Threads are born into the namespace of the thread that starts them.
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = pool.map(_ask, places[place])
                return dict(zip(places[place], found, strict=True))

        found: Outcomes = {}
        with ThreadPoolExecutor(max(1, len(places))) as pool:
            for outcomes in pool.map(lambda place: place.call(lambda: ask_from(place)), places):
                found |= outcomes
        return found


@contextmanager
def twin(responder: Responder, objects: Sequence[Manifest]) -> Iterator[Twin]:
    """Build a cluster without a proxy, and remove it."""
    with topology(clients=2, pods=(3, 2)) as built:
        yield Twin(built, responder, objects)


def _address(address: str) -> str:
    return (
        f"addr add {address}/128 dev eth0 nodad"
        if ":" in address
        else f"addr add {address}/32 dev eth0"
    )


def _by_way_of_n1(namespace: Namespace, rules: Iterable[tuple[Family, str, str]]) -> None:
    """Send what these selectors of ``ip rule`` match to node n1."""
    for family, address in NODE.items():
        everywhere = "::/0" if family is Family.IPV6 else "0.0.0.0/0"
        namespace.ip(f"route add {everywhere} via {address} table 100")
    for family, selector, value in rules:
        namespace.run("ip", f"-{int(family)}", "rule", "add", selector, value, "lookup", "100")


def _ask(case: Case) -> Outcome:
    # The kernel chooses the source of the node's own processes: the one explain is asked about.
    source = None if case.who is Who.NODE else (case.source, 0)
    target = case.target
    if target.protocol is None:
        return _outcome(case, ping(target.address, source))
    if target.place is Place.HEALTH:
        return _outcome(case, _http(target, source))
    first = _outcome(case, probe(target.key, source))
    if first.kind is not Kind.SERVED:
        return first
    outcomes = [first]
    missing = {address for _, address, _ in target.endpoints}
    most = _DRAWS[len(target.endpoints)]
    while len(outcomes) < most:
        missing -= {name for name, _ in outcomes[-1].seen}
        if len(outcomes) >= _FEW and (target.is_sticky or not missing):
            break
        next_one = _outcome(case, ask(target.key.protocol, target.address, target.port, source))
        if next_one.kind is not Kind.SERVED:
            return Outcome(kind=Kind.OTHER, other=f"served {len(outcomes)} times, then {next_one}")
        outcomes.append(next_one)
    return Outcome(
        kind=Kind.SERVED,
        seen=frozenset(pair for outcome in outcomes for pair in outcome.seen),
        draws=Counter(name for outcome in outcomes for name, _ in outcome.seen),
    )


def _http(target: Target, source: tuple[str, int] | None) -> str:
    """The first words of an answer to GET, or the name of an errno."""
    try:
        with socket.create_connection((target.address, target.port), 5.0, source) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return sock.recv(200).decode()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def _outcome(case: Case, answer: str) -> Outcome:
    """What one answer means."""
    if answer == SILENCE:
        return Outcome(kind=Kind.SILENCE)
    if answer == REFUSED[case.target.family]:
        return Outcome(kind=Kind.REFUSED)
    if answer == "ECONNREFUSED":
        return Outcome(kind=Kind.CLOSED)
    if answer == "echo":
        return Outcome(kind=Kind.LEAVES)
    if answer.startswith(("HTTP/", f"{HERE} ")):
        return Outcome(kind=Kind.HERE)
    if answer.count(" ") != 2:
        return Outcome(kind=Kind.OTHER, other=answer)
    greeting = parse(answer.encode())
    seen = frozenset([(greeting.name, greeting.client)])
    return Outcome(kind=Kind.LEAVES if greeting.name == OUTSIDE else Kind.SERVED, seen=seen)
