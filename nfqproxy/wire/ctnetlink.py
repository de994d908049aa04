"""Conntrack entries over netlink (linux/netfilter/nfnetlink_conntrack.h).

Every number inside an attribute is big-endian. Values and states live in ``conntrack``; their
names are offered here too.

Order of attributes in :func:`new_entry`, stable because the worker's message templates are cut
from it::

    nlmsghdr, nfgenmsg
    CTA_TUPLE_ORIG  { CTA_TUPLE_IP { SRC, DST }, CTA_TUPLE_PROTO { NUM, SRC_PORT, DST_PORT } }
    CTA_TUPLE_REPLY   the same shape, the plain inverse
    CTA_TIMEOUT
    CTA_NAT_DST     { CTA_NAT_V4_MINIP or _V6_MINIP, CTA_NAT_PROTO { PORT_MIN } }   if dnat
    CTA_NAT_SRC       the same shape                                                if snat
    CTA_MARK                                                                        if mark
    CTA_LABELS                                                                      if labels
    CTA_ZONE                                                                        if zone

The request holds no CTA_PROTOINFO, and no protocol needs one (seen on Linux 6.18,
tests/kernel/test_wire_live.py): the first packet drives TCP's and SCTP's state machine from NONE.
An SCTP entry passes CLOSED, COOKIE_WAIT, COOKIE_ECHOED, ESTABLISHED, as one the kernel made itself.
"""

import struct

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfnetlink, nlmsg
from nfqproxy.wire.conntrack import *  # noqa: F403  offered here under the same names
from nfqproxy.wire.conntrack import IPPROTO_ICMP, IPPROTO_ICMPV6, Entry, Nat, Tuple

IPCTNL_MSG_CT_NEW = 0
IPCTNL_MSG_CT_GET = 1
IPCTNL_MSG_CT_DELETE = 2
IPCTNL_MSG_CT_GET_CTRZERO = 3
IPCTNL_MSG_CT_GET_STATS_CPU = 4
IPCTNL_MSG_CT_GET_STATS = 5
IPCTNL_MSG_CT_GET_DYING = 6
IPCTNL_MSG_CT_GET_UNCONFIRMED = 7

MSG_NEW = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW)
"""Requests for, and answers and NEW and UPDATE events about, an entry."""
MSG_GET = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET)
MSG_DELETE = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE)
"""Deletion requests, and DESTROY events."""

CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_PROTOINFO = 4
CTA_HELP = 5
CTA_NAT_SRC = 6
CTA_TIMEOUT = 7
CTA_MARK = 8
CTA_COUNTERS_ORIG = 9
CTA_COUNTERS_REPLY = 10
CTA_USE = 11
CTA_ID = 12
CTA_NAT_DST = 13
CTA_TUPLE_MASTER = 14
CTA_SEQ_ADJ_ORIG = 15
CTA_SEQ_ADJ_REPLY = 16
CTA_SECMARK = 17
CTA_ZONE = 18
CTA_SECCTX = 19
CTA_TIMESTAMP = 20
CTA_MARK_MASK = 21
CTA_LABELS = 22
CTA_LABELS_MASK = 23
CTA_SYNPROXY = 24
CTA_FILTER = 25
CTA_STATUS_MASK = 26

CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_TUPLE_ZONE = 3

CTA_IP_V4_SRC = 1
CTA_IP_V4_DST = 2
CTA_IP_V6_SRC = 3
CTA_IP_V6_DST = 4

CTA_PROTO_NUM = 1
CTA_PROTO_SRC_PORT = 2
CTA_PROTO_DST_PORT = 3
CTA_PROTO_ICMP_ID = 4
CTA_PROTO_ICMP_TYPE = 5
CTA_PROTO_ICMP_CODE = 6
CTA_PROTO_ICMPV6_ID = 7
CTA_PROTO_ICMPV6_TYPE = 8
CTA_PROTO_ICMPV6_CODE = 9

CTA_PROTOINFO_TCP = 1
CTA_PROTOINFO_DCCP = 2
CTA_PROTOINFO_SCTP = 3
CTA_PROTOINFO_TCP_STATE = 1
CTA_PROTOINFO_SCTP_STATE = 1

CTA_FILTER_ORIG_FLAGS = 1
CTA_FILTER_REPLY_FLAGS = 2
# Bits of the two: which parts of the tuple beside the filter must match (net/netfilter/
# nf_conntrack_netlink.c; they are in no header, libnetfilter_conntrack repeats them).
CTA_FILTER_F_CTA_PROTO_NUM = 1 << 3

CTA_COUNTERS_PACKETS = 1
CTA_COUNTERS_BYTES = 2

