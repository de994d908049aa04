"""Packet headers, against packets built by scapy."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.layers.sctp import SCTP, SCTPChunkInit

from nfqproxy.errors import CodecError
from nfqproxy.wire import nlmsg, packet

V4 = {"src": "192.0.2.10", "dst": "10.96.0.1"}
V6 = {"src": "2001:db8:2::10", "dst": "fd00:10:96::1"}
PORTS = st.integers(0, 65535)

TRANSPORTS = {
    packet.IPPROTO_TCP: TCP(sport=40000, dport=80, flags="S", options=[("MSS", 1460)]),
    packet.IPPROTO_UDP: UDP(sport=40000, dport=80) / b"query",
    packet.IPPROTO_SCTP: SCTP(sport=40000, dport=80) / SCTPChunkInit(),
}
# scapy leaves the AH's length and next header to the caller (RFC 4302: words minus 2).
AUTHENTICATION = AH(payloadlen=4, spi=1, seq=1, icv=b"\xff" * 12)
OPTIONS = [PadN(optdata=b"\0" * 4)]
EXTENSIONS = {
    "none": [],
    "hop-by-hop": [IPv6ExtHdrHopByHop(options=OPTIONS)],
    "destination options": [IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 20)])],
    "routing": [IPv6ExtHdrRouting(addresses=["2001:db8::1"])],
    "authentication": [AUTHENTICATION],
    "first fragment": [IPv6ExtHdrFragment(offset=0, m=1, id=7)],
    "all": [
        IPv6ExtHdrHopByHop(options=OPTIONS),
        IPv6ExtHdrDestOpt(options=OPTIONS),
        IPv6ExtHdrRouting(addresses=["2001:db8::1"]),
        IPv6ExtHdrFragment(offset=0, m=0, id=7),
        AUTHENTICATION,
        IPv6ExtHdrDestOpt(options=OPTIONS),
    ],
}


def ipv6(extensions: list[object], transport: object, protocol: int = packet.IPPROTO_UDP) -> bytes:
    whole = IPv6(**V6)
    for position, extension in enumerate(extensions):
        header = extension.copy()  # type: ignore[attr-defined]
        if extension is AUTHENTICATION:
            header.nh = protocol if position == len(extensions) - 1 else packet.IPPROTO_DSTOPTS
        whole /= header
    return bytes(whole / transport)


@pytest.mark.parametrize("protocol", TRANSPORTS)
@pytest.mark.parametrize("words", [0, 1, 10])
def test_ipv4_with_options(protocol: int, words: int) -> None:
    raw = bytes(IP(**V4, options=[IPOption_NOP()] * words * 4) / TRANSPORTS[protocol])
    got = packet.parse(raw)
    assert got.transport_offset == 20 + words * 4
    assert (got.family, got.protocol) == (nlmsg.AF_INET, protocol)
    assert socket.inet_ntop(socket.AF_INET, got.src) == V4["src"]
    assert socket.inet_ntop(socket.AF_INET, got.dst) == V4["dst"]
    assert (got.src_port, got.dst_port) == (40000, 80)
    assert got.is_tcp_syn == (protocol == packet.IPPROTO_TCP)
    assert got.sctp_chunk == (packet.SCTP_INIT if protocol == packet.IPPROTO_SCTP else None)
    assert not got.is_fragment


@pytest.mark.parametrize("protocol", TRANSPORTS)
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_ipv6_with_extension_headers(protocol: int, kind: str) -> None:
    raw = ipv6(EXTENSIONS[kind], TRANSPORTS[protocol], protocol)
    got = packet.parse(raw)
    assert got.transport_offset == len(raw) - len(bytes(TRANSPORTS[protocol]))
    assert (got.family, got.protocol) == (nlmsg.AF_INET6, protocol)
    assert socket.inet_ntop(socket.AF_INET6, got.src) == V6["src"]
    assert (got.src_port, got.dst_port) == (40000, 80)
    assert not got.is_fragment
    assert got.has_more_fragments == (kind == "first fragment")


@given(src_port=PORTS, dst_port=PORTS, flags=st.integers(0, 255))
def test_ports_and_flags(src_port: int, dst_port: int, flags: int) -> None:
    got = packet.parse(bytes(IP(**V4) / TCP(sport=src_port, dport=dst_port, flags=flags)))
    assert (got.src_port, got.dst_port, got.tcp_flags) == (src_port, dst_port, flags)
    assert got.is_tcp_syn == (flags & 0x17 == 0x02)


def test_later_fragments_have_no_ports() -> None:
    for raw in (
        bytes(IP(**V4, frag=64, proto=17) / bytes(8)),
        ipv6([IPv6ExtHdrFragment(offset=64, m=0, id=7, nh=17)], b"\xff" * 8),
    ):
        got = packet.parse(raw)
        assert got.is_fragment
        assert (got.protocol, got.src_port, got.dst_port) == (17, 0, 0)
        assert got.transport_offset == len(raw) - 8


def test_first_ipv4_fragment_has_ports() -> None:
    got = packet.parse(bytes(IP(**V4, flags="MF") / UDP(sport=5, dport=6)))
    assert (got.is_fragment, got.has_more_fragments, got.dst_port) == (False, True, 6)


def test_icmp() -> None:
    echo = packet.parse(bytes(IP(**V4) / ICMP(type=8, id=77)))
    assert (echo.icmp_type, echo.icmp_code, echo.icmp_id) == (8, 0, 77)
    error = packet.parse(bytes(IP(**V4) / ICMP(type=3, code=1)))
    assert (error.icmp_type, error.icmp_code, error.icmp_id) == (3, 1, None)
    echo6 = packet.parse(bytes(IPv6(**V6) / ICMPv6EchoRequest(id=78)))
    assert (echo6.protocol, echo6.icmp_type, echo6.icmp_id) == (58, 128, 78)
    error6 = packet.parse(bytes(IPv6(**V6) / ICMPv6DestUnreach(code=4)))
    assert (error6.icmp_type, error6.icmp_code, error6.icmp_id) == (1, 4, None)
    assert (echo.src_port, echo.dst_port, echo.tcp_flags) == (0, 0, None)


@pytest.mark.parametrize("protocol", [47, 50, packet.IPPROTO_NONE])
def test_protocols_without_ports(protocol: int) -> None:
    got = packet.parse(bytes(IPv6(**V6, nh=protocol) / (b"\xff" * 4)))
    assert (got.protocol, got.src_port, got.dst_port, got.transport_offset) == (protocol, 0, 0, 40)


@pytest.mark.parametrize(
    "headers", [packet.MAX_EXTENSION_HEADERS, packet.MAX_EXTENSION_HEADERS + 1]
)
def test_chain_of_extension_headers_is_bounded(headers: int) -> None:
    raw = ipv6([IPv6ExtHdrDestOpt(options=OPTIONS)] * headers, UDP(sport=1, dport=2))
    if headers <= packet.MAX_EXTENSION_HEADERS:
        assert packet.parse(raw).dst_port == 2
    else:
        with pytest.raises(CodecError, match="more than 8 extension headers"):
            packet.parse(raw)


WHOLE = {
    **{
        f"IPv4 {p}": bytes(IP(**V4, options=[IPOption_NOP()] * 4) / t)
        for p, t in TRANSPORTS.items()
    },
    **{f"IPv6 {p}": ipv6(EXTENSIONS["all"], t) for p, t in TRANSPORTS.items()},
    "IPv4 icmp": bytes(IP(**V4) / ICMP()),
    "IPv6 icmp": bytes(IPv6(**V6) / ICMPv6EchoRequest()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_cut_by_the_copy_range(name: str) -> None:
    """Shorter than the headers is refused; from there on the cut changes nothing."""
    raw = WHOLE[name]
    whole = packet.parse(raw)
    minimum = {6: 20, 17: 8, 132: 16}.get(whole.protocol, 8)
    for length in range(len(raw)):
        if length < whole.transport_offset + minimum:
            with pytest.raises(CodecError):
                packet.parse(raw[:length])
        else:
            assert packet.parse(raw[:length]) == whole


def test_bytes_behind_the_total_length_are_not_read() -> None:
    raw = bytearray(bytes(IP(**V4) / UDP(sport=1, dport=2)))
    raw[2:4] = (24).to_bytes(2, "big")
    with pytest.raises(CodecError, match="the packet is malformed"):
        packet.parse(bytes(raw))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "empty"),
        (b"\x50" + bytes(40), "IP version 5"),
        (b"\x44" + bytes(40), "header length 16"),
        (b"\x45" + bytes(10), "raise the copy range"),
        (b"\x60" + bytes(30), "raise the copy range"),
    ],
)
def test_no_ip_packet(raw: bytes, problem: str) -> None:
    with pytest.raises(CodecError, match=problem):
        packet.parse(raw)


@given(version=st.sampled_from((0x40, 0x45, 0x46, 0x60)), rest=st.binary(max_size=120))
def test_arbitrary_bytes_give_headers_or_codec_error(version: int, rest: bytes) -> None:
    try:
        packet.parse(bytes([version]) + rest)
    except CodecError:
        pass
