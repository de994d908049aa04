"""First packets of every protocol, and what comes back: a server's word, an ICMP error or silence."""

import errno
import select
import socket
import time
from contextlib import suppress

from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkParamStateCookie

from nfqproxy.model import Family, FrontendKey, Protocol
from tests.kernel.responder import family_of, sctp_packet

SILENCE = "silence"
REFUSED = {Family.IPV4: "icmp 3/3", Family.IPV6: "icmp 1/4"}
"""Port unreachable: RFC 792 type 3 code 3, RFC 4443 type 1 code 4."""

QUIET_S = 0.4
"""How long a probe waits before it calls what it hears silence."""
_TAG = 7  # SCTP verification tag of our INIT


def probe(
    key: FrontendKey, source: tuple[str, int] | None = None, *, patience_s: float | None = None
) -> str:
    """Send a first packet from the calling thread's namespace and tell what came back.

    A server's reply; "icmp TYPE/CODE" of an ICMP error about this very packet, which a TCP or UDP
    socket must also have felt as ECONNREFUSED; SILENCE; or the name of an errno. ``patience_s``: seconds
    until it is silence, by itself as long as a refusal may take.
    """
    if patience_s is None:
        # A TCP socket over IPv6 heeds, on a path this short, only the answer to its second SYN.
        is_slow = key.protocol is Protocol.TCP and key.family is Family.IPV6
        patience_s = QUIET_S + 1.3 * is_slow
    family = family_of(key.address)
    icmp = socket.IPPROTO_ICMPV6 if key.family is Family.IPV6 else socket.IPPROTO_ICMP
    with socket.socket(family, socket.SOCK_RAW, icmp) as errors:
        if key.protocol is Protocol.SCTP:
            return _associate(errors, key, source or ("", 40000), patience_s)
        outcome = _converse(family, key, source, patience_s)
        if outcome not in (SILENCE, "ECONNREFUSED"):
            return outcome
        # Whatever there is has come before the socket felt it, or in all that time.
        found = _icmp_error(errors, key.address, key.protocol, key.port, source, patience_s=0.0)
        if found:
            assert outcome == "ECONNREFUSED", f"{found}, but the socket felt {outcome}"
        return found or outcome


def _converse(
    family: int, key: FrontendKey, source: tuple[str, int] | None, patience_s: float
) -> str:
    kind = socket.SOCK_STREAM if key.protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        sock.settimeout(patience_s)
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


def _associate(
    errors: socket.socket, key: FrontendKey, source: tuple[str, int], patience_s: float
) -> str:
    """Send an INIT; the cookie of the INIT ACK is the server's word."""
    # With its checksum: to conntrack a packet without is invalid, not new.
    init = SCTP(sport=source[1], dport=key.port, tag=0) / SCTPChunkInit(init_tag=_TAG, a_rwnd=65535)
    deadline = time.monotonic() + patience_s
    with socket.socket(errors.family, socket.SOCK_RAW, socket.IPPROTO_SCTP) as sock:
        if source[0]:
            sock.bind((source[0], 0))
        with suppress(PermissionError):
            sock.sendto(bytes(init), (key.address, 0))
        while True:
            ready, _, _ = select.select(
                [sock, errors], [], [], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                return SILENCE
            if sock in ready:
                data, sender = sock.recvfrom(2048)
                packet = sctp_packet(sock, data)
                cookie = packet.getlayer(SCTPChunkParamStateCookie)
                is_ours = (packet.tag, packet.sport, packet.dport) == (_TAG, key.port, source[1])
                if cookie is not None and is_ours and sender[0] == key.address:
                    return bytes(cookie.cookie).decode()
            if errors in ready:
                found = _icmp_error(
                    errors, key.address, key.protocol, key.port, source, patience_s=0.0
                )
                if found:
                    return found


def ping(
    address: str, source: tuple[str, int] | None = None, *, patience_s: float = QUIET_S
) -> str:
    """Send an echo request; return "echo", the ICMP error about it, or SILENCE."""
    six = ":" in address
    number = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    request = bytes(ICMPv6EchoRequest(id=7) if six else ICMP(id=7))
    with socket.socket(family_of(address), socket.SOCK_RAW, number) as sock:
        if source:
            sock.bind((source[0], 0))
        with suppress(PermissionError):
            sock.sendto(request, (address, 0))
        return _icmp_error(sock, address, number, patience_s=patience_s) or SILENCE


def _icmp_error(
    errors: socket.socket,
    address: str,
    protocol: int,
    port: int = 0,
    source: tuple[str, int] | None = None,
    *,
    patience_s: float,
) -> str:
    """Return the ICMP error that tells of a packet to ``address``; empty without.

    An echo reply from there is told as "echo". With ``source`` its port must be the packet's.
    """
    destination = socket.inet_pton(errors.family, address)
    deadline = time.monotonic() + patience_s
    while True:
        errors.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            data, sender = errors.recvfrom(2048)
        except (TimeoutError, BlockingIOError):
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
            and (source is None or int.from_bytes(ports[:2]) == source[1])
        ):
            return f"icmp {data[0]}/{data[1]}"
