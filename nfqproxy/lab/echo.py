"""``python -m nfqproxy.lab.echo NAME PORT``: echo server on TCP and UDP, IPv4 and IPv6.

It tells who the peer is, which nginx cannot do for UDP. TCP: first one JSON line
``{"backend": NAME, "peer": ADDRESS, "peer_port": N}``, then every byte comes back. UDP: each
datagram is answered by one such object with the datagram as ``"payload"`` (Latin-1).
"""

import asyncio
import json
import socket
import sys
from typing import cast


def greeting(name: str, peer: tuple[str, int]) -> dict[str, str | int]:
    """What a peer is told about itself."""
    return {"backend": name, "peer": peer[0], "peer_port": peer[1]}


class DatagramEcho(asyncio.DatagramProtocol):
    """Answers each datagram."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to answer by."""
        # Python 3.11's selector transport is one without being a subclass: cast, not isinstance.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer with the peer's address and the payload."""
        if self._transport is not None:
            said = greeting(self._name, addr) | {"payload": data.decode("latin-1")}
            self._transport.sendto(json.dumps(said).encode(), addr)


async def serve(name: str, port: int) -> None:
    """Serve until cancelled."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            writer.write(json.dumps(greeting(name, (peer[0], peer[1]))).encode() + b"\n")
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the peer went away
        finally:
            writer.close()

    loop = asyncio.get_running_loop()
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        datagrams.bind((any_address, port))
        await loop.create_datagram_endpoint(lambda: DatagramEcho(name), sock=datagrams)
    server = await asyncio.start_server(echo, ["0.0.0.0", "::"], port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
