"""Routes and interface addresses (linux/rtnetlink.h, linux/if_addr.h).

Unlike netfilter's, the numbers inside these attributes are in host byte order.
"""

import struct
from dataclasses import dataclass

from nfqproxy.errors import CodecError
from nfqproxy.wire import nlmsg

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTM_NEWRULE = 32
RTM_DELRULE = 33

RTA_DST = 1
RTA_SRC = 2
RTA_IIF = 3
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_PREFSRC = 7
RTA_METRICS = 8
RTA_MULTIPATH = 9
RTA_TABLE = 15
RTA_MARK = 16
RTA_VIA = 18

RTN_UNSPEC = 0
RTN_UNICAST = 1
RTN_LOCAL = 2
RTN_BROADCAST = 3
RTN_ANYCAST = 4
RTN_MULTICAST = 5
RTN_BLACKHOLE = 6
RTN_UNREACHABLE = 7
RTN_PROHIBIT = 8
RTN_THROW = 9

RT_TABLE_MAIN = 254
RT_TABLE_LOCAL = 255

RT_SCOPE_UNIVERSE = 0
RT_SCOPE_SITE = 200
RT_SCOPE_LINK = 253
RT_SCOPE_HOST = 254
RT_SCOPE_NOWHERE = 255

RTM_F_CLONED = 0x200

IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_LABEL = 3
IFA_FLAGS = 8

IFA_F_SECONDARY = 0x01
IFA_F_TEMPORARY = IFA_F_SECONDARY  # The kernel's second name of the bit, for IPv6.
IFA_F_NODAD = 0x02
IFA_F_OPTIMISTIC = 0x04
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
IFA_F_PERMANENT = 0x80
IFA_F_NOPREFIXROUTE = 0x200

# Multicast groups as bits of sockaddr_nl.nl_groups.
RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV4_RULE = 0x80
RTMGRP_IPV6_IFADDR = 0x100
RTMGRP_IPV6_ROUTE = 0x400

# The same and later ones as numbers for NETLINK_ADD_MEMBERSHIP.
RTNLGRP_LINK = 1
RTNLGRP_NEIGH = 3
RTNLGRP_IPV4_IFADDR = 5
RTNLGRP_IPV4_ROUTE = 7
RTNLGRP_IPV4_RULE = 8
RTNLGRP_IPV6_IFADDR = 9
RTNLGRP_IPV6_ROUTE = 11
RTNLGRP_IPV6_RULE = 19

