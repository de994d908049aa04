"""ICMP errors as a raw socket hears them: which packet of ours each is about.

RFC 792 and RFC 4443: an error carries the beginning of the packet it is about.
"""

import socket

from msgspec import Struct

from nfqproxy.model import Family

__all__ = ["PORT_UNREACHABLE", "IcmpMessage", "open_listener", "read_message"]

PORT_UNREACHABLE = {Family.IPV4: (3, 3), Family.IPV6: (1, 4)}
"""Type and code."""

_PROTOCOLS = {
    Family.IPV4: (socket.AF_INET, socket.IPPROTO_ICMP),
    Family.IPV6: (socket.AF_INET6, socket.IPPROTO_ICMPV6),
}
_V4_ERRORS = (3, 11)
"""Destination unreachable, time exceeded."""


class IcmpMessage(Struct, frozen=True, kw_only=True):
    """One message."""

    sender: str
    kind: int
    code: int
    destination: str = ""
    """Of the packet that an error is about; empty: it is no error."""
    protocol: int = 0
    source_port: int = 0
    port: int = 0
    """The ports of that packet, source and destination; meaningful for TCP, UDP and SCTP."""


def open_listener(family: Family) -> socket.socket:
    """A raw socket that hears all ICMP of the network namespace; needs root."""
    address_family, protocol = _PROTOCOLS[family]
    return socket.socket(address_family, socket.SOCK_RAW, protocol)


def read_message(listener: socket.socket) -> IcmpMessage:
    """The next message. TimeoutError and BlockingIOError as the socket's own settings have it."""
    data, sender = listener.recvfrom(2048)
    if listener.family == socket.AF_INET:
        data = data[(data[0] & 15) * 4 :]  # raw IPv4 sockets deliver the IP header too
        is_error, inner = data[0] in _V4_ERRORS, data[8:]
        protocol_at, address_at, address_size = 9, 16, 4
        header = (inner[0] & 15) * 4 if inner else 0
    else:
        is_error, inner = data[0] < 128, data[8:]
        protocol_at, address_at, address_size = 6, 24, 16
        header = 40
    if not is_error or len(inner) < header + 4:
        return IcmpMessage(sender=sender[0], kind=data[0], code=data[1])
    destination = inner[address_at : address_at + address_size]
    return IcmpMessage(
        sender=sender[0],
        kind=data[0],
        code=data[1],
        destination=socket.inet_ntop(listener.family, destination),
        protocol=inner[protocol_at],
        source_port=int.from_bytes(inner[header : header + 2]),
        port=int.from_bytes(inner[header + 2 : header + 4]),
    )
