"""Unusual first packets: SCTP INIT, IPv4 options, IPv6 extension headers, options of both protocols.

The kernel has no SCTP sockets here, so INIT chunks are built by scapy and go through raw sockets;
IP options and extension headers are put on real TCP sockets (ip(7) IP_OPTIONS, RFC 3542 section 9).
"""

import random
import re
import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP
from scapy.layers.sctp import SCTP, SCTPChunkInit

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.icmp import open_listener, read_message
from nfqproxy.model import Family, Protocol
from tests.kernel.proxy import COMBINATIONS
from tests.kernel.responder import TIMEOUT_S, new_flow, parse
from tests.kernel.world import NODE4, NODE6, REMOTE4, REMOTE6, SCTP4, WEB4, WEB6, World, world

NO_OPERATION, ROUTER_ALERT = b"\x01", b"\x94\x04\x00\x00"  # RFC 791, RFC 2113
# RFC 8200 section 4.6: next header (the kernel fills it in), length in 8 octets less one, PadN option.
DESTINATION_OPTIONS = bytes([0, 0, 1, 4, 0, 0, 0, 0])
# An unknown option that is to be skipped: type 0x1e of RFC 4727.
LONG_DESTINATION_OPTIONS = bytes([0, 5, 0x1E, 44, *bytes(44)])
BEYOND_COPY_RANGE = bytes([0, 15, 0x1E, 124, *bytes(124)])
IPV6_DSTOPTS = 59  # include/uapi/linux/in6.h


@pytest.fixture(scope="module", name="running", params=COMBINATIONS)
def a_world(request: pytest.FixtureRequest) -> Iterator[World]:
    reader, data_path = request.param
    with world(reader=reader, data_path=data_path) as running:
        yield running


