"""The conntrack reconciler on the real kernel: UDP flows move on, nothing else is touched.

What a flow meets after its entry has gone is the data path's business, so flows and INITs run on both. Which
entries go is decided by the supervisor, or by ``nfqproxy reconcile`` without a proxy, from conntrack and the
Services alone: tests of that kind run once.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.kernel.conntrack_table import ConntrackTable
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Pod, Topology, topology
from nfqproxy.model import Family, FrontendKey, Protocol
from nfqproxy.wire import ctnetlink, nlmsg
from tests.kernel.manifests import Manifest, Port, service, text
from tests.kernel.probes import probe
from tests.kernel.proxy import DATA_PATHS, RUNS, Proxy, run_cli, wait_until
from tests.kernel.responder import Connection, Responder, family_of, parse

VIP4, VIP6 = "10.96.0.53", "fd00:10:96::53"
NODE_PORT = 30053
PORTS = (
    Port(name="dns", port=53, target=8053, protocol="UDP", node_port=NODE_PORT),
    Port(name="tcp", port=53, target=8053),
)
READY = {"ready": True, "serving": True, "terminating": False}
DRAINING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}
CLIENT4, CLIENT6 = "192.0.2.10", "2001:db8:2::10"


@pytest.fixture
def cluster() -> Iterator[Topology]:
    with topology() as built, Responder() as responder:
        for pod in built.pods:
            responder.serve(pod.namespace, pod.name, 8053)
        yield built


def dns(*members: tuple[Pod, dict[str, bool]], port: int = 8053) -> list[Manifest]:
    """The Service with these pods in these conditions as endpoints."""
    ports = tuple(Port(**{**vars(p), "target": port}) for p in PORTS)  # type: ignore[arg-type]
    found = service(
        "dns",
        vips=[VIP4, VIP6],
        ports=ports,
        endpoints=[address for pod, _ in members for address in (pod.address4, pod.address6)],
    )
    conditions = {a: c for pod, c in members for a in (pod.address4, pod.address6)}
    for item in found[1:]:
        for endpoint in item["endpoints"]:
            endpoint["conditions"] = conditions[endpoint["addresses"][0]]
    return found


class Flow:
    """One UDP socket of the client: every datagram of it belongs to one flow."""

    def __init__(self, namespace: Namespace, address: str, port: int = 53) -> None:
        self._socket = namespace.socket(family_of(address), socket.SOCK_DGRAM)
        self._socket.settimeout(5.0)
        self._socket.connect((address, port))
        source, number = self._socket.getsockname()[:2]
        self.member = f"{source},udp:{number},{ip_address(address)}"
        self.original = ctnetlink.Tuple(
            ip_address(source).packed, ip_address(address).packed, Protocol.UDP, number, port
        )

    def send(self) -> None:
        self._socket.send(b"ping")

    def ask(self) -> str:
        self._socket.send(b"ping")
        return parse(self._socket.recv(65536)).name

    def close(self) -> None:
        self._socket.close()


@contextmanager
def flows(namespace: Namespace, *places: tuple[str, int]) -> Iterator[list[Flow]]:
    opened = [Flow(namespace, *place) for place in places]
    try:
        yield opened
    finally:
        for flow in opened:
            flow.close()


def table(node: Namespace, protocol: int = Protocol.UDP) -> dict[ctnetlink.Tuple, ctnetlink.Entry]:
    """Conntrack's entries of zone 0 and one protocol, by original tuple."""

    def read() -> dict[ctnetlink.Tuple, ctnetlink.Entry]:
        with ConntrackTable() as opened:
            return {
                entry.original: entry
                for family in Family
                for entry in opened.entries(family, protocol)
                if entry.zone == 0
            }

    return node.call(read)


def known_flows(node: Namespace) -> str:
    return "".join(node.run("ipset", "list", f"nfqproxy-flows-{n}").stdout for n in (4, 6))


