"""Conntrack values: tuples, NAT bindings, entries, their states and status bits.

Constants are those of linux/netfilter/nf_conntrack_common.h, nf_conntrack_tcp.h and
nf_conntrack_sctp.h. The bytes are ``ctnetlink``'s business, which offers all names of this module
as its own.
"""

from dataclasses import dataclass, replace

from nfqproxy.errors import CodecError

IPPROTO_ICMP = 1
IPPROTO_TCP = 6
IPPROTO_UDP = 17
IPPROTO_ICMPV6 = 58
IPPROTO_SCTP = 132

IPS_EXPECTED = 1 << 0
IPS_SEEN_REPLY = 1 << 1
IPS_ASSURED = 1 << 2
IPS_CONFIRMED = 1 << 3
IPS_SRC_NAT = 1 << 4
IPS_DST_NAT = 1 << 5
IPS_NAT_MASK = IPS_SRC_NAT | IPS_DST_NAT
IPS_SEQ_ADJUST = 1 << 6
IPS_SRC_NAT_DONE = 1 << 7
IPS_DST_NAT_DONE = 1 << 8
IPS_NAT_DONE_MASK = IPS_SRC_NAT_DONE | IPS_DST_NAT_DONE
IPS_DYING = 1 << 9
IPS_FIXED_TIMEOUT = 1 << 10
IPS_TEMPLATE = 1 << 11
IPS_UNTRACKED = 1 << 12
IPS_HELPER = 1 << 13
IPS_OFFLOAD = 1 << 14
IPS_HW_OFFLOAD = 1 << 15

TCP_CONNTRACK_NONE = 0
TCP_CONNTRACK_SYN_SENT = 1
TCP_CONNTRACK_SYN_RECV = 2
TCP_CONNTRACK_ESTABLISHED = 3
TCP_CONNTRACK_FIN_WAIT = 4
TCP_CONNTRACK_CLOSE_WAIT = 5
TCP_CONNTRACK_LAST_ACK = 6
TCP_CONNTRACK_TIME_WAIT = 7
TCP_CONNTRACK_CLOSE = 8
TCP_CONNTRACK_SYN_SENT2 = 9

SCTP_CONNTRACK_NONE = 0
SCTP_CONNTRACK_CLOSED = 1
SCTP_CONNTRACK_COOKIE_WAIT = 2
SCTP_CONNTRACK_COOKIE_ECHOED = 3
SCTP_CONNTRACK_ESTABLISHED = 4
SCTP_CONNTRACK_SHUTDOWN_SENT = 5
SCTP_CONNTRACK_SHUTDOWN_RECD = 6
SCTP_CONNTRACK_SHUTDOWN_ACK_SENT = 7
SCTP_CONNTRACK_HEARTBEAT_SENT = 8

# Queries and their answers; the kernel refuses a tuple of any other ICMP type with EINVAL
# (net/netfilter/nf_conntrack_proto_icmp.c, nf_conntrack_proto_icmpv6.c: invmap).
_ICMP_INVERSE = {8: 0, 0: 8, 13: 14, 14: 13, 15: 16, 16: 15, 17: 18, 18: 17}
_ICMPV6_INVERSE = {128: 129, 129: 128, 139: 140, 140: 139}


@dataclass(frozen=True, slots=True)
class Tuple:
    """One direction of a flow. Hashable, so it serves as a dictionary key."""

    src: bytes
    """Packed source address: 4 or 16 bytes."""
    dst: bytes
    """Packed destination address, as long as ``src``."""
    protocol: int
    """IP protocol number."""
    src_port: int = 0
    """Source port, host order; 0 for protocols without ports."""
    dst_port: int = 0
    """Destination port, host order; 0 for protocols without ports."""
    icmp_id: int = 0
    """Identifier of an ICMP or ICMPv6 query."""
    icmp_type: int = 0
    """Type of an ICMP or ICMPv6 query (8 and 128: echo request)."""
    icmp_code: int = 0
    """Code of an ICMP or ICMPv6 query."""

    def inverse(self) -> "Tuple":
        """The same flow seen from the other end; CodecError for an ICMP type that has no answer."""
        icmp_type = self.icmp_type
        if self.protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
            known = _ICMP_INVERSE if self.protocol == IPPROTO_ICMP else _ICMPV6_INVERSE
            if icmp_type not in known:
                raise CodecError(
                    f"ICMP type {icmp_type} of protocol {self.protocol} has no answer type; "
                    f"conntrack follows only types {sorted(known)}"
                )
            icmp_type = known[icmp_type]
        return replace(
            self,
            src=self.dst,
            dst=self.src,
            src_port=self.dst_port,
            dst_port=self.src_port,
            icmp_type=icmp_type,
        )


@dataclass(frozen=True, slots=True)
class Nat:
    """What one side of a flow is translated to."""

    address: bytes
    """Packed address, of the flow's family."""
    port: int | None = None
    """Host order. None: the port stays; in source NAT the kernel picks another on a clash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One conntrack entry, as GET, a dump or an event tells it.

    Captured on Linux 6.18: a mark comes in events only if not 0, labels not in DESTROY, the use
    count only from GET and dumps. Counters come in DESTROY, but not in NEW.
    """

    original: Tuple
    """The flow as its first packet had it, before translation."""
    reply: Tuple
    """What answers look like before they are translated back."""
    status: int
    """IPS_* bits."""
    timeout_s: int | None
    """Seconds until the entry ends. DESTROY: what was left when deleted, None when it ran out."""
    mark: int
    """CTA_MARK; 0 where not told."""
    tcp_state: int | None
    """TCP_CONNTRACK_*; None for other protocols and in events that leave it out."""
    sctp_state: int | None
    """SCTP_CONNTRACK_*; None for other protocols and in events that leave it out."""
    id: int
    """Tells two entries of the same tuple in different times apart; 0 where not told."""
    zone: int
    """Conntrack zone, 0 by default."""
    labels: bytes
    """Label bits (16 bytes in host word order), empty where not told."""
    use: int
    """Reference count; 0 where not told."""
    original_packets: int | None
    """Packets in the original direction (net.netfilter.nf_conntrack_acct=1), else None."""
    original_bytes: int | None
    """Bytes in the original direction, else None."""
    reply_packets: int | None
    """Packets in the reply direction, else None."""
    reply_bytes: int | None
    """Bytes in the reply direction, else None."""

    @property
    def is_dnat(self) -> bool:
        """Whether the destination is translated."""
        return bool(self.status & IPS_DST_NAT)

    @property
    def is_snat(self) -> bool:
        """Whether the source is translated."""
        return bool(self.status & IPS_SRC_NAT)

    @property
    def has_seen_reply(self) -> bool:
        """Whether a packet came back."""
        return bool(self.status & IPS_SEEN_REPLY)

    @property
    def is_assured(self) -> bool:
        """Whether the entry is safe from early eviction."""
        return bool(self.status & IPS_ASSURED)

    @property
    def destination(self) -> Nat:
        """Where packets really go: the backend, if ``is_dnat``."""
        return Nat(self.reply.src, self.reply.src_port)

    @property
    def source(self) -> Nat:
        """Whom the destination sees as the client: the masquerade address, if ``is_snat``."""
        return Nat(self.reply.dst, self.reply.dst_port)
