"""Several workers are as one: twins on two of them, weights, affinity, deaths one by one.

``--queue-balance`` spreads by addresses: packets of one flow come to several workers only when the range of queues
changes in between, and connections of one client only when they ask for several addresses. Here rules before it
deal packets out to the workers by turns, so that they always do.
"""

import os
import shlex
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import pytest

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.chi_square import chi_square
from nfqproxy.lab.topology import Topology, topology
from tests.kernel.conftest import WEB_VIP4, WEB_VIP6
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.proxy import DATA_PATHS, Proxy, wait_until
from tests.kernel.responder import Connection, Responder, family_of, new_flow, parse
from tests.kernel.test_failures import load

PLAIN4, PLAIN6 = WEB_VIP4, WEB_VIP6
"""Weights 5:3:2."""
STICKY4, STICKY6 = "10.96.0.81", "fd00:10:96::81"
"""The same backends, and ClientIP affinity."""
WEIGHTS = (5, 3, 2)
PORTS = (
    Port(name="tcp", port=80, target=8080),
    Port(name="udp", port=80, target=8080, protocol="UDP"),
)
CROWD = [f"192.0.2.{number}" for number in range(50, 90)]
NEWCOMERS = [f"192.0.2.{number}" for number in range(100, 120)]
"""Further addresses of the client."""
NODE_PORT = 30080
_ports = count(20000)


@dataclass(frozen=True)
class Group:
    """A proxy with several workers."""

    topology: Topology
    proxy: Proxy
    data_path: str

    @property
    def client(self) -> Namespace:
        return self.topology.client.namespace

    @property
    def node(self) -> Namespace:
        return self.topology.node.namespace

    @property
    def pods(self) -> dict[str, str]:
        """Name of each pod, by both its addresses."""
        return {a: pod.name for pod in self.topology.pods for a in (pod.address4, pod.address6)}

    def packets(self) -> list[int]:
        """What each worker has read."""
        return [worker["packets"] for worker in self.proxy.status()["workers"]]

    @contextmanager
    def dealt_out(self, protocol: str) -> Iterator[None]:
        """Inside the block packets of a protocol that our rule would queue go to the workers by turns."""
        table = "raw" if self.data_path == "ctnetlink" else "mangle"
        chain = (table, "NFQPROXY-QUEUE")
        queues = list(self.proxy.waiting())
        made = []
        try:
            for tool in ("iptables", "ip6tables"):
                listing = self.node.run(tool, "-t", table, "-S", chain[1]).stdout.splitlines()[1:]
                (place,) = (
                    n
                    for n, rule in enumerate(listing, 1)
                    if f"-p {protocol} " in rule and "NFQUEUE" in rule
                )
                matches = shlex.split(listing[place - 1])[2:-5]
                for turn, queue in enumerate(queues):
                    left = str(len(queues) - turn)
                    nth = ["-m", "statistic", "--mode", "nth", "--every", left, "--packet", "0"]
                    target = ["-j", "NFQUEUE", "--queue-num", str(queue), "--queue-bypass"]
                    rule = [*matches, *(nth if left != "1" else []), *target]
                    self.node.run(tool, "-t", table, "-I", chain[1], str(place + turn), *rule)
                    made.append((tool, rule))
            yield
        finally:
            for tool, rule in made:
                self.node.run(tool, "-t", table, "-D", chain[1], *rule)

    def entries(self, protocol: str, *ports: int) -> list[str]:
        """The backend of each entry of conntrack that is about one of these source ports of the client."""
        found = []
        for family in ("ipv4", "ipv6"):
            listing = self.node.run("conntrack", "-L", "-f", family, "-p", protocol).stdout
            for line in listing.splitlines():
                sources = [part[4:] for part in line.split() if part.startswith("src=")]
                port = next(int(part[6:]) for part in line.split() if part.startswith("sport="))
                if port in ports:
                    found.append(self.pods[sources[1]])
        return found


def objects(built: Topology) -> list[Manifest]:
    addresses = [a for pod in built.pods for a in (pod.address4, pod.address6)]
    weights = {
        address: weight
        for pod, weight in zip(built.pods, WEIGHTS, strict=True)
        for address in (pod.address4, pod.address6)
    }
    plain = service(
        "plain", vips=[PLAIN4, PLAIN6], ports=PORTS, endpoints=addresses, weights=weights
    )
    sticky = service(
        "sticky",
        vips=[STICKY4, STICKY6],
        ports=(replace(PORTS[0], node_port=NODE_PORT), PORTS[1]),
        endpoints=addresses,
        weights=weights,
    )
    sticky[0]["spec"]["sessionAffinity"] = "ClientIP"
    return [*plain, *sticky]


@pytest.fixture(scope="module")
def built() -> Iterator[Topology]:
    with topology() as made, Responder() as responder:
        made.client.namespace.ip(
            *(f"addr add {address}/24 dev eth0" for address in CROWD + NEWCOMERS)
        )
        for pod in made.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        yield made


