"""First packets of every protocol, and what comes back: a server's word, an ICMP error or silence."""

import errno
import select
import socket
import time
from contextlib import suppress

from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkParamStateCookie

from nfqproxy.lab.icmp import PORT_UNREACHABLE, open_listener, read_message
from nfqproxy.model import Family, FrontendKey, Protocol
from tests.kernel.responder import family_of, sctp_packet

SILENCE = "silence"
REFUSED = {family: "icmp {}/{}".format(*what) for family, what in PORT_UNREACHABLE.items()}
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
    with open_listener(key.family) as errors:
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
    family = Family.IPV6 if ":" in address else Family.IPV4
    number = socket.IPPROTO_ICMPV6 if family is Family.IPV6 else socket.IPPROTO_ICMP
    request = bytes(ICMPv6EchoRequest(id=7) if family is Family.IPV6 else ICMP(id=7))
    with open_listener(family) as sock:
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

    An echo reply from there is told as "echo". With ``source`` its port, unless 0, must be the packet's.
    """
    deadline = time.monotonic() + patience_s
    while True:
        errors.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            message = read_message(errors)
        except (TimeoutError, BlockingIOError):
            return ""
        if message.kind in (0, 129) and message.sender == address:
            return "echo"
        if (
            (message.destination, message.protocol) == (address, protocol)
            and port in (0, message.port)
            and (source is None or source[1] in (0, message.source_port))
        ):
            return f"icmp {message.kind}/{message.code}"
