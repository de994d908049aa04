"""Packet queues: configuration, queued packets, verdicts (linux/netfilter/nfnetlink_queue.h).

Every number inside an attribute is big-endian. A datagram holds one packet. Its attributes, as
captured on Linux 6.18 (tests/unit/wire/captures), the same for IPv4 and IPv6, TCP and UDP; the
number is the offset of the attribute's value from the start of ``nlmsghdr``::

    raw PREROUTING, from a veth                    raw OUTPUT
     24  NFQA_PACKET_HDR (7 bytes, 1 of padding)    24  NFQA_PACKET_HDR
     36  NFQA_IFINDEX_INDEV                         36  NFQA_IFINDEX_OUTDEV
     44  NFQA_HWADDR (12 bytes)                     44  NFQA_PAYLOAD
     60  NFQA_PAYLOAD

NFQA_PAYLOAD is always the last. Before it, in this order, come what a packet or the host has:
INDEV, OUTDEV, NFQA_MARK and NFQA_PRIORITY (only if not 0), NFQA_HWADDR (Ethernet ingress),
NFQA_TIMESTAMP (ingress, while any socket of the host asks for receive timestamps), NFQA_UID and
NFQA_GID (locally made, with NFQA_CFG_F_UID_GID), NFQA_CAP_LEN (only if the copy range cut the
packet), NFQA_SKB_INFO (only if not 0: seen with NFQA_CFG_F_GSO alone).
A reader that assumes fixed offsets must therefore check the attribute headers it skips, and fall
back to :func:`parse_packet`.
"""

import struct
from dataclasses import dataclass

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfnetlink, nlmsg

NFQNL_MSG_PACKET = 0
NFQNL_MSG_VERDICT = 1
NFQNL_MSG_CONFIG = 2
NFQNL_MSG_VERDICT_BATCH = 3

MSG_PACKET = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_QUEUE, NFQNL_MSG_PACKET)
MSG_VERDICT = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_QUEUE, NFQNL_MSG_VERDICT)
MSG_CONFIG = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG)
MSG_VERDICT_BATCH = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_QUEUE, NFQNL_MSG_VERDICT_BATCH)

NFQA_PACKET_HDR = 1
NFQA_VERDICT_HDR = 2
NFQA_MARK = 3
NFQA_TIMESTAMP = 4
NFQA_IFINDEX_INDEV = 5
NFQA_IFINDEX_OUTDEV = 6
NFQA_IFINDEX_PHYSINDEV = 7
NFQA_IFINDEX_PHYSOUTDEV = 8
NFQA_HWADDR = 9
NFQA_PAYLOAD = 10
NFQA_CT = 11
NFQA_CT_INFO = 12
NFQA_CAP_LEN = 13
NFQA_SKB_INFO = 14
NFQA_EXP = 15
NFQA_UID = 16
NFQA_GID = 17
NFQA_SECCTX = 18
NFQA_VLAN = 19
NFQA_L2HDR = 20
NFQA_PRIORITY = 21

NFQNL_CFG_CMD_NONE = 0
NFQNL_CFG_CMD_BIND = 1
NFQNL_CFG_CMD_UNBIND = 2
NFQNL_CFG_CMD_PF_BIND = 3
NFQNL_CFG_CMD_PF_UNBIND = 4

NFQNL_COPY_NONE = 0
NFQNL_COPY_META = 1
NFQNL_COPY_PACKET = 2

NFQA_CFG_CMD = 1
NFQA_CFG_PARAMS = 2
NFQA_CFG_QUEUE_MAXLEN = 3
NFQA_CFG_MASK = 4
NFQA_CFG_FLAGS = 5

NFQA_CFG_F_FAIL_OPEN = 1 << 0
NFQA_CFG_F_CONNTRACK = 1 << 1
NFQA_CFG_F_GSO = 1 << 2
NFQA_CFG_F_UID_GID = 1 << 3
NFQA_CFG_F_SECCTX = 1 << 4

# Bits of NFQA_SKB_INFO.
NFQA_SKB_CSUMNOTREADY = 1 << 0
NFQA_SKB_GSO = 1 << 1
NFQA_SKB_CSUM_NOTVERIFIED = 1 << 2

# Hooks (linux/netfilter.h).
NF_INET_PRE_ROUTING = 0
NF_INET_LOCAL_IN = 1
NF_INET_FORWARD = 2
NF_INET_LOCAL_OUT = 3
NF_INET_POST_ROUTING = 4

# Verdicts (linux/netfilter.h).
NF_DROP = 0
NF_ACCEPT = 1
NF_STOLEN = 2
NF_QUEUE = 3
NF_REPEAT = 4
NF_STOP = 5