@pytest.fixture(
    scope="module",
    params=[(n, path) for path in DATA_PATHS for n in (2, 3)],
    ids="{0[1]}-{0[0]}".format,
)
def group(request: pytest.FixtureRequest, built: Topology) -> Iterator[Group]:
    workers, data_path = request.param
    node = built.node.namespace
    with Proxy(node, objects(built), workers=workers, data_path=data_path) as proxy:
        yield Group(built, proxy, data_path)
        proxy.stop()
        proxy.cleanup()
    node.run("conntrack", "-F")


def begun(client: Namespace, vip: str, *, source: str = "") -> tuple[socket.socket, int]:
    """A TCP connection that has been asked for, and its source port."""
    sock = client.socket(family_of(vip), socket.SOCK_STREAM)
    port = next(_ports)
    sock.bind((source, port))
    sock.setblocking(False)
    sock.connect_ex((vip, 80))
    return sock, port


def name_of(sock: socket.socket) -> str:
    """Who answers the connection or the datagrams."""
    sock.settimeout(10)
    return parse(sock.recv(200)).name


# One over a multiple of 2 and of 3, so that what is sent again comes to another worker by turns.
SYNS = 7


def test_a_syn_and_its_retransmission_wait_at_two_workers(group: Group) -> None:
    with ExitStack() as stack:
        stack.enter_context(group.dealt_out("tcp"))
        with group.proxy.held_up():
            vips = (PLAIN4, STICKY4) * 4, (PLAIN6, STICKY6) * 4
            made = [begun(group.client, vip) for each in vips for vip in each[:SYNS]]
            for sock, _ in made:
                stack.enter_context(sock)
            wait_until(
                lambda: sum(group.proxy.waiting().values()) == 4 * SYNS, "each SYN waits twice"
            )
        names = [name_of(sock) for sock, _ in made]
        assert Counter(group.entries("tcp", *(port for _, port in made))) == Counter(names)


@contextmanager
def silent(built: Topology) -> Iterator[None]:
    """Inside the block no pod hears of new connections."""
    rule = ("INPUT", "-p", "tcp", "--dport", "8080", "-j", "DROP")
    pods = [pod.namespace for pod in built.pods]
    for pod in pods:
        pod.run("iptables", "-A", *rule)
    try:
        yield
    finally:
        for pod in pods:
            pod.run("iptables", "-D", *rule)


@contextmanager
def half_open(group: Group) -> Iterator[None]:
    """Inside the block connections have been decided and no backend has heard of them.

    Afterwards it hears the retransmissions, and each connection must have come about with the backend of before.
    """
    with ExitStack() as stack:
        with silent(group.topology):
            made = [begun(group.client, vip) for vip in ((PLAIN4, STICKY4) * 4)[:SYNS]]
            for sock, _ in made:
                stack.enter_context(sock)
            ports = [port for _, port in made]
            wait_until(
                lambda: len(group.entries("tcp", *ports)) == SYNS, "each connection has an entry"
            )
            decided = Counter(group.entries("tcp", *ports))
            yield
        assert Counter(name_of(sock) for sock, _ in made) == decided
        assert Counter(group.entries("tcp", *ports)) == decided


def test_a_retransmission_meets_another_worker_than_the_syn_before_it(group: Group) -> None:
    before = group.proxy.counters().get("retransmit", 0)
    with group.dealt_out("tcp"), half_open(group):
        pass
    assert group.proxy.counters().get("retransmit", 0) >= before + SYNS


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_another_number_of_workers_takes_over(cluster: Topology, data_path: str) -> None:
    """Other workers have other shares of the clients then, and know nothing of what was before."""
    node, client = cluster.node.namespace, cluster.client.namespace
    made = objects(cluster)
    with (
        Proxy(node, made, workers=3, data_path=data_path) as before,
        ExitStack() as stack,
    ):
        flows = [stack.enter_context(new_flow(client, vip, 80)) for vip in (PLAIN4, PLAIN6) * 4]

        def ask_all() -> list[str]:
            for flow in flows:
                flow.send(b"?")
            return [name_of(flow) for flow in flows]

        names = ask_all()
        with half_open(Group(cluster, before, data_path)):
            before.stop()
            after = stack.enter_context(Proxy(node, made, workers=2, data_path=data_path))
        assert after.counters()["retransmit"] >= SYNS
        assert ask_all() == names