def insert(node: Namespace, *requests: Callable[[int], bytes]) -> None:
    """Carry out requests of ctnetlink in the node's namespace; each must succeed."""

    def send() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, nlmsg.NETLINK_NETFILTER) as opened:
            opened.bind((0, 0))
            for request in requests:
                opened.send(request(1))
                (message,) = nlmsg.messages(opened.recv(65536))
                assert nlmsg.ack(message).errno == 0

    node.call(send)


def new(
    destination: str,
    port: int,
    to: tuple[str, int] | None,
    *,
    protocol: int = Protocol.UDP,
    source_port: int = 40000,
    zone: int | None = None,
) -> Callable[[int], bytes]:
    """A request for an entry of c1, translated to ``to``."""
    source = CLIENT6 if ":" in destination else CLIENT4
    original = ctnetlink.Tuple(
        ip_address(source).packed, ip_address(destination).packed, protocol, source_port, port
    )
    nat = None if to is None else ctnetlink.Nat(ip_address(to[0]).packed, to[1])
    return lambda seq: ctnetlink.new_entry(
        original, dnat=nat, snat=None, timeout_s=300, seq=seq, zone=zone, ack=True
    )


def deleted(proxy: Proxy) -> dict[str, int]:
    found: dict[str, int] = proxy.status()["conntrack"]["deleted"]
    return found


def sweep(proxy: Proxy, *arguments: str) -> dict[str, Any]:
    """``nfqproxy reconcile`` through the running proxy."""
    done = run_cli(proxy.namespace, "reconcile", "-o", "json", *arguments)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize("run", RUNS)