_ROUTE = struct.Struct("=BBBBBBBBI")
"""``struct rtmsg``: family, dst_len, src_len, tos, table, protocol, scope, type, flags."""
_ADDRESS = struct.Struct("=BBBBI")
"""``struct ifaddrmsg``: family, prefix length, flags, scope, interface index."""
_WIDTH = {nlmsg.AF_INET: 4, nlmsg.AF_INET6: 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route: the answer to a look-up, or an event."""

    family: int
    """AF_INET or AF_INET6."""
    type: int
    """RTN_*: RTN_LOCAL is an address of this host."""
    table: int
    """RT_TABLE_*, or any other table's number."""
    scope: int
    """RT_SCOPE_*."""
    dst: bytes | None
    """Packed destination; None: the default route."""
    dst_length: int
    """Prefix length of ``dst`` in bits."""
    oif: int | None
    """Egress interface index; None for multipath and blackhole routes."""
    gateway: bytes | None
    """Packed next hop, IPv6 also for an IPv4 route (RFC 5549); None: directly connected."""
    prefsrc: bytes | None
    """Packed source address the kernel would choose."""
    flags: int
    """RTM_F_* and RTNH_F_* bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceAddress:
    """One address of an interface."""

    family: int
    """AF_INET or AF_INET6."""
    ifindex: int
    """Interface index."""
    address: bytes
    """The interface's own packed address (IFA_LOCAL; on a point-to-point link not the peer's)."""
    prefix_length: int
    """Bits."""
    scope: int
    """RT_SCOPE_*."""
    flags: int
    """IFA_F_* bits, 32 wide."""

    @property
    def is_secondary(self) -> bool:
        """Whether another address of the same subnet goes first (IPv6: a temporary address)."""
        return bool(self.flags & IFA_F_SECONDARY)


def get_route(
    dst: bytes,
    seq: int,
    oif: int | None = None,
    src: bytes | None = None,
    *,
    mark: int | None = None,
) -> bytes:
    """Ask which route a packet to ``dst`` takes; answered by RTM_NEWROUTE or ENETUNREACH."""
    family = _family(dst)
    bits = len(dst) * 8
    body = nlmsg.attribute(RTA_DST, dst)
    if src is not None:
        if len(src) != len(dst):
            raise CodecError(
                f"route look-up from a {len(src)}-byte to a {len(dst)}-byte address; use one family"
            )
        body += nlmsg.attribute(RTA_SRC, src)
    if oif is not None:
        body += nlmsg.attribute(RTA_OIF, _u32(oif, "interface index"))
    if mark is not None:
        body += nlmsg.attribute(RTA_MARK, _u32(mark, "packet mark"))
    head = _ROUTE.pack(family, bits, bits if src is not None else 0, 0, 0, 0, 0, 0, 0)
    return nlmsg.message(RTM_GETROUTE, nlmsg.NLM_F_REQUEST, seq, head + body)


def dump_addresses(family: int, seq: int) -> bytes:
    """List interface addresses of AF_INET, AF_INET6 or both (AF_UNSPEC), ended by NLMSG_DONE."""
    if family not in (nlmsg.AF_UNSPEC, *_WIDTH):
        raise CodecError(f"address family {family} is neither AF_UNSPEC, AF_INET nor AF_INET6")
    flags = nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP
    return nlmsg.message(RTM_GETADDR, flags, seq, _ADDRESS.pack(family, 0, 0, 0, 0))


def parse_route(payload: bytes) -> Route:
    """Decode RTM_NEWROUTE or RTM_DELROUTE: the bytes after ``nlmsghdr``."""
    if len(payload) < _ROUTE.size:
        raise CodecError(
            f"route of {len(payload)} bytes is shorter than its 12-byte header; truncated"
        )
    family, dst_length, _, _, table, _, scope, type_, flags = _ROUTE.unpack_from(payload)
    found = nlmsg.attributes(payload[_ROUTE.size :])
    width = _width(family, "route")
    wide_table = found.get(RTA_TABLE)
    gateway = found.get(RTA_GATEWAY)
    if gateway is not None:
        _check_address(gateway, width, "RTA_GATEWAY")
    elif (via := found.get(RTA_VIA)) is not None:
        gateway = _parse_via(via)
    oif = found.get(RTA_OIF)
    return Route(
        family=family,
        type=type_,
        table=table if wide_table is None else _host(wide_table, "RTA_TABLE"),
        scope=scope,
        dst=_address(found, RTA_DST, width, "RTA_DST"),
        dst_length=dst_length,
        oif=None if oif is None else _host(oif, "RTA_OIF"),
        gateway=gateway,
        prefsrc=_address(found, RTA_PREFSRC, width, "RTA_PREFSRC"),
        flags=flags,
    )


def parse_address(payload: bytes) -> InterfaceAddress:
    """Decode RTM_NEWADDR or RTM_DELADDR: the bytes after ``nlmsghdr``."""
    if len(payload) < _ADDRESS.size:
        raise CodecError(
            f"interface address of {len(payload)} bytes is shorter than its 8-byte header; "
            "truncated"
        )
    family, prefix_length, flags, scope, ifindex = _ADDRESS.unpack_from(payload)
    found = nlmsg.attributes(payload[_ADDRESS.size :])
    width = _width(family, "interface address")
    address = _address(found, IFA_LOCAL, width, "IFA_LOCAL")
    if address is None:  # IPv6 without a peer has only IFA_ADDRESS.
        address = _address(found, IFA_ADDRESS, width, "IFA_ADDRESS")
    if address is None:
        raise CodecError(
            f"interface address of interface {ifindex} has neither IFA_LOCAL nor IFA_ADDRESS; "
            "malformed"
        )
    wide_flags = found.get(IFA_FLAGS)
    return InterfaceAddress(
        family=family,
        ifindex=ifindex,
        address=address,
        prefix_length=prefix_length,
        scope=scope,
        flags=flags if wide_flags is None else _host(wide_flags, "IFA_FLAGS"),
    )


def _family(address: bytes) -> int:
    for family, width in _WIDTH.items():
        if len(address) == width:
            return family
    raise CodecError(f"address of {len(address)} bytes; use 4 (IPv4) or 16 (IPv6)")


def _width(family: int, what: str) -> int:
    width = _WIDTH.get(family)
    if width is None:
        raise CodecError(
            f"{what} of address family {family}; only AF_INET and AF_INET6 are read here"
        )
    return width


def _u32(value: int, what: str) -> bytes:
    if not 0 <= value <= 0xFFFFFFFF:
        raise CodecError(f"{what} {value} does not fit 32 bits; use 0-4294967295")
    return struct.pack("=I", value)


def _host(raw: bytes, what: str) -> int:
    return nlmsg.integer(raw, 4, what, big_endian=False)


def _check_address(raw: bytes, width: int, what: str) -> None:
    if len(raw) != width:
        raise CodecError(
            f"{what} has {len(raw)} bytes instead of {width}; the message is malformed"
        )


def _address(found: dict[int, bytes], type_: int, width: int, what: str) -> bytes | None:
    raw = found.get(type_)
    if raw is not None:
        _check_address(raw, width, what)
    return raw


def _parse_via(raw: bytes) -> bytes:
    """``struct rtvia``: family (16 bits), address."""
    family = nlmsg.integer(raw[:2], 2, "the family of RTA_VIA", big_endian=False)
    _check_address(raw[2:], _width(family, "RTA_VIA"), "RTA_VIA's address")
    return raw[2:]
