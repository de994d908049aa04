"""The codecs against the running kernel: client - node - backend in throw-away namespaces.

What the encoders send is judged by the kernel's own tools (conntrack, ip) and by traffic.
"""

import ctypes
import errno
import json
import os
import re
import secrets
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfqproxy.wire import ctnetlink, nfnetlink, nfqueue, nlmsg, packet, rtnetlink

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 and os.environ.get("CI") != "true", reason="namespaces need root"
    ),
]

CLIENT = {4: "192.0.2.10", 6: "2001:db8:2::10"}
FRONT = {4: "192.0.2.1", 6: "2001:db8:2::1"}
PODS = {4: "10.244.1.1", 6: "fd00:10:244:1::1"}
BACKEND = {4: "10.244.1.10", 6: "fd00:10:244:1::10"}
VIP = {4: "10.96.0.1", 6: "fd00:10:96::1"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
KINDS = ("tcp", "udp", "sctp", "icmp")
QUEUE = 9


def sh(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Sockets opened in the block belong to the namespace for life."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(there, 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        yield
    finally:
        libc.setns(home, 0x40000000)
        os.close(home)
        os.close(there)


class Network:
    """The three namespaces and the sockets opened in them."""

    def __init__(self) -> None:
        prefix = f"wire{secrets.token_hex(3)}-"
        self.client, self.node, self.backend = (f"{prefix}{n}" for n in ("c", "n", "b"))
        self.sockets: list[socket.socket] = []

    def build(self) -> None:
        for name in (self.client, self.node, self.backend):
            sh(f"ip netns add {name}")
            sh(f"ip -n {name} link set lo up")
        sh(f"ip -n {self.node} link add front type veth peer name eth0 netns {self.client}")
        sh(f"ip -n {self.node} link add pods type veth peer name eth0 netns {self.backend}")
        for name, device, addresses in (
            (self.client, "eth0", CLIENT),
            (self.node, "front", FRONT),
            (self.node, "pods", PODS),
            (self.backend, "eth0", BACKEND),
        ):
            sh(f"ip -n {name} link set {device} up")
            sh(f"ip -n {name} addr add {addresses[4]}/24 dev {device}")
            sh(f"ip -n {name} addr add {addresses[6]}/64 dev {device} nodad")
        for name, gateways in ((self.client, FRONT), (self.backend, PODS)):
            sh(f"ip -n {name} route add default via {gateways[4]}")
            sh(f"ip -n {name} -6 route add default via {gateways[6]}")
        self.on_node("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        for version, tool in ((4, "iptables"), (6, "ip6tables")):
            # NAT hooks run only while some rule translates; this one never matches.
            nat = f"-d {VIP[version]} -p 253 -j DNAT --to {BACKEND[version]}"
            self.on_node(f"{tool} -w -t nat -A PREROUTING {nat}")

    def remove(self) -> None:
        for opened in self.sockets:
            opened.close()
        for name in (self.client, self.node, self.backend):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def on_node(self, command: str) -> str:
        return sh(f"ip netns exec {self.node} {command}")

    def open(self, name: str, *arguments: int) -> socket.socket:
        with inside(name):
            opened = socket.socket(*arguments)
        opened.settimeout(5)
        self.sockets.append(opened)
        return opened

    def netlink(self, protocol: int = nlmsg.NETLINK_NETFILTER) -> socket.socket:
        opened = self.open(self.node, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        opened.bind((0, 0))
        return opened


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.build()
        yield network
    finally:
        network.remove()


@pytest.fixture
def conntrack(network: Network) -> Iterator[socket.socket]:
    """A ctnetlink socket on the node, with an empty table."""
    opened = network.netlink()
    subprocess.run(
        ["ip", "netns", "exec", network.node, "conntrack", "-F"], capture_output=True, check=True
    )
    yield opened
    opened.close()


def ask(netlink: socket.socket, request: bytes) -> nlmsg.Message:
    netlink.send(request)
    (message,) = nlmsg.messages(netlink.recv(65536))
    return message


def outcome(netlink: socket.socket, request: bytes) -> int:
    """0 or the errno the kernel answers."""
    return nlmsg.ack(ask(netlink, request)).errno


def flow_of(kind: str, version: int, port: int) -> ctnetlink.Tuple:
    src, dst = packed(CLIENT[version]), packed(VIP[version])
    if kind == "icmp":
        protocol, request = (1, 8) if version == 4 else (58, 128)
        return ctnetlink.Tuple(src, dst, protocol, icmp_id=port, icmp_type=request)
    return ctnetlink.Tuple(src, dst, {"tcp": 6, "udp": 17, "sctp": 132}[kind], port, 80)


def insert(
    netlink: socket.socket,
    flow: ctnetlink.Tuple,
    version: int,
    *,
    masquerade: bool = True,
    mark: int | None = None,
) -> None:
    has_port = flow.protocol not in (ctnetlink.IPPROTO_ICMP, ctnetlink.IPPROTO_ICMPV6)
    request = ctnetlink.new_entry(
        flow,
        dnat=ctnetlink.Nat(packed(BACKEND[version]), 8080 if has_port else None),
        snat=ctnetlink.Nat(packed(PODS[version])) if masquerade else None,
        timeout_s=60,
        seq=1,
        mark=mark,
        ack=True,
    )
    assert outcome(netlink, request) == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_conntrack_lists_what_was_inserted(
    network: Network, conntrack: socket.socket, kind: str, version: int
) -> None:
    flow = flow_of(kind, version, 5555)
    insert(conntrack, flow, version, mark=0x2A)
    listed = network.on_node(f"conntrack -L -f ipv{version} -o id").splitlines()
    assert len(listed) == 1
    fields = re.findall(r"(\w+)=(\S+)", listed[0])
    values: dict[str, list[str]] = {}
    for key, value in fields:
        values.setdefault(key, []).append(value)
    assert values["src"] == [CLIENT[version], BACKEND[version]]
    assert values["dst"] == [VIP[version], PODS[version]]
    assert values["mark"] == ["42"]
    if kind == "icmp":
        types = ["8", "0"] if version == 4 else ["128", "129"]
        assert values["type"] == types
        assert values["id"][:2] == ["5555", "5555"]
    else:
        assert values["sport"] == ["5555", "8080"]
        assert values["dport"] == ["80", "5555"]
    got = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 2)).payload)
    assert str(got.id) == values["id"][-1]
    assert listed[0].split()[1] == str(flow.protocol)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_life_of_an_entry(conntrack: socket.socket, kind: str, version: int) -> None:
    flow = flow_of(kind, version, 5556)
    insert(conntrack, flow, version)
    again = ctnetlink.new_entry(flow, dnat=None, snat=None, timeout_s=60, seq=2)
    assert outcome(conntrack, again) == errno.EEXIST
    entry = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 3)).payload)
    assert (entry.original, entry.destination.address) == (flow, packed(BACKEND[version]))
    assert outcome(conntrack, ctnetlink.delete_entry(flow, 4, id=entry.id ^ 1)) == errno.ENOENT
    assert outcome(conntrack, ctnetlink.delete_entry(flow, 5, id=entry.id)) == 0
    assert outcome(conntrack, ctnetlink.get_entry(flow, 6)) == errno.ENOENT