def test_vector_40_a_udp_flow_leaves_a_backend_that_is_gone(
    cluster: Topology, run: tuple[str, str]
) -> None:
    reader, data_path = run
    node, client = cluster.node.namespace, cluster.client.namespace
    one, two = cluster.pods[:2]
    places = [(VIP4, 53), (VIP6, 53), (cluster.node.address4, NODE_PORT)]
    with (
        Proxy(node, dns((one, READY)), reader=reader, data_path=data_path) as proxy,
        flows(client, *places) as opened,
        Connection(client, VIP4, 53) as held,
    ):
        assert [flow.ask() for flow in opened] == [one.name] * 3
        # Draining: no new flow goes there, the old ones stay, whatever a sweep is told.
        proxy.follow(dns((one, DRAINING), (two, READY)))
        assert sweep(proxy)["stale"] == {"backend-gone": 0, "untranslated": 0}
        assert [flow.ask() for flow in opened] == [one.name] * 3
        if data_path == "ctnetlink":
            assert all(flow.member in known_flows(node) for flow in opened)
        packets = proxy.packets()
        # Gone: entry and set member go, the next datagram is a first one. No plan changes by that.
        proxy.write(dns((one, GONE), (two, READY)))
        wait_until(lambda: deleted(proxy)["backend-gone"] == 3, "three entries were deleted")
        left = table(node)
        assert not any(flow.original in left for flow in opened)
        if data_path == "ctnetlink":
            assert not any(flow.member in known_flows(node) for flow in opened)
        assert [flow.ask() for flow in opened] == [two.name] * 3
        assert proxy.packets() == packets + 3
        assert [flow.ask() for flow in opened] == [two.name] * 3
        assert proxy.packets() == packets + 3
        # TCP is its client's own affair (vector 39).
        assert held.answer.name == one.name
        assert held.echo("still here") == "still here"
        assert deleted(proxy) == {"backend-gone": 3, "untranslated": 0}
        proxy.stop()


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_an_endpoint_that_changes_its_port_loses_its_flows(
    cluster: Topology, data_path: str
) -> None:
    node, client = cluster.node.namespace, cluster.client.namespace
    pod = cluster.pods[0]
    with Responder() as responder, flows(client, (VIP4, 53)) as (flow,):
        responder.serve(pod.namespace, "other", 8054)
        with Proxy(node, dns((pod, READY)), data_path=data_path) as proxy:
            assert flow.ask() == pod.name
            proxy.follow(dns((pod, READY), port=8054))
            wait_until(lambda: deleted(proxy)["backend-gone"] == 1, "the entry was deleted")
            assert flow.ask() == "other"


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_vector_41_without_an_endpoint_left_the_entry_stays(
    cluster: Topology, data_path: str
) -> None:
    node, client = cluster.node.namespace, cluster.client.namespace
    one, two = cluster.pods[:2]
    with (
        Proxy(node, dns((one, READY)), data_path=data_path) as proxy,
        flows(client, (VIP4, 53), (VIP6, 53)) as opened,
    ):
        assert [flow.ask() for flow in opened] == [one.name] * 2
        before = {flow.original: table(node)[flow.original].id for flow in opened}
        proxy.follow(dns((one, GONE)))
        assert sweep(proxy)["examined"] == 0
        left = table(node)
        assert {key: left[key].id for key in before} == before
        # Somebody serves again: now they go.
        proxy.follow(dns((two, READY)))
        wait_until(lambda: deleted(proxy)["backend-gone"] == 2, "both entries were deleted")
        assert [flow.ask() for flow in opened] == [two.name] * 2


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_vector_42_a_flow_that_began_before_the_endpoints(
    cluster: Topology, data_path: str
) -> None:
    node = cluster.node.namespace
    pod = cluster.pods[0]
    places = [(VIP4, 53), (VIP6, 53), (cluster.node.address4, NODE_PORT)]
    with (
        Proxy(node, dns((pod, GONE)), data_path=data_path) as proxy,
        flows(cluster.client.namespace, *places) as opened,
    ):
        # By hand: where the kernel refuses what nobody serves, datagrams leave no entry.
        for flow in opened:
            destination = str(ip_address(flow.original.dst))
            insert(
                node,
                new(destination, flow.original.dst_port, None, source_port=flow.original.src_port),
            )
        assert all(not table(node)[flow.original].is_dnat for flow in opened)
        proxy.follow(dns((pod, READY)))
        wait_until(lambda: deleted(proxy)["untranslated"] == 3, "the entries were deleted")
        assert not any(flow.original in table(node) for flow in opened)
        assert [flow.ask() for flow in opened] == [pod.name] * 3


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_start_finds_what_happened_before(cluster: Topology, data_path: str) -> None:
    """Real untranslated entries, made while no proxy ran, and those of a backend gone meanwhile."""
    node, client = cluster.node.namespace, cluster.client.namespace
    one, two = cluster.pods[:2]
    # Conntrack works in a namespace only while some rule needs it.
    for tool in ("iptables", "ip6tables"):
        node.run(tool, *["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"])
    with flows(client, (VIP4, 53), (VIP6, 53), (VIP4, 53)) as opened:
        early = opened[:2]
        for flow in early:
            flow.send()
        wait_until(
            lambda: all(flow.original in table(node) for flow in early), "the flows are tracked"
        )
        assert not any(table(node)[flow.original].is_dnat for flow in early)
        with Proxy(node, dns((one, READY)), data_path=data_path) as proxy:
            wait_until(lambda: deleted(proxy)["untranslated"] == 2, "the leftovers are gone")
            assert not any(flow.original in table(node) for flow in early)
            assert [flow.ask() for flow in opened] == [one.name] * 3
            proxy.stop()
            proxy.write(dns((one, GONE), (two, READY)))
            proxy.start()
            wait_until(lambda: deleted(proxy)["backend-gone"] == 3, "the stale flows are gone")
            assert [flow.ask() for flow in opened] == [two.name] * 3


