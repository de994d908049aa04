"""The header shared by all netfilter netlink messages (linux/netfilter/nfnetlink.h).

``nlmsg_type`` is subsystem * 256 + message. Four bytes of ``struct nfgenmsg`` follow the netlink
header: address family, version 0, and a big-endian resource id (the queue number for
nfnetlink_queue).
"""

import struct
from dataclasses import dataclass

from nfqproxy.errors import CodecError
from nfqproxy.wire import nlmsg

NFNETLINK_V0 = 0

NFNL_SUBSYS_NONE = 0
NFNL_SUBSYS_CTNETLINK = 1
NFNL_SUBSYS_CTNETLINK_EXP = 2
NFNL_SUBSYS_QUEUE = 3
NFNL_SUBSYS_ULOG = 4
NFNL_SUBSYS_OSF = 5
NFNL_SUBSYS_IPSET = 6
NFNL_SUBSYS_ACCT = 7
NFNL_SUBSYS_CTNETLINK_TIMEOUT = 8
NFNL_SUBSYS_CTHELPER = 9
NFNL_SUBSYS_NFTABLES = 10
NFNL_SUBSYS_NFT_COMPAT = 11
NFNL_SUBSYS_HOOK = 12

# Multicast groups for NETLINK_ADD_MEMBERSHIP.
NFNLGRP_NONE = 0
NFNLGRP_CONNTRACK_NEW = 1
NFNLGRP_CONNTRACK_UPDATE = 2
NFNLGRP_CONNTRACK_DESTROY = 3
NFNLGRP_CONNTRACK_EXP_NEW = 4
NFNLGRP_CONNTRACK_EXP_UPDATE = 5
NFNLGRP_CONNTRACK_EXP_DESTROY = 6
NFNLGRP_NFTABLES = 7
NFNLGRP_ACCT_QUOTA = 8
NFNLGRP_NFTRACE = 9

# The same groups as bits of sockaddr_nl.nl_groups (linux/netfilter/nfnetlink_compat.h).
NF_NETLINK_CONNTRACK_NEW = 0x01
NF_NETLINK_CONNTRACK_UPDATE = 0x02
NF_NETLINK_CONNTRACK_DESTROY = 0x04
NF_NETLINK_CONNTRACK_EXP_NEW = 0x08
NF_NETLINK_CONNTRACK_EXP_UPDATE = 0x10
NF_NETLINK_CONNTRACK_EXP_DESTROY = 0x20

HEADER = struct.Struct("!BBH")
"""``struct nfgenmsg``: family, version, resource id (big-endian)."""
HEADER_LENGTH = HEADER.size


@dataclass(frozen=True, slots=True)
class Header:
    """``struct nfgenmsg``."""

    family: int
    """AF_INET, AF_INET6 or AF_UNSPEC."""
    version: int
    """NFNETLINK_V0."""
    resource: int
    """Queue number for nfnetlink_queue, 0 for ctnetlink."""


def message_type(subsystem: int, message: int) -> int:
    """``nlmsg_type`` of a subsystem's message."""
    return subsystem << 8 | message


def subsystem(type_: int) -> int:
    """Subsystem (NFNL_SUBSYS_*) of a ``nlmsg_type``."""
    return type_ >> 8


def message_number(type_: int) -> int:
    """The subsystem's own message number of a ``nlmsg_type``."""
    return type_ & 0xFF


def message(
    type_: int,
    flags: int,
    seq: int,
    body: bytes,
    *,
    family: int = nlmsg.AF_UNSPEC,
    resource: int = 0,
) -> bytes:
    """A whole netlink message: header, nfgenmsg, ``body`` of encoded attributes."""
    try:
        header = HEADER.pack(family, NFNETLINK_V0, resource)
    except struct.error as error:
        raise CodecError(
            f"nfnetlink header with family {family} and resource {resource} cannot be encoded: use "
            "0-255 and 0-65535"
        ) from error
    return nlmsg.message(type_, flags, seq, header + body)


def split(payload: bytes, what: str) -> tuple[Header, bytes]:
    """Header and attribute bytes of what follows ``nlmsghdr``; ``what`` names it in the error."""
    if len(payload) < HEADER_LENGTH:
        raise CodecError(
            f"{what} of {len(payload)} bytes lacks its 4-byte nfgenmsg header; the message is "
            "truncated"
        )
    return Header(*HEADER.unpack_from(payload)), payload[HEADER_LENGTH:]