def test_change_of_nat_is_refused_and_change_of_mark_is_not(conntrack: socket.socket) -> None:
    flow = flow_of("tcp", 4, 5557)
    insert(conntrack, flow, 4)
    elsewhere = ctnetlink.Nat(packed("10.244.1.11"), 8080)
    change = {"snat": None, "timeout_s": 60, "seq": 2, "exclusive": False, "ack": True}
    moved = ctnetlink.new_entry(flow, dnat=elsewhere, **change)
    assert outcome(conntrack, moved) == errno.EOPNOTSUPP
    assert outcome(conntrack, ctnetlink.new_entry(flow, dnat=None, mark=5, **change)) == 0
    entry = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 3)).payload)
    assert (entry.mark, entry.destination.address) == (5, packed(BACKEND[4]))


def test_zone_separates_equal_tuples(conntrack: socket.socket) -> None:
    flow = flow_of("tcp", 4, 5558)
    insert(conntrack, flow, 4)
    zoned = ctnetlink.new_entry(flow, dnat=None, snat=None, timeout_s=60, seq=2, zone=7, ack=True)
    assert outcome(conntrack, zoned) == 0
    entry = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 3, zone=7)).payload)
    assert (entry.zone, entry.is_dnat) == (7, False)
    assert outcome(conntrack, ctnetlink.delete_entry(flow, 4, zone=7)) == 0
    entry = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 5)).payload)
    assert (entry.zone, entry.is_dnat) == (0, True)