def test_nothing_else_is_touched_and_a_second_run_finds_nothing(cluster: Topology) -> None:
    node = cluster.node.namespace
    one, two = cluster.pods[:2]
    node.ip("addr add 192.0.2.7/24 dev eth0")
    gone4, gone6, here = (one.address4, 8053), (one.address6, 8053), (two.address4, 8053)
    stale = [
        new(VIP4, 53, gone4),
        new(VIP6, 53, gone6),
        new(VIP4, 53, None, source_port=40001),
        new(VIP4, 53, (two.address4, 8054), source_port=40002),
        new(cluster.node.address4, NODE_PORT, gone4),
        new("192.0.2.7", NODE_PORT, gone4),
    ]
    kept = [
        new(VIP4, 53, here, source_port=40003),
        new(VIP4, 53, gone4, protocol=Protocol.TCP),
        new(VIP4, 53, None, protocol=Protocol.TCP, source_port=40001),
        new(VIP4, 53, gone4, protocol=Protocol.SCTP),
        # Another port, another address, another zone; a program's own socket on the node.
        new(VIP4, 54, gone4),
        new("10.96.0.54", 53, gone4),
        new("203.0.113.5", NODE_PORT, None),
        new("192.0.2.7", NODE_PORT, None, source_port=40001),
        new(VIP4, 53, gone4, zone=9, source_port=40004),
        new(VIP4, 53, None, zone=9, source_port=40005),
    ]

    def ids() -> set[int]:
        def read() -> set[int]:
            with ConntrackTable() as opened:
                return {
                    entry.id
                    for family in Family
                    for protocol in Protocol
                    for entry in opened.entries(family, protocol)
                }

        return node.call(read)

    with Proxy(node, dns((one, GONE), (two, READY))) as proxy:
        wait_until(lambda: proxy.status()["conntrack"]["sweeps"] >= 1, "the first sweep is through")
        insert(node, *kept)
        before = ids()
        insert(node, *stale)
        both = ids()
        assert len(both) == len(before) + len(stale)
        dry = sweep(proxy, "--dry-run")
        assert dry["dry_run"] is True
        assert dry["stale"] == {"backend-gone": 5, "untranslated": 1}
        assert dry["deleted"] == {"backend-gone": 0, "untranslated": 0}
        assert ids() == both
        done = sweep(proxy)
        assert done["deleted"] == {"backend-gone": 5, "untranslated": 1}
        assert (done["vanished"], done["failed"]) == (0, 0)
        assert {
            (entry["client"], entry["frontend"], entry["backend"]) for entry in done["entries"]
        } == {
            ("192.0.2.10:40000", f"{VIP4}:53", f"{one.address4}:8053"),
            ("[2001:db8:2::10]:40000", f"[{VIP6}]:53", f"[{one.address6}]:8053"),
            ("192.0.2.10:40001", f"{VIP4}:53", None),
            ("192.0.2.10:40002", f"{VIP4}:53", f"{two.address4}:8054"),
            ("192.0.2.10:40000", f"192.0.2.1:{NODE_PORT}", f"{one.address4}:8053"),
            ("192.0.2.10:40000", f"192.0.2.7:{NODE_PORT}", f"{one.address4}:8053"),
        }
        assert {(e["namespace"], e["service"], e["port_name"]) for e in done["entries"]} == {
            ("default", "dns", "dns")
        }
        assert ids() == before
        again = sweep(proxy)
        assert again["stale"] == {"backend-gone": 0, "untranslated": 0}
        assert again["entries"] == []
        assert ids() == before


def test_sctp_goes_only_while_no_backend_has_spoken(cluster: Topology) -> None:
    node = cluster.node.namespace
    one, two = cluster.pods[:2]
    ports = (Port(name="sctp", port=80, target=8080, protocol="SCTP"),)
    vip = "10.96.0.84"
    for state, number in (("COOKIE_WAIT", 1), ("ESTABLISHED", 2), ("SHUTDOWN_SENT", 3)):
        # Made by the tool: it can give an entry a state.
        node.run(
            *["conntrack", "-I", "-p", "sctp", "-s", CLIENT4, "-d", vip, "--dport", "80"],
            *["--sport", str(40000 + number), "--dst-nat", one.address4, "--timeout", "300"],
            *["--state", state, "--orig-vtag", "1", "--reply-vtag", "2"],
        )
    with Proxy(node, service("s", vips=[vip], ports=ports, endpoints=[two.address4])) as proxy:
        wait_until(lambda: deleted(proxy)["backend-gone"] == 1, "one entry was deleted")
        assert {key.src_port for key in table(node, Protocol.SCTP)} == {40002, 40003}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("vip", "source"), [("10.96.0.84", CLIENT4), ("fd00:10:96::84", CLIENT6)])
