"""First packets of every protocol, and what comes back: a server's word, an ICMP error or silence."""

import errno
import socket
from contextlib import suppress

from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkInit

from nfqproxy.model import Family, FrontendKey, Protocol

SILENCE = "silence"
REFUSED = {Family.IPV4: "icmp 3/3", Family.IPV6: "icmp 1/4"}
"""Port unreachable: RFC 792 type 3 code 3, RFC 4443 type 1 code 4."""

_QUIET_S = 0.4
"""How long a probe waits before it calls what it hears silence."""


def probe(key: FrontendKey, source: tuple[str, int] | None = None) -> str:
    """Send a first packet from the calling thread's namespace and tell what came back.

    A server's reply; "icmp TYPE/CODE" of an ICMP error about this very packet, which a TCP or UDP
    socket must also have felt as ECONNREFUSED; SILENCE; or the name of an errno.
    """
    family = socket.AF_INET6 if key.family is Family.IPV6 else socket.AF_INET
    icmp = socket.IPPROTO_ICMPV6 if key.family is Family.IPV6 else socket.IPPROTO_ICMP
    with socket.socket(family, socket.SOCK_RAW, icmp) as errors:
        errors.settimeout(_QUIET_S)
        if key.protocol is Protocol.SCTP:
            outcome = _send_init(family, key, source)
        else:
            outcome = _converse(family, key, source)
        if outcome not in (SILENCE, "ECONNREFUSED"):
            return outcome
        found = _icmp_error(errors, key.address, key.protocol, key.port)
        if found and key.protocol is not Protocol.SCTP:
            assert outcome == "ECONNREFUSED", f"{found}, but the socket felt {outcome}"
        return found or outcome


def _converse(family: int, key: FrontendKey, source: tuple[str, int] | None) -> str:
    kind = socket.SOCK_STREAM if key.protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        # A TCP socket over IPv6 heeds, on a path this short, only the answer to its second SYN.
        is_slow = key.protocol is Protocol.TCP and key.family is Family.IPV6
        sock.settimeout(1.3 + _QUIET_S if is_slow else _QUIET_S)
        if source:
            sock.bind(source)
        try:
            sock.connect((key.address, key.port))
            if kind == socket.SOCK_DGRAM:
                with suppress(PermissionError):  # what is dropped or refused on its way out
                    sock.send(b"?")
            return sock.recv(200).decode()
        except TimeoutError:
            return SILENCE
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def _send_init(family: int, key: FrontendKey, source: tuple[str, int] | None) -> str:
    # With its checksum: to conntrack a packet without is invalid, not new.
    init = SCTP(sport=source[1] if source else 40000, dport=key.port, tag=0)
    with socket.socket(family, socket.SOCK_RAW, key.protocol) as sock:
        if source:
            sock.bind((source[0], 0))
        with suppress(PermissionError):
            sock.sendto(bytes(init / SCTPChunkInit(init_tag=7, a_rwnd=65535)), (key.address, 0))
    return SILENCE


def ping(address: str, source: tuple[str, int] | None = None) -> str:
    """Send an echo request; return "echo", the ICMP error about it, or SILENCE."""
    six = ":" in address
    family = socket.AF_INET6 if six else socket.AF_INET
    number = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    request = bytes(ICMPv6EchoRequest(id=7) if six else ICMP(id=7))
    with socket.socket(family, socket.SOCK_RAW, number) as sock:
        sock.settimeout(_QUIET_S)
        if source:
            sock.bind((source[0], 0))
        with suppress(PermissionError):
            sock.sendto(request, (address, 0))
        return _icmp_error(sock, address, number) or SILENCE


def _icmp_error(errors: socket.socket, address: str, protocol: int, port: int = 0) -> str:
    """Return the ICMP error that tells of a packet to ``address``; empty without.

    An echo reply from there is told as "echo".
    """
    destination = socket.inet_pton(errors.family, address)
    while True:
        try:
            data, sender = errors.recvfrom(2048)
        except TimeoutError:
            return ""
        if errors.family == socket.AF_INET:
            data = data[(data[0] & 15) * 4 :]
            is_error, inner, address_at, protocol_at = data[0] in (3, 11), data[8:], 16, 9
            ports = inner[(inner[0] & 15) * 4 :] if is_error else b""
        else:
            is_error, inner, address_at, protocol_at = data[0] < 128, data[8:], 24, 6
            ports = inner[40:]
        if data[0] in (0, 129) and sender[0] == address:
            return "echo"
        about = inner[address_at : address_at + len(destination)]
        if (
            is_error
            and about == destination
            and inner[protocol_at] == protocol
            and (not port or int.from_bytes(ports[2:4]) == port)
        ):
            return f"icmp {data[0]}/{data[1]}"
