"""IP and transport headers of a queued packet.

IPv4 (RFC 791), IPv6 with extension headers (RFC 8200, AH of RFC 4302), TCP (RFC 9293), UDP (RFC
768), SCTP (RFC 9260), ICMP (RFC 792), ICMPv6 (RFC 4443). Checksums are not looked at: the kernel
did, or the packet was made here and carries none yet.
"""

import struct
from dataclasses import dataclass

from nfqproxy.errors import CodecError
from nfqproxy.wire import nlmsg

IPPROTO_HOPOPTS = 0
IPPROTO_ICMP = 1
IPPROTO_TCP = 6
IPPROTO_UDP = 17
IPPROTO_ROUTING = 43
IPPROTO_FRAGMENT = 44
IPPROTO_AH = 51
IPPROTO_ICMPV6 = 58
IPPROTO_NONE = 59
IPPROTO_DSTOPTS = 60
IPPROTO_SCTP = 132

TCP_FIN = 0x01
TCP_SYN = 0x02
TCP_RST = 0x04
TCP_PSH = 0x08
TCP_ACK = 0x10

SCTP_DATA = 0
SCTP_INIT = 1
SCTP_INIT_ACK = 2

MAX_EXTENSION_HEADERS = 8
"""RFC 8200 4.1: each kind once, destination options twice, six in all. More is not honest."""

_EXTENSIONS = frozenset((IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_DSTOPTS, IPPROTO_AH))
_PORTS = struct.Struct("!HH")
# Least bytes of each transport header that must have been captured.
_TRANSPORT_MINIMUM = {
    IPPROTO_TCP: 20,
    IPPROTO_UDP: 8,
    IPPROTO_SCTP: 16,  # the common header and the first chunk's header
    IPPROTO_ICMP: 8,
    IPPROTO_ICMPV6: 8,
}
# Queries whose second word starts with an identifier.
_ICMP_WITH_ID = frozenset((0, 8, 13, 14, 15, 16, 17, 18))
_ICMPV6_WITH_ID = frozenset((128, 129))


@dataclass(frozen=True, slots=True, kw_only=True)
class PacketHeaders:
    """What the headers of one packet say."""

    family: int
    """AF_INET or AF_INET6."""
    protocol: int
    """Transport protocol, behind all IPv6 extension headers."""
    src: bytes
    """Packed source address."""
    dst: bytes
    """Packed destination address."""
    src_port: int
    """Source port; 0 where the protocol has none or a fragment hides it."""
    dst_port: int
    """Destination port; 0 likewise."""
    is_fragment: bool
    """A fragment other than the first: the transport header is not in it."""
    has_more_fragments: bool
    """More fragments follow this one (with ``is_fragment`` false: it is the first)."""
    transport_offset: int
    """Bytes from the IP header's start to the transport header (in a fragment: to its data)."""
    tcp_flags: int | None
    """Flag byte CWR..FIN; None for other protocols and fragments."""
    sctp_chunk: int | None
    """Type of the first chunk; None for other protocols and fragments."""
    icmp_type: int | None
    """ICMP or ICMPv6 type; None for other protocols and fragments."""
    icmp_code: int | None
    """ICMP or ICMPv6 code."""
    icmp_id: int | None
    """Identifier of an ICMP or ICMPv6 query; None where the type has none."""

    @property
    def is_tcp_syn(self) -> bool:
        """Opens a TCP connection, by iptables' ``--syn``: of SYN, RST, ACK, FIN only SYN is set."""
        mask = TCP_SYN | TCP_RST | TCP_ACK | TCP_FIN
        return self.tcp_flags is not None and self.tcp_flags & mask == TCP_SYN


def parse(payload: bytes) -> PacketHeaders:
    """Decode a packet from its IP header on; CodecError if a header is malformed or cut off."""
    if not payload:
        raise CodecError("queued packet is empty; set a copy range")
    version = payload[0] >> 4
    if version == 4:
        return _parse_ipv4(payload)
    if version == 6:
        return _parse_ipv6(payload)
    raise CodecError(f"queued packet has IP version {version}; only 4 and 6 exist")


def _need(payload: bytes, offset: int, length: int, what: str, end: int) -> None:
    if offset + length > end:
        cause = "the packet is malformed" if end < len(payload) else "raise the copy range"
        raise CodecError(
            f"{what} needs bytes {offset}-{offset + length - 1}, the packet has {end}; {cause}"
        )