def test_labels_need_a_rule_that_asks_for_labels(
    network: Network, conntrack: socket.socket
) -> None:
    flow = flow_of("tcp", 4, 5559)
    request = ctnetlink.new_entry(
        flow, dnat=None, snat=None, timeout_s=60, seq=1, labels=b"\x01" + bytes(15), ack=True
    )
    assert outcome(conntrack, request) == 0  # and yet nothing was stored
    got = ask(conntrack, ctnetlink.get_entry(flow, 2))
    assert ctnetlink.parse_entry(got.payload).labels == b""
    assert outcome(conntrack, ctnetlink.delete_entry(flow, 3)) == 0
    rule = "FORWARD -m connlabel --label 127"
    network.on_node(f"iptables -w -A {rule}")
    try:
        assert outcome(conntrack, request) == 0
        got = ask(conntrack, ctnetlink.get_entry(flow, 4))
        assert ctnetlink.parse_entry(got.payload).labels == b"\x01" + bytes(15)
    finally:
        network.on_node(f"iptables -w -D {rule}")


def test_filtered_dump(conntrack: socket.socket) -> None:
    for port, mark in ((5560, 0x10), (5561, 0x11), (5562, 0x20)):
        insert(conntrack, flow_of("udp", 4, port), 4, mark=mark)
    plain = flow_of("udp", 4, 5563)
    untranslated = ctnetlink.new_entry(
        plain, dnat=None, snat=None, timeout_s=60, seq=1, mark=0x10, ack=True
    )
    assert outcome(conntrack, untranslated) == 0

    def ports(**options: int) -> set[int]:
        conntrack.send(ctnetlink.dump(nlmsg.AF_INET, 9, **options))
        found: set[int] = set()
        while True:
            for message in nlmsg.messages(conntrack.recv(65536)):
                if message.type == nlmsg.NLMSG_DONE:
                    assert nlmsg.ack(message).errno == 0
                    return found
                found.add(ctnetlink.parse_entry(message.payload).original.src_port)

    assert ports() == {5560, 5561, 5562, 5563}
    assert ports(mark=0x10) == {5560, 5563}
    assert ports(mark=0x10, mark_mask=0xF0) == {5560, 5561, 5563}
    assert ports(mark=0x10, status=ctnetlink.IPS_DST_NAT) == {5560}
    insert(conntrack, flow_of("tcp", 4, 5564), 4, mark=0x10)
    assert ports(protocol=17) == {5560, 5561, 5562, 5563}
    assert ports(protocol=6) == {5564}
    assert ports(protocol=132) == set()
    assert ports(protocol=17, mark=0x20) == {5562}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("masquerade", [False, True])
def test_udp_is_translated_both_ways(
    network: Network, conntrack: socket.socket, version: int, masquerade: bool
) -> None:
    insert(conntrack, flow_of("udp", version, 5565), version, masquerade=masquerade)
    server = network.open(network.backend, FAMILY[version], socket.SOCK_DGRAM)
    server.bind((BACKEND[version], 8080))
    client = network.open(network.client, FAMILY[version], socket.SOCK_DGRAM)
    client.bind((CLIENT[version], 5565))
    client.connect((VIP[version], 80))
    client.send(b"question")
    data, peer = server.recvfrom(100)
    expected = PODS if masquerade else CLIENT
    assert (data, peer[0]) == (b"question", expected[version])
    server.sendto(b"answer", peer)
    assert client.recv(100) == b"answer"
    got = ask(conntrack, ctnetlink.get_entry(flow_of("udp", version, 5565), 3))
    assert ctnetlink.parse_entry(got.payload).has_seen_reply
    server.close()
    client.close()


@pytest.mark.parametrize("version", [4, 6])
def test_echo_to_the_virtual_address_is_answered(
    network: Network, conntrack: socket.socket, version: int
) -> None:
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    insert(conntrack, flow_of("icmp", version, 777), version)
    client = network.open(network.client, FAMILY[version], socket.SOCK_RAW, protocol)
    client.connect((VIP[version], 0))
    request = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 777, 1) + b"echo"
    # The kernel fills in ICMPv6 checksums of raw sockets, not those of ICMP.
    request = request[:2] + struct.pack("!H", internet_checksum(request)) + request[4:]
    client.send(request)
    answer = client.recv(200)
    body = answer[20:] if version == 4 else answer
    assert struct.unpack_from("!BBxxHH", body) == (0 if version == 4 else 129, 0, 777, 1)
    client.close()


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sctp(src_port: int, dst_port: int, tag: int, chunk: bytes) -> bytes:
    head = struct.pack("!HHI", src_port, dst_port, tag)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("inserted", [True, False])