@pytest.mark.parametrize("how", ["wait", "burst"])
def test_udp_twins_at_several_workers_have_one_backend(group: Group, how: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(group.dealt_out("udp"))
        flows = []
        for vip in (PLAIN4, PLAIN6, STICKY4, STICKY6) * 5:
            sock = stack.enter_context(group.client.socket(family_of(vip), socket.SOCK_DGRAM))
            sock.bind(("", next(_ports)))
            sock.connect((vip, 80))
            flows.append(sock)
        before = group.packets()
        with ExitStack() as held:
            if how == "wait":
                held.enter_context(group.proxy.held_up())
            for sock in flows:
                for number in range(8):
                    sock.send(b"%d" % number)
            if how == "wait":
                wait_until(
                    lambda: sum(group.proxy.waiting().values()) == 8 * len(flows), "all wait"
                )
        names = []
        for sock in flows:
            sock.settimeout(10)
            answers = [sock.recv(200) for _ in range(8)]
            assert sorted(answer[-1:] for answer in answers) == [b"%d" % n for n in range(8)]
            (name,) = {parse(answer).name for answer in answers}
            names.append(name)
        assert all(now > then for now, then in zip(group.packets(), before, strict=True))
        ports = [sock.getsockname()[1] for sock in flows]
        assert Counter(group.entries("udp", *ports)) == Counter(names)


def ask(vip: str, port: int = 80, *, udp: bool = False, source: str = "") -> str:
    """Who answers a new connection or flow of the calling thread's namespace."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    with socket.socket(family_of(vip), kind) as sock:
        sock.settimeout(10)
        sock.bind((source, next(_ports) if udp else 0))
        sock.connect((vip, port))
        if udp:
            sock.send(b"?")
        return parse(sock.recv(200)).name


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_weights_hold_over_all_workers_together(group: Group, protocol: str) -> None:
    def spread() -> Counter[str]:
        return Counter(ask(PLAIN4, udp=protocol == "udp") for _ in range(1500))

    before = group.packets()
    with group.dealt_out(protocol):
        found = group.client.call(spread)
    shares = [now - then for now, then in zip(group.packets(), before, strict=True)]
    assert min(shares) >= 1500 // len(shares), "a SYN may have been sent again"
    # By chance once in a million runs; a worker that picks by other weights shows at some hundred.
    assert chi_square([found[pod.name] for pod in group.topology.pods], WEIGHTS).p_value > 1e-6


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_client_with_affinity_has_one_backend_at_whichever_worker(
    group: Group, protocol: str
) -> None:
    """One connection after the other, with nothing between them."""

    def one_by_one(source: str) -> set[str]:
        return {ask(STICKY4, udp=protocol == "udp", source=source) for _ in range(4)}

    with group.dealt_out(protocol):
        found = [group.client.call(partial(one_by_one, source)) for source in CROWD]
    assert [names for names in found if len(names) > 1] == []
    assert set().union(*found) == {pod.name for pod in group.topology.pods}


def test_first_connections_of_a_client_at_the_same_moment(group: Group) -> None:
    """At several workers, none of which has told the others yet."""
    with ExitStack() as stack:
        stack.enter_context(group.dealt_out("tcp"))
        with group.proxy.held_up():
            made = {
                source: [
                    stack.enter_context(begun(group.client, STICKY4, source=source)[0])
                    for _ in range(3)
                ]
                for source in NEWCOMERS
            }
            wait_until(lambda: sum(group.proxy.waiting().values()) >= 60, "all wait")
        found = {source: {name_of(sock) for sock in socks} for source, socks in made.items()}
    assert [names for names in found.values() if len(names) > 1] == []


def test_the_frontends_of_a_service_port_share_a_client(group: Group) -> None:
    """By the rules as they are: a client's connections to two addresses may meet two workers."""
    addresses = ((STICKY4, 80), (group.topology.node.address4, NODE_PORT))

    def both(source: str) -> set[str]:
        return {ask(*to, source=source) for to in addresses}

    found = [group.client.call(partial(both, source)) for source in NEWCOMERS + CROWD]
    assert [names for names in found if len(names) > 1] == []


def test_a_worker_dies_and_the_others_do_not_notice(group: Group) -> None:
    """Each in turn, under load from many clients; then SIGHUP. Afterwards all decide as before."""
    proxy, client = group.proxy, group.client

    def backends() -> list[str]:
        return [ask(STICKY4, udp=udp, source=source) for source in CROWD for udp in (False, True)]

    sticky = client.call(backends)
    with ExitStack() as stack:
        held = [
            stack.enter_context(Connection(client, PLAIN4, 80, source=(source, 0)))
            for source in CROWD
        ]
        flood = stack.enter_context(load(client, CROWD))
        for index in range(len(proxy.worker_pids())):
            flood.reach(100)
            before = proxy.status()["workers"]
            victim = before[index]["pid"]
            os.kill(victim, signal.SIGKILL)
            flood.reach(200)
            proxy.wait_replaced(victim)
            wait_until(lambda: all(group.packets()), "the new one has had packets")
            after = proxy.status()["workers"]
            for place, (then, now) in enumerate(zip(before, after, strict=True)):
                died = place == index
                assert now["restarts"] == then["restarts"] + died
                assert died == (now["pid"] != then["pid"])
                assert died or now["packets"] > then["packets"]
        pids = proxy.worker_pids()
        group.node.run("ipset", "flush", "nfqproxy-frontends-4")
        os.kill(proxy.pid, signal.SIGHUP)
        wait_until(
            lambda: PLAIN4 in group.node.run("ipset", "list", "nfqproxy-frontends-4").stdout,
            "SIGHUP has put back what was missing",
        )
        then = group.packets()
        flood.reach(200)
        assert proxy.worker_pids() == pids
        assert all(now > before for now, before in zip(group.packets(), then, strict=True))
        assert {connection.echo("still here") for connection in held} == {"still here"}
    assert client.call(backends) == sticky
    assert not [name for name in proxy.counters() if "error" in name or "failed" in name]