@pytest.mark.parametrize(
    "options",
    [NO_OPERATION * 4, ROUTER_ALERT, NO_OPERATION * 40],
    ids=["nop", "router-alert", "longest"],
)
def test_ipv4_options_do_not_hide_a_syn(running: World, options: bytes) -> None:
    before = running.proxy.counters().get("unparsed", 0)
    with (
        running.queues({(Family.IPV4, Protocol.TCP): 1}),
        running.client.socket(socket.AF_INET, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
        sock.connect((WEB4, 80))
        assert parse(sock.recv(200)).client == NODE4
    assert running.proxy.counters().get("unparsed", 0) == before


@pytest.mark.parametrize(
    "header", [DESTINATION_OPTIONS, LONG_DESTINATION_OPTIONS], ids=["short", "long"]
)
def test_ipv6_extension_headers_do_not_hide_a_syn(running: World, header: bytes) -> None:
    before = running.proxy.counters().get("unparsed", 0)
    with (
        running.queues({(Family.IPV6, Protocol.TCP): 1}),
        running.client.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, header)
        sock.connect((WEB6, 80))
        assert parse(sock.recv(200)).client == NODE6
    assert running.proxy.counters().get("unparsed", 0) == before


def test_headers_beyond_what_is_copied_are_left_to_the_fallback(running: World) -> None:
    """The worker sees 128 bytes of a packet; a TCP header that begins later it cannot decide."""
    before = running.proxy.counters().get("unparsed", 0)
    with (
        running.queues({(Family.IPV6, Protocol.TCP): 1}, undecided=1),
        running.client.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, BEYOND_COPY_RANGE)
        sock.connect((WEB6, 80))
        assert parse(sock.recv(200)).client == NODE6
    assert running.proxy.counters()["unparsed"] == before + 1


def test_sctp_init_is_queued_and_translated(running: World) -> None:
    source_port = 40000 + struct.unpack("!H", running.proxy.pid.to_bytes(4)[2:])[0] % 20000
    client4 = running.topology.client.address4
    chunk = SCTPChunkInit(
        init_tag=0x1234ABCD, a_rwnd=65536, n_out_streams=1, n_in_streams=1, init_tsn=1
    )
    # scapy computes the CRC32c, without which conntrack calls the packet invalid.
    packet = bytes(IP(src=client4, dst=SCTP4) / SCTP(sport=source_port, dport=80, tag=0) / chunk)[
        20:
    ]
    with (
        running.pod.namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP) as seen,
        running.client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP) as sender,
        running.queues({(Family.IPV4, Protocol.SCTP): 1}),
    ):
        seen.settimeout(TIMEOUT_S)
        sender.sendto(packet, (SCTP4, 0))
        data, peer = seen.recvfrom(2000)
    arrived = IP(data)
    assert peer[0] == NODE4
    assert (arrived.dst, arrived[SCTP].dport) == (running.pod.address4, 8080)
    assert arrived[SCTPChunkInit].init_tag == 0x1234ABCD
    right_checksum = IP(
        bytes(
            IP(src=arrived.src, dst=arrived.dst)
            / SCTP(sport=arrived[SCTP].sport, dport=8080, tag=0)
            / chunk
        )
    )[SCTP].chksum
    assert arrived[SCTP].chksum == right_checksum
    listing = running.node.run("conntrack", "-L", "-p", "sctp").stdout
    original, reply = re.findall(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", listing)
    assert original == (client4, SCTP4, str(source_port), "80")
    assert reply[:3] == (running.pod.address4, NODE4, "8080")


@pytest.mark.parametrize("vip", [WEB4, WEB6])
def test_fragmented_datagram_is_decided_whole(running: World, vip: str) -> None:
    """Connection tracking reassembles before the queue's hook, so the ports are always there."""
    payload = random.Random(1).randbytes(6000)
    with (
        running.queues({(Family.IPV6 if ":" in vip else Family.IPV4, Protocol.UDP): 1}),
        new_flow(running.client, vip, 80) as sock,
    ):
        for _ in range(3):
            sock.send(payload)
            assert sock.recv(65536).split(b"\n", 1)[1] == payload


NARROW = 1300
TOO_BIG = {Family.IPV4: (3, 4), Family.IPV6: (2, 0)}  # RFC 792, RFC 4443
TIME_EXCEEDED = {Family.IPV4: (11, 0), Family.IPV6: (3, 0)}
SENT_WHOLE = {
    # linux/in.h, in6.h: IP_MTU_DISCOVER and IPV6_MTU_DISCOVER, IP_PMTUDISC_DO.
    Family.IPV4: (socket.IPPROTO_IP, 10, 2),
    Family.IPV6: (socket.IPPROTO_IPV6, 23, 2),
}
HOPS = {
    Family.IPV4: (socket.IPPROTO_IP, socket.IP_TTL),
    Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
}


@pytest.fixture
def narrow(running: World) -> Iterator[None]:
    """The last link to pod-2-11, behind node n2, takes less than the others."""
    (pod,) = running.topology.pods_of("n2")
    node = running.topology.nodes[1].namespace
    node.ip(f"link set {pod.host_device} mtu {NARROW}")
    yield
    node.ip(f"link set {pod.host_device} mtu 1500")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("vip", [REMOTE4, REMOTE6])
@pytest.mark.parametrize("caller", ["client", "pod"])
def test_errors_on_the_way_to_the_backend_reach_the_client(
    running: World, caller: str, vip: str
) -> None:
    """n2 tells n1 of n1's own, masqueraded packet (a pod's is not); the client hears of the one it sent."""
    family = Family.IPV6 if ":" in vip else Family.IPV4
    namespace = running.client if caller == "client" else running.pod.namespace
    for hops in (1, 2):  # n1, n2
        with new_flow(namespace, vip, 80) as sock:
            sock.setsockopt(*HOPS[family], hops)
            assert icmp_error(namespace, sock, b"?", vip) == TIME_EXCEEDED[family]
    with new_flow(namespace, vip, 80) as sock:
        sock.send(b"?")
        sock.recv(200)
        sock.setsockopt(*SENT_WHOLE[family])
        assert icmp_error(namespace, sock, bytes(NARROW), vip) == TOO_BIG[family]
        with pytest.raises(OSError, match="Message too long"):  # and has learned of it
            sock.send(bytes(NARROW))


def icmp_error(
    namespace: Namespace, sock: socket.socket, payload: bytes, vip: str
) -> tuple[int, int]:
    """Send, and return type and code of the error about this very datagram."""
    family = Family.IPV6 if ":" in vip else Family.IPV4
    with namespace.call(lambda: open_listener(family)) as listener:
        listener.settimeout(TIMEOUT_S)
        sock.send(payload)
        while True:
            message = read_message(listener)
            if (message.destination, message.port) == (vip, 80):
                assert message.source_port == sock.getsockname()[1]
                return message.kind, message.code