def test_sctp_association_needs_no_protocol_state_at_creation(
    network: Network, conntrack: socket.socket, version: int, inserted: bool
) -> None:
    """An entry made without CTA_PROTOINFO passes the states of one the kernel made itself."""
    target, port = (VIP, 80) if inserted else (BACKEND, 8080)
    flow = ctnetlink.Tuple(packed(CLIENT[version]), packed(target[version]), 132, 5570, port)
    if inserted:
        insert(conntrack, flow, version, masquerade=False)
        fresh = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 2)).payload)
        assert fresh.sctp_state == ctnetlink.SCTP_CONNTRACK_NONE
    client = network.open(network.client, FAMILY[version], socket.SOCK_RAW, 132)
    client.bind((CLIENT[version], 0))
    server = network.open(network.backend, FAMILY[version], socket.SOCK_RAW, 132)
    server.bind((BACKEND[version], 0))
    ours, theirs = 0x11111111, 0x22222222
    init = struct.pack("!IIHHI", ours, 65536, 1, 1, 1)
    init_ack = struct.pack("!IIHHI", theirs, 65536, 1, 1, 1)
    steps = (
        (client, 0, packet.SCTP_INIT, init, ctnetlink.SCTP_CONNTRACK_CLOSED),
        (server, ours, packet.SCTP_INIT_ACK, init_ack, ctnetlink.SCTP_CONNTRACK_COOKIE_WAIT),
        (client, theirs, 10, b"cook", ctnetlink.SCTP_CONNTRACK_COOKIE_ECHOED),
        (server, ours, 11, b"", ctnetlink.SCTP_CONNTRACK_ESTABLISHED),
    )
    for sender, tag, chunk_type, value, state in steps:
        chunk = struct.pack("!BBH", chunk_type, 0, 4 + len(value)) + value
        if sender is client:
            client.sendto(sctp(5570, port, tag, chunk), (target[version], 0))
            data, peer = server.recvfrom(2000)
            wanted = (CLIENT[version], 5570, 8080)
        else:
            server.sendto(sctp(8080, 5570, tag, chunk), (CLIENT[version], 0))
            data, peer = client.recvfrom(2000)
            wanted = (target[version], port, 5570)
        data = data[20:] if version == 4 else data
        assert (peer[0], *struct.unpack_from("!HH", data)) == wanted
        got = data[:8] + bytes(4) + data[12:]
        assert struct.unpack_from("<I", data, 8) == (crc32c(got),)
        seen = ctnetlink.parse_entry(ask(conntrack, ctnetlink.get_entry(flow, 3)).payload)
        assert seen.sctp_state == state
    client.close()
    server.close()