CTA_NAT_V4_MINIP = 1
CTA_NAT_V4_MAXIP = 2
CTA_NAT_PROTO = 3
CTA_NAT_V6_MINIP = 4
CTA_NAT_V6_MAXIP = 5

CTA_PROTONAT_PORT_MIN = 1
CTA_PROTONAT_PORT_MAX = 2

_LABELS_MAX = 16
_FILTER_PROTOCOL = struct.pack("=I", CTA_FILTER_F_CTA_PROTO_NUM)


def new_entry(
    original: Tuple,
    *,
    dnat: Nat | None,
    snat: Nat | None,
    timeout_s: int,
    seq: int,
    mark: int | None = None,
    labels: bytes | None = None,
    zone: int | None = None,
    status: int | None = None,
    exclusive: bool = True,
    ack: bool = False,
) -> bytes:
    """Create an entry with its NAT. Without ``ack`` only a failure is answered.

    The reply tuple is the plain inverse, the kernel rewrites it from the NAT attributes; an already
    translated one would be accepted and translate nothing. The timeout is mandatory and lives until
    a packet refreshes it. ``exclusive``: EEXIST if the tuple is taken, instead of changing that
    entry (never its NAT; its IPS_* bits to ``status``, which must repeat those it has). With one of
    ``dnat`` and ``snat`` the other direction gets a null binding, so no SNAT or MASQUERADE rule will
    see the flow.
    Labels are dropped without an error while no rule of the namespace uses ``-m connlabel``.
    """
    flags = nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_CREATE
    if exclusive:
        flags |= nlmsg.NLM_F_EXCL
    if ack:
        flags |= nlmsg.NLM_F_ACK
    body = [
        _tuple(CTA_TUPLE_ORIG, original),
        _tuple(CTA_TUPLE_REPLY, original.inverse()),
        nlmsg.attribute(CTA_TIMEOUT, _number(timeout_s, 4, "entry timeout")),
    ]
    if dnat is not None:
        body.append(_nat(CTA_NAT_DST, dnat, original))
    if snat is not None:
        body.append(_nat(CTA_NAT_SRC, snat, original))
    if mark is not None:
        body.append(nlmsg.attribute(CTA_MARK, _number(mark, 4, "entry mark")))
    if status is not None:
        body.append(nlmsg.attribute(CTA_STATUS, _number(status, 4, "entry status")))
    if labels is not None:
        if len(labels) > _LABELS_MAX or len(labels) % 4:
            raise CodecError(
                f"conntrack labels of {len(labels)} bytes: use a multiple of 4 up to {_LABELS_MAX}"
            )
        body.append(nlmsg.attribute(CTA_LABELS, labels))
    if zone is not None:
        body.append(_zone(zone))
    return _message(MSG_NEW, flags, seq, original, body)


def get_entry(original: Tuple, seq: int, *, zone: int | None = None) -> bytes:
    """Ask for the entry of a tuple: answered by one MSG_NEW message, or NLMSG_ERROR ENOENT.

    The answer carries NLM_F_MULTI although no NLMSG_DONE follows (Linux 6.18).
    """
    body = [_tuple(CTA_TUPLE_ORIG, original)]
    if zone is not None:
        body.append(_zone(zone))
    return _message(MSG_GET, nlmsg.NLM_F_REQUEST, seq, original, body)


def delete_entry(
    original: Tuple, seq: int, id: int | None = None, ack: bool = True, *, zone: int | None = None
) -> bytes:
    """Delete the entry of a tuple, with ``id`` only if it is still that very one (else ENOENT)."""
    body = [_tuple(CTA_TUPLE_ORIG, original)]
    if id is not None:
        body.append(nlmsg.attribute(CTA_ID, _number(id, 4, "entry id")))
    if zone is not None:
        body.append(_zone(zone))
    flags = nlmsg.NLM_F_REQUEST | (nlmsg.NLM_F_ACK if ack else 0)
    return _message(MSG_DELETE, flags, seq, original, body)


