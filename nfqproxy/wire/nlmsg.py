"""Netlink messages, attributes and acknowledgements (linux/netlink.h, RFC 3549).

A datagram holds one or more messages, each a 16-byte ``nlmsghdr`` and a payload, aligned to 4
bytes. Header fields are in host byte order. Attributes are TLVs with a 4-byte header, aligned to 4
bytes; their length does not count the padding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from nfqproxy.errors import CodecError

Buffer = bytes | bytearray | memoryview

# Netlink families: the third argument of socket(AF_NETLINK, SOCK_RAW, ...).
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

# Address families as the kernel writes them into nfgenmsg, rtmsg and ifaddrmsg (linux/socket.h).
AF_UNSPEC = 0
AF_INET = 2
AF_INET6 = 10

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4
NLMSG_MIN_TYPE = 16

NLM_F_REQUEST = 0x01
NLM_F_MULTI = 0x02
NLM_F_ACK = 0x04
NLM_F_ECHO = 0x08
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP_FILTERED = 0x20
# GET requests
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_ATOMIC = 0x400
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
# NEW requests
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
# acknowledgements
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSGERR_ATTR_MSG = 1
NLMSGERR_ATTR_OFFS = 2
NLMSGERR_ATTR_COOKIE = 3
NLMSGERR_ATTR_POLICY = 4
NLMSGERR_ATTR_MISS_TYPE = 5
NLMSGERR_ATTR_MISS_NEST = 6

# Socket options at level SOL_NETLINK.
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
NETLINK_BROADCAST_ERROR = 4
NETLINK_NO_ENOBUFS = 5
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

NLA_F_NESTED = 1 << 15
NLA_F_NET_BYTEORDER = 1 << 14
NLA_TYPE_MASK = 0xFFFF & ~(NLA_F_NESTED | NLA_F_NET_BYTEORDER)

HEADER = struct.Struct("=IHHII")
"""``struct nlmsghdr``: length with header, type, flags, sequence number, port id."""
HEADER_LENGTH = HEADER.size
ATTRIBUTE_HEADER = struct.Struct("=HH")
"""``struct nlattr``: length with header but without padding, type."""
_ATTRIBUTE_MAX = 0xFFFF - ATTRIBUTE_HEADER.size
_INT = struct.Struct("=i")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message as received."""

    type: int
    """``nlmsg_type``: below 16 control (NLMSG_*), else the family's own."""
    flags: int
    """NLM_F_* bits."""
    seq: int
    """Sequence number of the request this answers; 0 in events."""
    pid: int
    """Port id: 0 the kernel, or in events the socket whose request made the change."""
    payload: bytes
    """What follows the header, without the padding behind it."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The kernel's answer to a request: success, or why not."""

    errno: int
    """0 success, else a positive errno."""
    seq: int
    """Sequence number of the request."""
    request_type: int
    """``nlmsg_type`` of the request; 0 in the NLMSG_DONE that ends a dump."""
    message: str
    """Extended acknowledgement text (needs NETLINK_EXT_ACK on the socket), or empty."""
    offset: int | None = None
    """Offset in the request of the attribute the kernel objects to, if it says so."""


def message(type_: int, flags: int, seq: int, payload: bytes, pid: int = 0) -> bytes:
    """One message, padded to 4 bytes; ``seq`` wraps at 32 bits."""
    length = HEADER_LENGTH + len(payload)
    try:
        header = HEADER.pack(length, type_, flags, seq & 0xFFFFFFFF, pid)
    except struct.error as error:
        raise CodecError(
            f"netlink message type {type_}, flags {flags:#x}, {length} bytes cannot be encoded: a "
            "field exceeds its width; correct the caller's value"
        ) from error
    return header + payload + _PADDING[length & 3]