def _parse_ipv4(payload: bytes) -> PacketHeaders:
    _need(payload, 0, 20, "IPv4 header", len(payload))
    header_length = (payload[0] & 0x0F) * 4
    if header_length < 20:
        raise CodecError(f"IPv4 header length {header_length} is below 20; the packet is malformed")
    total = int.from_bytes(payload[2:4], "big")
    # 0: a GSO packet above 64 KiB (BIG TCP). Bytes behind the total length are link padding.
    end = min(total, len(payload)) if total else len(payload)
    _need(payload, 0, header_length, "IPv4 header with options", end)
    fragment = int.from_bytes(payload[6:8], "big")
    return _transport(
        payload,
        end,
        family=nlmsg.AF_INET,
        protocol=payload[9],
        src=payload[12:16],
        dst=payload[16:20],
        offset=header_length,
        is_fragment=bool(fragment & 0x1FFF),
        has_more_fragments=bool(fragment & 0x2000),
    )


def _parse_ipv6(payload: bytes) -> PacketHeaders:
    _need(payload, 0, 40, "IPv6 header", len(payload))
    length = int.from_bytes(payload[4:6], "big")
    # 0: a jumbogram or a GSO packet above 64 KiB, or truly nothing: then the walk finds out.
    end = min(40 + length, len(payload)) if length else len(payload)
    protocol = payload[6]
    offset = 40
    is_fragment = has_more_fragments = False
    for _ in range(MAX_EXTENSION_HEADERS + 1):
        if protocol == IPPROTO_FRAGMENT:
            _need(payload, offset, 8, "IPv6 fragment header", end)
            field = int.from_bytes(payload[offset + 2 : offset + 4], "big")
            protocol = payload[offset]
            offset += 8
            is_fragment = bool(field & 0xFFF8)
            has_more_fragments = bool(field & 1)
            if is_fragment:
                break  # What follows is data of the transport, or of a header before it.
        elif protocol in _EXTENSIONS:
            _need(payload, offset, 8, f"IPv6 extension header {protocol}", end)
            units = payload[offset + 1]
            size = (units + 2) * 4 if protocol == IPPROTO_AH else (units + 1) * 8
            _need(payload, offset, size, f"IPv6 extension header {protocol}", end)
            protocol = payload[offset]
            offset += size
        else:
            break
    else:
        raise CodecError(
            f"IPv6 packet has more than {MAX_EXTENSION_HEADERS} extension headers; it is malformed"
        )
    return _transport(
        payload,
        end,
        family=nlmsg.AF_INET6,
        protocol=protocol,
        src=payload[8:24],
        dst=payload[24:40],
        offset=offset,
        is_fragment=is_fragment,
        has_more_fragments=has_more_fragments,
    )


def _transport(
    payload: bytes,
    end: int,
    *,
    family: int,
    protocol: int,
    src: bytes,
    dst: bytes,
    offset: int,
    is_fragment: bool,
    has_more_fragments: bool,
) -> PacketHeaders:
    src_port = dst_port = 0
    tcp_flags = sctp_chunk = icmp_type = icmp_code = icmp_id = None
    minimum = 0 if is_fragment else _TRANSPORT_MINIMUM.get(protocol, 0)
    if minimum:
        _need(payload, offset, minimum, f"transport header of protocol {protocol}", end)
        if protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
            icmp_type, icmp_code = payload[offset], payload[offset + 1]
            with_id = _ICMP_WITH_ID if protocol == IPPROTO_ICMP else _ICMPV6_WITH_ID
            if icmp_type in with_id:
                icmp_id = int.from_bytes(payload[offset + 4 : offset + 6], "big")
        else:
            src_port, dst_port = _PORTS.unpack_from(payload, offset)
            if protocol == IPPROTO_TCP:
                tcp_flags = payload[offset + 13]
            elif protocol == IPPROTO_SCTP:
                sctp_chunk = payload[offset + 12]
    return PacketHeaders(
        family=family,
        protocol=protocol,
        src=src,
        dst=dst,
        src_port=src_port,
        dst_port=dst_port,
        is_fragment=is_fragment,
        has_more_fragments=has_more_fragments,
        transport_offset=offset,
        tcp_flags=tcp_flags,
        sctp_chunk=sctp_chunk,
        icmp_type=icmp_type,
        icmp_code=icmp_code,
        icmp_id=icmp_id,
    )