def dump(
    family: int,
    seq: int,
    *,
    mark: int | None = None,
    mark_mask: int = 0xFFFFFFFF,
    status: int | None = None,
    protocol: int | None = None,
) -> bytes:
    """List the entries of AF_INET, AF_INET6, or both (AF_UNSPEC), ended by NLMSG_DONE.

    ``mark`` under ``mark_mask``, the IPS_* bits of ``status`` (all of them set) and the IP number
    of ``protocol`` filter in the kernel. Kernels before 5.8 know no ``protocol`` and list them all.
    """
    body = b""
    if protocol is not None:
        number = nlmsg.attribute(CTA_PROTO_NUM, _number(protocol, 1, "IP protocol"))
        body += nlmsg.nested(CTA_TUPLE_ORIG, nlmsg.nested(CTA_TUPLE_PROTO, number))
        # These flags are in host order, unlike everything else in ctnetlink.
        which = nlmsg.attribute(CTA_FILTER_ORIG_FLAGS, _FILTER_PROTOCOL)
        body += nlmsg.nested(CTA_FILTER, which)
    if status is not None:
        bits = _number(status, 4, "entry status")
        body += nlmsg.attribute(CTA_STATUS, bits) + nlmsg.attribute(CTA_STATUS_MASK, bits)
    if mark is not None:
        body += nlmsg.attribute(CTA_MARK, _number(mark, 4, "entry mark"))
        body += nlmsg.attribute(CTA_MARK_MASK, _number(mark_mask, 4, "entry mark mask"))
    flags = nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP
    return nfnetlink.message(MSG_GET, flags, seq, body, family=family)


def _message(type_: int, flags: int, seq: int, original: Tuple, body: list[bytes]) -> bytes:
    family = nlmsg.AF_INET if len(original.src) == 4 else nlmsg.AF_INET6
    return nfnetlink.message(type_, flags, seq, b"".join(body), family=family)


def _number(value: int, width: int, what: str) -> bytes:
    try:
        return value.to_bytes(width, "big")
    except OverflowError as error:
        raise CodecError(
            f"{what} {value} does not fit {width * 8} bits; use a smaller one"
        ) from error


def _zone(zone: int) -> bytes:
    return nlmsg.attribute(CTA_ZONE, _number(zone, 2, "conntrack zone"))


def _tuple(type_: int, flow: Tuple) -> bytes:
    if len(flow.src) != len(flow.dst) or len(flow.src) not in (4, 16):
        raise CodecError(
            f"tuple addresses have {len(flow.src)} and {len(flow.dst)} bytes; both must have 4 or "
            "both 16"
        )
    src, dst = (
        (CTA_IP_V4_SRC, CTA_IP_V4_DST) if len(flow.src) == 4 else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    )
    protocol = [nlmsg.attribute(CTA_PROTO_NUM, _number(flow.protocol, 1, "IP protocol"))]
    if flow.protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        base = CTA_PROTO_ICMP_ID if flow.protocol == IPPROTO_ICMP else CTA_PROTO_ICMPV6_ID
        protocol.append(nlmsg.attribute(base, _number(flow.icmp_id, 2, "ICMP id")))
        protocol.append(nlmsg.attribute(base + 1, _number(flow.icmp_type, 1, "ICMP type")))
        protocol.append(nlmsg.attribute(base + 2, _number(flow.icmp_code, 1, "ICMP code")))
    else:
        protocol.append(
            nlmsg.attribute(CTA_PROTO_SRC_PORT, _number(flow.src_port, 2, "source port"))
        )
        protocol.append(
            nlmsg.attribute(CTA_PROTO_DST_PORT, _number(flow.dst_port, 2, "destination port"))
        )
    return nlmsg.nested(
        type_,
        nlmsg.nested(CTA_TUPLE_IP, nlmsg.attribute(src, flow.src), nlmsg.attribute(dst, flow.dst)),
        nlmsg.nested(CTA_TUPLE_PROTO, *protocol),
    )


def _nat(type_: int, nat: Nat, original: Tuple) -> bytes:
    if len(nat.address) != len(original.src):
        raise CodecError(
            f"NAT address of {len(nat.address)} bytes for a flow of {len(original.src)}-byte "
            "addresses; conntrack cannot translate between families"
        )
    minimum = CTA_NAT_V4_MINIP if len(nat.address) == 4 else CTA_NAT_V6_MINIP
    children = [nlmsg.attribute(minimum, nat.address)]
    if nat.port is not None:
        port = nlmsg.attribute(CTA_PROTONAT_PORT_MIN, _number(nat.port, 2, "NAT port"))
        children.append(nlmsg.nested(CTA_NAT_PROTO, port))
    return nlmsg.nested(type_, *children)