def attribute(type_: int, payload: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    length = len(payload)
    if length > _ATTRIBUTE_MAX:
        raise CodecError(
            f"netlink attribute {type_} of {length} bytes exceeds {_ATTRIBUTE_MAX}; shorten its "
            "payload"
        )
    if not 0 <= type_ <= 0xFFFF:
        raise CodecError(f"netlink attribute type {type_} is outside 0-65535; correct the caller")
    return ATTRIBUTE_HEADER.pack(length + 4, type_) + payload + _PADDING[length & 3]


def nested(type_: int, *children: bytes) -> bytes:
    """An attribute made of encoded attributes, with NLA_F_NESTED set (ctnetlink insists on it)."""
    return attribute(type_ | NLA_F_NESTED, b"".join(children))


def messages(buffer: Buffer) -> Iterator[Message]:
    """The messages of one datagram, in order.

    A message that does not fit raises CodecError when it is reached: those before it are yielded
    first.
    """
    size = len(buffer)
    offset = 0
    while offset < size:
        left = size - offset
        if left < HEADER_LENGTH:
            raise CodecError(
                f"netlink datagram of {size} bytes ends with {left} stray bytes at offset "
                f"{offset}, a header needs {HEADER_LENGTH}; enlarge the receive buffer"
            )
        length, type_, flags, seq, pid = HEADER.unpack_from(buffer, offset)
        if not HEADER_LENGTH <= length <= left:
            raise CodecError(
                f"netlink message at offset {offset} claims {length} bytes, {left} are there; "
                "enlarge the receive buffer"
            )
        payload = bytes(buffer[offset + HEADER_LENGTH : offset + length])
        yield Message(type_, flags, seq, pid, payload)
        offset += (length + 3) & ~3


def attribute_list(buffer: Buffer) -> Iterator[tuple[int, bytes]]:
    """Attributes in wire order as (type without flag bits, payload), repeated ones included."""
    size = len(buffer)
    offset = 0
    while offset < size:
        left = size - offset
        if left < 4:
            raise CodecError(
                f"netlink attributes of {size} bytes end with {left} stray bytes at offset "
                f"{offset}; the message is truncated"
            )
        length, type_ = ATTRIBUTE_HEADER.unpack_from(buffer, offset)
        if not 4 <= length <= left:
            raise CodecError(
                f"netlink attribute {type_ & NLA_TYPE_MASK} at offset {offset} claims {length} "
                f"bytes, {left} are there; the message is truncated or not what it was taken for"
            )
        yield type_ & NLA_TYPE_MASK, bytes(buffer[offset + 4 : offset + length])
        offset += (length + 3) & ~3


def attributes(buffer: Buffer) -> dict[int, bytes]:
    """Attributes by type without flag bits; of repeated ones the last wins."""
    return dict(attribute_list(buffer))


def integer(payload: bytes, width: int, what: str, *, big_endian: bool = True) -> int:
    """An unsigned attribute value of exactly ``width`` bytes; ``what`` names it in the error."""
    if len(payload) != width:
        raise CodecError(
            f"{what} has {len(payload)} bytes instead of {width}; the message is malformed"
        )
    return int.from_bytes(payload, "big") if big_endian else _native(payload)


def _native(payload: bytes) -> int:
    # The "=" formats are host order with fixed widths; int.from_bytes would need sys.byteorder.
    value: int = struct.unpack({1: "=B", 2: "=H", 4: "=I", 8: "=Q"}[len(payload)], payload)[0]
    return value


def ack(message: Message) -> Ack:
    """Decode NLMSG_ERROR (acknowledgement or failure) or the NLMSG_DONE that ends a dump.

    The failed request is repeated behind its header unless the socket set NETLINK_CAP_ACK
    (NLM_F_CAPPED); extended attributes follow it (NLM_F_ACK_TLVS).
    """
    payload = message.payload
    if message.type == NLMSG_DONE:
        if not payload:  # Allowed: libnl and old kernels end a dump without a status.
            return Ack(0, message.seq, 0, "")
        error = _error_number(payload)
        text, offset = _extended(payload[4:]) if message.flags & NLM_F_ACK_TLVS else ("", None)
        return Ack(error, message.seq, 0, text, offset)
    if message.type != NLMSG_ERROR:
        raise CodecError(
            f"netlink message type {message.type} is no acknowledgement (2 or 3); match the "
            "answer's type first"
        )
    error = _error_number(payload)
    if len(payload) < 4 + HEADER_LENGTH:
        raise CodecError(
            f"netlink acknowledgement of {len(payload)} bytes lacks the header of its request; the "
            "message is truncated"
        )
    length, type_, _, seq, _ = HEADER.unpack_from(payload, 4)
    text, offset = "", None
    if message.flags & NLM_F_ACK_TLVS:
        if message.flags & NLM_F_CAPPED:
            start = 4 + HEADER_LENGTH
        else:
            start = 4 + max((length + 3) & ~3, HEADER_LENGTH)
        if start > len(payload):
            raise CodecError(
                f"netlink acknowledgement says its request had {length} bytes but repeats only "
                f"{len(payload) - 4}; the message is truncated"
            )
        text, offset = _extended(payload[start:])
    return Ack(error, seq, type_, text, offset)


def _error_number(payload: bytes) -> int:
    if len(payload) < 4:
        raise CodecError(
            f"netlink status of {len(payload)} bytes is shorter than 4; the message is truncated"
        )
    value: int = _INT.unpack_from(payload)[0]
    if value > 0:
        # NLMSG_DONE of a dump may carry a non-negative byte count: not a failure.
        return 0
    return -value


def _extended(buffer: bytes) -> tuple[str, int | None]:
    found = attributes(buffer)
    text = found.get(NLMSGERR_ATTR_MSG, b"").split(b"\0", 1)[0].decode("utf-8", "replace")
    raw = found.get(NLMSGERR_ATTR_OFFS)
    offset = None if raw is None else integer(raw, 4, "NLMSGERR_ATTR_OFFS", big_endian=False)
    return text, offset