def test_an_init_need_not_wait_for_a_sweep(
    cluster: Topology, vip: str, source: str, run: tuple[str, str]
) -> None:
    """Between sweeps the worker judges what an INIT meets, as it does for a SYN."""
    reader, data_path = run
    node, client = cluster.node.namespace, cluster.client.namespace
    one, two = ((pod.address6 if ":" in vip else pod.address4) for pod in cluster.pods[:2])
    ports = (Port(name="sctp", port=80, target=8080, protocol="SCTP"),)

    def init(source_port: int, *, replaces: bool = False) -> ctnetlink.Entry:
        """Send an INIT; return what conntrack holds of it then."""
        key = FrontendKey(Protocol.SCTP, vip, 80)
        # By marks, the INIT that ends an entry is lost with it, and the next one is the first of another.
        for _ in range(2 if replaces and data_path == "mark" else 1):
            # The pod has no SCTP, and its kernel may say so: no matter.
            client.call(lambda: probe(key, (source, source_port)))
        found = {entry.src_port: held for entry, held in table(node, Protocol.SCTP).items()}
        return found[source_port]

    objects = service("s", vips=[vip], ports=ports, endpoints=[two])
    with Proxy(node, objects, reader=reader, data_path=data_path) as proxy:
        wait_until(lambda: proxy.status()["conntrack"]["sweeps"] == 1, "the first sweep is over")
        # A retransmission to a backend that lives: the entry stands, though its state is CLOSED.
        first = init(40000)
        assert (str(ip_address(first.reply.src)), first.has_seen_reply) == (two, False)
        assert first.sctp_state == ctnetlink.SCTP_CONNTRACK_CLOSED
        assert init(40000).id == first.id
        assert proxy.counters()["retransmit"] == 1
        # To one that has gone, before and after its INIT ACK: another is picked.
        insert(node, new(vip, 80, (one, 8080), protocol=Protocol.SCTP, source_port=40001))
        for state, number in (("CLOSED", 2), ("COOKIE_WAIT", 3), ("ESTABLISHED", 4)):
            node.run(
                *["conntrack", "-I", "-p", "sctp", "-s", source, "-d", vip, "--dport", "80"],
                *["--sport", str(40000 + number), "--dst-nat", one, "--timeout", "300"],
                *["--state", state, "--orig-vtag", "1", "--reply-vtag", "2"],
            )
        for number in (40001, 40002, 40003):
            assert str(ip_address(init(number, replaces=True).reply.src)) == two, number
        assert proxy.counters()["backend_gone"] == 3
        # An association that stands is its two ends' own affair.
        assert str(ip_address(init(40004).reply.src)) == one
        assert proxy.counters()["alive"] == 1
        assert proxy.status()["conntrack"]["sweeps"] == 1


def test_overlay_mode_looks_at_steered_services_alone(cluster: Topology) -> None:
    node = cluster.node.namespace
    one, two = cluster.pods[:2]
    items = dns((two, READY))
    with Proxy(node, items, mode="overlay") as proxy:
        insert(node, new(VIP4, 53, (one.address4, 8053)))
        assert sweep(proxy)["examined"] == 0
        assert len(table(node)) == 1
        items[0]["metadata"]["labels"] = {"nfqproxy.io/steer": "true"}
        proxy.follow(items)
        wait_until(lambda: deleted(proxy)["backend-gone"] == 1, "the entry was deleted")
        assert table(node) == {}