def parse_entry(payload: bytes) -> Entry:
    """Decode an entry from the bytes after ``nlmsghdr``: an answer, a dump's item or an event."""
    _, body = nfnetlink.split(payload, "conntrack entry")
    found = nlmsg.attributes(body)
    original, original_zone = _parse_tuple(found, CTA_TUPLE_ORIG, "CTA_TUPLE_ORIG")
    reply, _ = _parse_tuple(found, CTA_TUPLE_REPLY, "CTA_TUPLE_REPLY")
    tcp_state, sctp_state = _parse_protoinfo(found.get(CTA_PROTOINFO))
    original_packets, original_bytes = _parse_counters(found.get(CTA_COUNTERS_ORIG))
    reply_packets, reply_bytes = _parse_counters(found.get(CTA_COUNTERS_REPLY))
    zone = _optional(found, CTA_ZONE, 2, "CTA_ZONE")
    return Entry(
        original=original,
        reply=reply,
        status=_optional(found, CTA_STATUS, 4, "CTA_STATUS") or 0,
        timeout_s=_optional(found, CTA_TIMEOUT, 4, "CTA_TIMEOUT"),
        mark=_optional(found, CTA_MARK, 4, "CTA_MARK") or 0,
        tcp_state=tcp_state,
        sctp_state=sctp_state,
        id=_optional(found, CTA_ID, 4, "CTA_ID") or 0,
        zone=original_zone if zone is None else zone,
        labels=found.get(CTA_LABELS, b""),
        use=_optional(found, CTA_USE, 4, "CTA_USE") or 0,
        original_packets=original_packets,
        original_bytes=original_bytes,
        reply_packets=reply_packets,
        reply_bytes=reply_bytes,
    )


def _optional(found: dict[int, bytes], type_: int, width: int, what: str) -> int | None:
    raw = found.get(type_)
    return None if raw is None else nlmsg.integer(raw, width, what)


def _required(found: dict[int, bytes], type_: int, width: int, what: str) -> int:
    raw = found.get(type_)
    if raw is None:
        raise CodecError(f"conntrack tuple lacks {what}; the message is malformed")
    return nlmsg.integer(raw, width, what)


def _parse_tuple(found: dict[int, bytes], type_: int, what: str) -> tuple[Tuple, int]:
    """The tuple, and its direction's own zone (0 without one)."""
    parts = nlmsg.attributes(found.get(type_, b""))
    addresses = nlmsg.attributes(parts.get(CTA_TUPLE_IP, b""))
    protocol = nlmsg.attributes(parts.get(CTA_TUPLE_PROTO, b""))
    if CTA_IP_V4_SRC in addresses:
        width, src, dst = 4, addresses[CTA_IP_V4_SRC], addresses.get(CTA_IP_V4_DST, b"")
    else:
        width = 16
        src, dst = addresses.get(CTA_IP_V6_SRC, b""), addresses.get(CTA_IP_V6_DST, b"")
    if len(src) != width or len(dst) != width:
        raise CodecError(
            f"{what} has addresses of {len(src)} and {len(dst)} bytes, {width} are due; the "
            "message is malformed"
        )
    number = _required(protocol, CTA_PROTO_NUM, 1, "CTA_PROTO_NUM")
    zone = _optional(parts, CTA_TUPLE_ZONE, 2, "CTA_TUPLE_ZONE") or 0
    if number in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        base = CTA_PROTO_ICMP_ID if number == IPPROTO_ICMP else CTA_PROTO_ICMPV6_ID
        icmp_id = _required(protocol, base, 2, "its ICMP id")
        icmp_type = _required(protocol, base + 1, 1, "its ICMP type")
        icmp_code = _required(protocol, base + 2, 1, "its ICMP code")
        return Tuple(src, dst, number, 0, 0, icmp_id, icmp_type, icmp_code), zone
    # Protocols the kernel follows by address alone (GRE without a helper, ESP) have no ports.
    src_port = _optional(protocol, CTA_PROTO_SRC_PORT, 2, "CTA_PROTO_SRC_PORT") or 0
    dst_port = _optional(protocol, CTA_PROTO_DST_PORT, 2, "CTA_PROTO_DST_PORT") or 0
    return Tuple(src, dst, number, src_port, dst_port), zone


def _parse_protoinfo(raw: bytes | None) -> tuple[int | None, int | None]:
    if raw is None:
        return None, None
    found = nlmsg.attributes(raw)
    tcp = nlmsg.attributes(found.get(CTA_PROTOINFO_TCP, b""))
    sctp = nlmsg.attributes(found.get(CTA_PROTOINFO_SCTP, b""))
    return (
        _optional(tcp, CTA_PROTOINFO_TCP_STATE, 1, "CTA_PROTOINFO_TCP_STATE"),
        _optional(sctp, CTA_PROTOINFO_SCTP_STATE, 1, "CTA_PROTOINFO_SCTP_STATE"),
    )


def _parse_counters(raw: bytes | None) -> tuple[int | None, int | None]:
    if raw is None:
        return None, None
    found = nlmsg.attributes(raw)
    return (
        _optional(found, CTA_COUNTERS_PACKETS, 8, "CTA_COUNTERS_PACKETS"),
        _optional(found, CTA_COUNTERS_BYTES, 8, "CTA_COUNTERS_BYTES"),
    )
