"""First packets of every protocol, and what comes back: a server's word, an ICMP error or silence."""

import errno
import socket
from contextlib import suppress

from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkInit

from nfqproxy.lab.icmp import PORT_UNREACHABLE, open_listener, read_message
from nfqproxy.model import Family, FrontendKey, Protocol

SILENCE = "silence"
REFUSED = {family: "icmp {}/{}".format(*what) for family, what in PORT_UNREACHABLE.items()}
"""Port unreachable: RFC 792 type 3 code 3, RFC 4443 type 1 code 4."""

_QUIET_S = 0.4
"""How long a probe waits before it calls what it hears silence."""


def probe(key: FrontendKey, source: tuple[str, int] | None = None) -> str:
    """Send a first packet from the calling thread's namespace and tell what came back.

    A server's reply; "icmp TYPE/CODE" of an ICMP error about this very packet, which a TCP or UDP
    socket must also have felt as ECONNREFUSED; SILENCE; or the name of an errno.
    """
    family = socket.AF_INET6 if key.family is Family.IPV6 else socket.AF_INET
    with open_listener(key.family) as errors:
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


def ping(address: str) -> str:
    """Send an echo request; return "echo", the ICMP error about it, or SILENCE."""
    family = Family.IPV6 if ":" in address else Family.IPV4
    number = socket.IPPROTO_ICMPV6 if family is Family.IPV6 else socket.IPPROTO_ICMP
    request = bytes(ICMPv6EchoRequest(id=7) if family is Family.IPV6 else ICMP(id=7))
    with open_listener(family) as sock:
        sock.settimeout(_QUIET_S)
        with suppress(PermissionError):
            sock.sendto(request, (address, 0))
        return _icmp_error(sock, address, number) or SILENCE


def _icmp_error(errors: socket.socket, address: str, protocol: int, port: int = 0) -> str:
    """Return the ICMP error that tells of a packet to ``address``; empty without.

    An echo reply from there is told as "echo".
    """
    while True:
        try:
            message = read_message(errors)
        except TimeoutError:
            return ""
        if message.kind in (0, 129) and message.sender == address:
            return "echo"
        is_about_it = (message.destination, message.protocol) == (address, protocol)
        if is_about_it and port in (0, message.port):
            return f"icmp {message.kind}/{message.code}"