_PACKET_HEADER = struct.Struct("!IHB")
_COMMAND = struct.Struct("!BxH")
_PARAMS = struct.Struct("!IB")
_U32 = struct.Struct("!I")
_VERDICT = struct.Struct("!II")
_HW_ADDRESS_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPacket:
    """One packet as the kernel hands it over; it waits for exactly one verdict."""

    queue: int
    """Queue number (``res_id``)."""
    family: int
    """AF_INET or AF_INET6 (``nfgen_family``)."""
    packet_id: int
    """Unique in its queue since the queue was bound; grows by one per packet."""
    hw_protocol: int
    """EtherType in host order: 0x0800, 0x86dd."""
    hook: int
    """NF_INET_*."""
    indev: int
    """Ingress interface index; 0 in OUTPUT."""
    outdev: int
    """Egress interface index; 0 in PREROUTING."""
    mark: int
    """The packet's fwmark; 0 where the kernel left the attribute out."""
    priority: int
    """``skb->priority``; 0 where left out or the kernel does not tell."""
    hw_address: bytes
    """Source link-layer address; empty where there is none."""
    skb_info: int
    """NFQA_SKB_* bits."""
    uid: int | None
    """Owner of the sending socket (needs NFQA_CFG_F_UID_GID)."""
    gid: int | None
    """Group of the sending socket."""
    cap_len: int
    """Length of the whole packet; more than ``len(payload)`` when the copy range cut it."""
    payload: bytes
    """The packet from its IP header on, at most the copy range."""

    @property
    def is_truncated(self) -> bool:
        """Whether the copy range cut the payload."""
        return self.cap_len > len(self.payload)


def _config(queue: int, seq: int, body: bytes, ack: bool) -> bytes:
    flags = nlmsg.NLM_F_REQUEST | (nlmsg.NLM_F_ACK if ack else 0)
    return nfnetlink.message(MSG_CONFIG, flags, seq, body, resource=queue)


def bind(queue: int, seq: int, *, ack: bool = True) -> bytes:
    """Take the queue for this socket.

    EPERM: another socket holds it, or CAP_NET_ADMIN is lacking. EBUSY: this one holds it already.
    """
    command = _COMMAND.pack(NFQNL_CFG_CMD_BIND, nlmsg.AF_UNSPEC)
    return _config(queue, seq, nlmsg.attribute(NFQA_CFG_CMD, command), ack)


def bind_configured(
    queue: int, seq: int, copy_range: int, *, maxlen: int, flags: int, ack: bool = True
) -> bytes:
    """Take the queue and set all of its parameters in one message.

    The kernel creates the queue in NFQNL_COPY_NONE, in which it drops every packet, and applies the
    attributes of one message in a row: no gap between messages in which a packet would be lost.
    """
    body = nlmsg.attribute(NFQA_CFG_CMD, _COMMAND.pack(NFQNL_CFG_CMD_BIND, nlmsg.AF_UNSPEC))
    body += nlmsg.attribute(
        NFQA_CFG_PARAMS, _PARAMS.pack(_u32(copy_range, "copy range"), NFQNL_COPY_PACKET)
    )
    body += nlmsg.attribute(NFQA_CFG_QUEUE_MAXLEN, _U32.pack(_u32(maxlen, "queue length")))
    body += nlmsg.attribute(NFQA_CFG_FLAGS, _U32.pack(_u32(flags, "queue flags")))
    body += nlmsg.attribute(NFQA_CFG_MASK, _U32.pack(_u32(flags, "queue flag mask")))
    return _config(queue, seq, body, ack)


def unbind(queue: int, seq: int, *, ack: bool = True) -> bytes:
    """Give the queue up; packets still waiting in it are dropped by the kernel."""
    command = _COMMAND.pack(NFQNL_CFG_CMD_UNBIND, nlmsg.AF_UNSPEC)
    return _config(queue, seq, nlmsg.attribute(NFQA_CFG_CMD, command), ack)


def config_params(queue: int, seq: int, copy_range: int, *, ack: bool = True) -> bytes:
    """Copy the first ``copy_range`` bytes of each packet (NFQNL_COPY_PACKET); 0: all."""
    params = _PARAMS.pack(_u32(copy_range, "copy range"), NFQNL_COPY_PACKET)
    return _config(queue, seq, nlmsg.attribute(NFQA_CFG_PARAMS, params), ack)


def config_maxlen(queue: int, seq: int, maxlen: int, *, ack: bool = True) -> bytes:
    """Let at most ``maxlen`` packets wait for a verdict (the kernel's default is 1,024)."""
    payload = _U32.pack(_u32(maxlen, "queue length"))
    return _config(queue, seq, nlmsg.attribute(NFQA_CFG_QUEUE_MAXLEN, payload), ack)


