"""The admin socket: an abstract Unix socket that answers JSON, one request a connection.

Abstract sockets belong to the network namespace, so several nodes of a lab each have their own, and
binding it is the lock that keeps a second proxy out of a namespace. The kernel tells the peer's user
id (unix(7), SO_PEERCRED); only root and the proxy's own user are answered.

A request is one line of JSON, ``{"verb": "status"}``; the answer is one JSON document, then the end.
"""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nfqproxy.errors import NfqproxyError

ADDRESS = "\0nfqproxy-admin"
_TIMEOUT_S = 5.0
_MAX_REQUEST = 65536

Answer = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""From a request's arguments to the document that answers it."""


def listen() -> socket.socket:
    """Bind the admin socket; NfqproxyError when another proxy runs in this network namespace."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(ADDRESS)
    except OSError:
        listener.close()
        raise NfqproxyError(
            "another nfqproxy runs in this network namespace; stop it first"
            " (nfqproxy status shows its process id)"
        ) from None
    listener.listen(16)
    return listener


async def serve(listener: socket.socket, answers: Mapping[str, Answer]) -> asyncio.Server:
    """Answer requests on ``listener`` by verb until the returned server is closed."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            document = await asyncio.wait_for(_answer(reader, writer, answers), _TIMEOUT_S)
            writer.write(json.dumps(document).encode())
            await writer.drain()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()

    return await asyncio.start_unix_server(handle, sock=listener, limit=_MAX_REQUEST)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: Mapping[str, Answer]
) -> Mapping[str, Any]:
    peer = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        return {"error": "only root and the proxy's own user may ask"}
    try:
        request = json.loads(await reader.readline())
        answer = answers[request["verb"]]
    except (ValueError, KeyError, TypeError):
        return {"error": f"unknown request; known verbs are: {', '.join(sorted(answers))}"}
    return await answer(request)


def ask(verb: str, **arguments: Any) -> dict[str, Any]:
    """Ask the proxy of this network namespace; NfqproxyError when none runs or it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_TIMEOUT_S)
        try:
            client.connect(ADDRESS)
            client.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionRefusedError:
            raise NfqproxyError(
                "no nfqproxy runs in this network namespace; start one with nfqproxy run"
            ) from None
        except OSError as error:
            raise NfqproxyError(f"the running nfqproxy did not answer: {error}") from None
    document: dict[str, Any] = json.loads(answer or b'{"error": "no answer"}')
    if "error" in document:
        raise NfqproxyError(f"the running nfqproxy answered: {document['error']}")
    return document