def _offline(node: Namespace, manifest: Path, *arguments: str) -> tuple[int, str, str]:
    done = run_cli(
        node,
        *["reconcile", "--manifests", str(manifest), "--node-name", "n1"],
        *["--node-address", "192.0.2.1", *arguments],
    )
    return done.returncode, done.stdout, done.stderr


def test_reconcile_without_a_proxy(cluster: Topology, tmp_path: Path) -> None:
    node = cluster.node.namespace
    one, two = cluster.pods[:2]
    manifest = tmp_path / "m.json"
    manifest.write_text(text(dns((one, GONE), (two, READY))))
    # NAT at creation needs NAT to be there; the proxy's rules are not.
    node.run(
        "iptables",
        *["-t", "nat", "-A", "PREROUTING", "-d", "203.0.113.1", "-j", "DNAT"],
        *(["--to", one.address4]),
    )
    node.run(
        "ip6tables",
        *["-t", "nat", "-A", "PREROUTING", "-d", "2001:db8::1", "-j", "DNAT"],
        *(["--to", one.address6]),
    )
    insert(
        node,
        new(VIP4, 53, (one.address4, 8053)),
        new(VIP6, 53, None),
        new(VIP4, 53, (two.address4, 8053), source_port=40001),
    )
    status, out, err = _offline(node, manifest, "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "2 of 3 entries would be deleted"
    assert (
        f"would delete udp 192.0.2.10:40000 -> {VIP4}:53 -> {one.address4}:8053"
        " (default/dns:dns: backend-gone)"
    ) in out.splitlines()
    assert (
        f"would delete udp [2001:db8:2::10]:40000 -> [{VIP6}]:53, untranslated"
        " (default/dns:dns: untranslated)"
    ) in out.splitlines()
    assert len(table(node)) == 3
    status, out, err = _offline(node, manifest)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "deleted 2 of 3 entries"
    assert [entry.original.src_port for entry in table(node).values()] == [40001]
    status, out, err = _offline(node, manifest, "-o", "json")
    assert (status, err) == (0, "")
    assert json.loads(out)["stale"] == {"backend-gone": 0, "untranslated": 0}


def test_reconcile_says_what_is_wrong(cluster: Topology, tmp_path: Path) -> None:
    node = cluster.node.namespace
    done = run_cli(node, "reconcile")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no nfqproxy runs in this network namespace" in done.stderr
    done = run_cli(node, "reconcile", "--node-name", "n1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--node-name goes with --manifests, --iptables-save or --config" in done.stderr
    status, out, err = _offline(node, tmp_path / "absent.yaml")
    assert (status, out) == (2, "")
    assert "absent.yaml" in err
    assert "Traceback" not in err


def test_thousands_of_entries_go_in_one_sweep(cluster: Topology, tmp_path: Path) -> None:
    """More than one batch, among as many TCP entries that are not even listed."""
    node = cluster.node.namespace
    one, two = cluster.pods[:2]
    manifest = tmp_path / "m.json"
    manifest.write_text(text(dns((one, GONE), (two, READY))))
    count = 3000

    def fill() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, nlmsg.NETLINK_NETFILTER) as opened:
            opened.bind((0, 0))
            opened.settimeout(5.0)
            for protocol in (Protocol.UDP, Protocol.TCP):
                requests: Sequence[Callable[[int], bytes]] = [
                    new(VIP4, 53, None, protocol=protocol, source_port=10000 + number)
                    for number in range(count)
                ]
                for request in requests:
                    opened.send(request(1))
                    (message,) = nlmsg.messages(opened.recv(65536))
                    assert nlmsg.ack(message).errno == 0

    node.call(fill)
    status, out, err = _offline(node, manifest, "-o", "json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["examined"] == count
    assert document["deleted"] == {"backend-gone": 0, "untranslated": count}
    assert len(document["entries"]) + document["entries_left_off"] == count
    assert table(node) == {}
    assert len(table(node, Protocol.TCP)) == count