@pytest.mark.parametrize("version", [4, 6])
def test_queue_configuration_packets_and_a_batch_of_verdicts(
    network: Network, version: int
) -> None:
    queue = network.netlink()
    flags = nfqueue.NFQA_CFG_F_FAIL_OPEN
    for request in (
        nfqueue.bind(QUEUE, 1),
        nfqueue.config_params(QUEUE, 2, 128),
        nfqueue.config_maxlen(QUEUE, 3, 2048),
        nfqueue.config_flags(QUEUE, 4, flags, flags),
    ):
        assert outcome(queue, request) == 0
    with inside(network.node):
        line = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().split()
    portid = queue.getsockname()[0] & 0xFFFFFFFF
    # queue, port id, waiting, copy mode, copy range
    assert (int(line[0]), int(line[1]) & 0xFFFFFFFF) == (QUEUE, portid)
    assert line[2:5] == ["0", str(nfqueue.NFQNL_COPY_PACKET), "128"]
    tool = "iptables" if version == 4 else "ip6tables"
    rule = f"PREROUTING -p udp --dport 8080 -j NFQUEUE --queue-num {QUEUE}"
    network.on_node(f"{tool} -w -t raw -A {rule}")
    server = network.open(network.backend, FAMILY[version], socket.SOCK_DGRAM)
    server.bind((BACKEND[version], 8080))
    client = network.open(network.client, FAMILY[version], socket.SOCK_DGRAM)
    client.bind((CLIENT[version], 5571))
    try:
        waiting = []
        for number in range(5):
            client.sendto(b"%d" % number, (BACKEND[version], 8080))
            (message,) = nlmsg.messages(queue.recv(65536))
            waiting.append(nfqueue.parse_packet(message.payload))
        headers = [packet.parse(one.payload) for one in waiting]
        assert {(one.src_port, one.dst_port, one.protocol) for one in headers} == {(5571, 8080, 17)}
        assert {one.queue for one in waiting} == {QUEUE}
        ids = [one.packet_id for one in waiting]
        assert ids == list(range(ids[0], ids[0] + 5))
        queue.send(nfqueue.verdict(QUEUE, ids[0], nfqueue.NF_DROP))
        queue.send(nfqueue.verdict_batch(QUEUE, ids[2], nfqueue.NF_ACCEPT))
        queue.send(
            nfqueue.verdict(QUEUE, ids[3], nfqueue.NF_ACCEPT)
            + nfqueue.verdict(QUEUE, ids[4], nfqueue.NF_ACCEPT, mark=3)
        )
        assert [server.recv(10) for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        late = nfqueue.verdict(QUEUE, ids[4], nfqueue.NF_ACCEPT, seq=5)
        assert outcome(queue, late) == errno.ENOENT
        assert outcome(queue, nfqueue.unbind(QUEUE, 6)) == 0
    finally:
        network.on_node(f"{tool} -w -t raw -D {rule}")
        for opened in (queue, server, client):
            opened.close()


@pytest.mark.parametrize("version", [4, 6])
def test_routes_and_addresses_agree_with_ip(network: Network, version: int) -> None:
    route = network.netlink(nlmsg.NETLINK_ROUTE)
    links = json.loads(sh(f"ip -n {network.node} -j link"))
    index = {link["ifname"]: link["ifindex"] for link in links}
    for destination in (BACKEND[version], CLIENT[version], FRONT[version]):
        (told,) = json.loads(sh(f"ip -n {network.node} -j route get {destination}"))
        got = rtnetlink.parse_route(ask(route, rtnetlink.get_route(packed(destination), 1)).payload)
        assert (got.oif, got.prefsrc) == (index[told["dev"]], packed(told["prefsrc"]))
        assert (got.type == rtnetlink.RTN_LOCAL) == (told.get("type") == "local")
    nowhere = packed("203.0.113.1" if version == 4 else "2001:db8:ffff::1")
    assert outcome(route, rtnetlink.get_route(nowhere, 2)) == errno.ENETUNREACH
    chosen = rtnetlink.get_route(
        packed(BACKEND[version]), 3, oif=index["pods"], src=packed(PODS[version])
    )
    assert rtnetlink.parse_route(ask(route, chosen).payload).oif == index["pods"]
    route.send(rtnetlink.dump_addresses(int(FAMILY[version]), 4))
    found: set[tuple[int, bytes, int]] = set()
    done = False
    while not done:
        for message in nlmsg.messages(route.recv(65536)):
            if message.type == nlmsg.NLMSG_DONE:
                done = True
            else:
                one = rtnetlink.parse_address(message.payload)
                found.add((one.ifindex, one.address, one.prefix_length))
    told_addresses = {
        (link["ifindex"], packed(one["local"]), one["prefixlen"])
        for link in json.loads(sh(f"ip -n {network.node} -{version} -j addr"))
        for one in link["addr_info"]
    }
    assert found == told_addresses
    route.close()


def test_events_tell_who_made_an_entry(network: Network, conntrack: socket.socket) -> None:
    events = network.netlink()
    for group in (nfnetlink.NFNLGRP_CONNTRACK_NEW, nfnetlink.NFNLGRP_CONNTRACK_DESTROY):
        events.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_ADD_MEMBERSHIP, group)
    flow = flow_of("tcp", 4, 5572)
    insert(conntrack, flow, 4, mark=9)
    assert outcome(conntrack, ctnetlink.delete_entry(flow, 2)) == 0
    for type_ in (ctnetlink.MSG_NEW, ctnetlink.MSG_DELETE):
        (message,) = nlmsg.messages(events.recv(65536))
        assert (message.type, message.pid) == (type_, conntrack.getsockname()[0])
        entry = ctnetlink.parse_entry(message.payload)
        assert (entry.original, entry.mark) == (flow, 9)
    events.close()