def config_flags(queue: int, seq: int, flags: int, mask: int, *, ack: bool = True) -> bytes:
    """Set the NFQA_CFG_F_* bits of ``mask`` as in ``flags``. EOPNOTSUPP: unknown to this kernel."""
    body = nlmsg.attribute(NFQA_CFG_FLAGS, _U32.pack(_u32(flags, "queue flags")))
    body += nlmsg.attribute(NFQA_CFG_MASK, _U32.pack(_u32(mask, "queue flag mask")))
    return _config(queue, seq, body, ack)


def verdict(
    queue: int, packet_id: int, verdict: int, mark: int | None = None, *, seq: int = 0
) -> bytes:
    """The verdict on one packet, optionally with a new fwmark. Only ENOENT is answered."""
    body = nlmsg.attribute(NFQA_VERDICT_HDR, _verdict_header(verdict, packet_id))
    if mark is not None:
        body += nlmsg.attribute(NFQA_MARK, _U32.pack(_u32(mark, "packet mark")))
    return nfnetlink.message(MSG_VERDICT, nlmsg.NLM_F_REQUEST, seq, body, resource=queue)


def verdict_batch(queue: int, max_packet_id: int, verdict: int, *, seq: int = 0) -> bytes:
    """One verdict on every waiting packet whose id is at most ``max_packet_id``."""
    body = nlmsg.attribute(NFQA_VERDICT_HDR, _verdict_header(verdict, max_packet_id))
    return nfnetlink.message(MSG_VERDICT_BATCH, nlmsg.NLM_F_REQUEST, seq, body, resource=queue)


def _verdict_header(verdict: int, packet_id: int) -> bytes:
    return _VERDICT.pack(_u32(verdict, "verdict"), _u32(packet_id, "packet id"))


def _u32(value: int, what: str) -> int:
    if not 0 <= value <= 0xFFFFFFFF:
        raise CodecError(f"{what} {value} does not fit 32 bits; use 0-4294967295")
    return value


def parse_packet(payload: bytes) -> QueuedPacket:
    """Decode NFQNL_MSG_PACKET: the bytes after ``nlmsghdr``."""
    header, body = nfnetlink.split(payload, "queued packet")
    found = nlmsg.attributes(body)
    raw = found.get(NFQA_PACKET_HDR)
    if raw is None or len(raw) != _PACKET_HEADER.size:
        size = "no" if raw is None else f"a {len(raw)}-byte"
        raise CodecError(
            f"queued packet has {size} NFQA_PACKET_HDR, 7 bytes are needed; the message is "
            "malformed"
        )
    packet_id, hw_protocol, hook = _PACKET_HEADER.unpack(raw)
    data = found.get(NFQA_PAYLOAD, b"")
    return QueuedPacket(
        queue=header.resource,
        family=header.family,
        packet_id=packet_id,
        hw_protocol=hw_protocol,
        hook=hook,
        indev=_number(found, NFQA_IFINDEX_INDEV, "NFQA_IFINDEX_INDEV") or 0,
        outdev=_number(found, NFQA_IFINDEX_OUTDEV, "NFQA_IFINDEX_OUTDEV") or 0,
        mark=_number(found, NFQA_MARK, "NFQA_MARK") or 0,
        priority=_number(found, NFQA_PRIORITY, "NFQA_PRIORITY") or 0,
        hw_address=_hw_address(found.get(NFQA_HWADDR)),
        skb_info=_number(found, NFQA_SKB_INFO, "NFQA_SKB_INFO") or 0,
        uid=_number(found, NFQA_UID, "NFQA_UID"),
        gid=_number(found, NFQA_GID, "NFQA_GID"),
        cap_len=max(_number(found, NFQA_CAP_LEN, "NFQA_CAP_LEN") or 0, len(data)),
        payload=data,
    )


def _number(found: dict[int, bytes], type_: int, what: str) -> int | None:
    raw = found.get(type_)
    return None if raw is None else nlmsg.integer(raw, 4, what)


def _hw_address(raw: bytes | None) -> bytes:
    if raw is None:
        return b""
    # struct nfqnl_msg_packet_hw: big-endian length, two bytes of padding, eight of address.
    length = int.from_bytes(raw[:2], "big")
    if len(raw) != 12 or length > _HW_ADDRESS_MAX:
        raise CodecError(
            f"NFQA_HWADDR of {len(raw)} bytes claims an address of {length}, 12 and at most 8 are "
            "due; the message is malformed"
        )
    return raw[4 : 4 + length]
