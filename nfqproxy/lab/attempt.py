"""One new connection (or DNS query) from the calling thread's namespace, and what became of it.

Blocking and one at a time: what matters is what a client experiences, not how fast. A refusal counts
as one only if the ICMP error itself was heard; a socket's ECONNREFUSED may be a TCP reset as well.
"""

import errno
import http.client
import json
import secrets
import select
import socket
import time
from enum import StrEnum
from typing import Any

from msgspec import Struct

from nfqproxy.errors import CodecError
from nfqproxy.lab.dns import decode_txt_answer, encode_txt_query
from nfqproxy.lab.icmp import PORT_UNREACHABLE, open_listener, read_message
from nfqproxy.lab.servers import WHOAMI
from nfqproxy.model import Family, FrontendKey, Protocol

__all__ = ["Attempt", "Outcome", "attempt", "get_json"]


class Outcome(StrEnum):
    """What a client experiences."""

    SERVED = "served"
    REFUSED = "refused"
    """ICMP port unreachable."""
    DROPPED = "dropped"
    """Nothing came back while the client waited."""
    FAILED = "failed"
    """Anything else."""


class Attempt(Struct, frozen=True, kw_only=True):
    """What became of one connection."""

    outcome: Outcome
    source: str = ""
    """The address it was made from; empty: the kernel's choice."""
    backend: str = ""
    """Who answered."""
    seen_as: str = ""
    """The client's address as the backend saw it; empty over UDP, whose server does not tell."""
    problem: str = ""
    """Why it failed."""


class _RefusedError(Exception):
    """An ICMP error about the connection came back."""


def attempt(to: FrontendKey, *, source: str = "", timeout_s: float) -> Attempt:
    """Make one connection, TCP with HTTP or UDP with DNS, from ``source`` or the kernel's choice."""
    deadline = time.monotonic() + timeout_s
    kind = socket.SOCK_STREAM if to.protocol is Protocol.TCP else socket.SOCK_DGRAM
    with open_listener(to.family) as errors, _new_socket(to, kind) as sock:
        errors.setblocking(False)
        try:
            if source:
                sock.bind((source, 0))
            if to.protocol is Protocol.TCP:
                return _ask_http(to, sock, errors, deadline)
            return _ask_dns(to, sock, errors, deadline)
        except TimeoutError:
            return Attempt(outcome=Outcome.DROPPED)
        except _RefusedError as refusal:
            is_expected = refusal.args == PORT_UNREACHABLE[to.family]
            problem = "" if is_expected else "ICMP type {} code {}".format(*refusal.args)
            outcome = Outcome.REFUSED if is_expected else Outcome.FAILED
            return Attempt(outcome=outcome, problem=problem)
        except OSError as error:
            problem = errno.errorcode.get(error.errno or 0, str(error))
            return Attempt(outcome=Outcome.FAILED, problem=problem)
        except (http.client.HTTPException, CodecError) as error:
            problem = f"no proper answer: {error or type(error).__name__}"
            return Attempt(outcome=Outcome.FAILED, problem=problem)


def _new_socket(to: FrontendKey, kind: int) -> socket.socket:
    family = socket.AF_INET6 if to.family is Family.IPV6 else socket.AF_INET
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock


def _ask_http(
    to: FrontendKey, sock: socket.socket, errors: socket.socket, deadline: float
) -> Attempt:
    started = sock.connect_ex((to.address, to.port))
    if started not in (0, errno.EINPROGRESS, errno.ECONNREFUSED):
        raise OSError(started, "connect")
    _wait(to, sock, errors, deadline, writing=True)
    connected = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if connected:
        raise OSError(connected, "connect")
    sock.settimeout(max(0.01, deadline - time.monotonic()))
    connection = http.client.HTTPConnection(to.address, to.port)
    connection.sock = sock
    connection.request("GET", "/", headers={"Connection": "close"})
    answer = connection.getresponse()
    answer.read()
    return Attempt(
        outcome=Outcome.SERVED,
        backend=answer.headers.get("X-Backend", "?"),
        seen_as=answer.headers.get("X-Client", "?"),
    )


def _ask_dns(
    to: FrontendKey, sock: socket.socket, errors: socket.socket, deadline: float
) -> Attempt:
    identity = secrets.randbelow(65536)
    sock.connect((to.address, to.port))
    try:
        sock.send(encode_txt_query(identity, WHOAMI))
    except PermissionError:
        pass  # dropped in OUTPUT, or refused there: then the ICMP error has come
    _wait(to, sock, errors, deadline, writing=False)
    return Attempt(outcome=Outcome.SERVED, backend=decode_txt_answer(sock.recv(4096), identity))


def _wait(
    to: FrontendKey,
    sock: socket.socket,
    errors: socket.socket,
    deadline: float,
    *,
    writing: bool,
) -> None:
    """Until the socket is ready; _RefusedError when an ICMP error about it comes first, or TimeoutError."""
    while True:
        left = deadline - time.monotonic()
        wanted = [sock] if writing else []
        heard, writable, _ = select.select(
            [errors] if writing else [errors, sock], wanted, [], max(0.0, left)
        )
        # The error before the socket: the kernel hands it to both.
        if errors in heard:
            message = read_message(errors)
            about = (message.destination, message.protocol, message.port)
            if about == (to.address, to.protocol, to.port):
                raise _RefusedError(message.kind, message.code)
        elif heard or writable:
            return
        elif left <= 0:
            raise TimeoutError


def get_json(address: str, port: int, *, timeout_s: float) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON document of ``GET /``; OSError when nobody answers with both."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", "/", headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no proper answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
