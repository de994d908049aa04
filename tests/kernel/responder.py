"""Tiny servers for many namespaces in one thread of the test, and the clients that ask them.

TCP: a connection is greeted with one line ``NAME CLIENT-ADDRESS CLIENT-PORT`` and then echoed until
the client closes. UDP: each datagram is answered by that line followed by the datagram. SCTP: an INIT is
answered by an INIT ACK with that line as its cookie (RFC 9260 section 3.3.3), through raw sockets, which
need no SCTP in the kernel.
"""

import itertools
import selectors
import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkInitAck, SCTPChunkParamStateCookie

from nfqproxy.kernel.netns import Namespace

TIMEOUT_S = 5.0


class Responder:
    """A context manager; ``serve`` may be called at any time inside it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._names: dict[socket.socket, str] = {}
        self._sctp_ports: dict[socket.socket, int] = {}
        self._thread = threading.Thread(target=self._run, name="responder")
        self._servers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._is_stopping = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_stopping = True
        self._waker.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        for server in self._servers:
            server.close()
        self._selector.close()
        self._waker.close()

    def serve(self, namespace: Namespace, name: str, port: int, *addresses: str) -> None:
        """Answer as ``name`` on TCP and UDP ``port``, on these addresses or on all of both families."""
        for address in addresses or ("0.0.0.0", "::"):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                server = namespace.socket(family, kind)
                # From here on __exit__ closes it, also when the address is refused below.
                self._servers.append(server)
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    server.listen(4096)
                server.setblocking(False)
                self._register(server, name, kind)

    def serve_sctp(self, namespace: Namespace, name: str, port: int, *addresses: str) -> None:
        """Answer as ``name`` to SCTP INIT chunks for ``port`` of these addresses."""
        for address in addresses:
            server = namespace.socket(family_of(address), socket.SOCK_RAW, socket.IPPROTO_SCTP)
            self._servers.append(server)
            server.bind((address, 0))
            server.setblocking(False)
            self._sctp_ports[server] = port
            self._register(server, name, socket.SOCK_RAW)

    def _register(self, server: socket.socket, name: str, kind: int) -> None:
        with self._lock:
            self._names[server] = name
        self._selector.register(server, selectors.EVENT_READ, kind)
        self._waker.send(b"x")

    def _run(self) -> None:
        while not self._is_stopping:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    if sock is self._wake:
                        sock.recv(4096)
                    elif key.data == socket.SOCK_STREAM:
                        self._accept(sock)
                    elif key.data == socket.SOCK_DGRAM:
                        data, peer = sock.recvfrom(65536)
                        sock.sendto(self._greeting(sock, peer) + data, peer)
                    elif key.data == socket.SOCK_RAW:
                        self._answer_init(sock)
                    else:
                        self._echo(sock)
                except (BlockingIOError, ConnectionError):
                    pass  # a client that has reset its connection already

    def _answer_init(self, server: socket.socket) -> None:
        data, peer = server.recvfrom(65536)
        packet = sctp_packet(server, data)
        init = packet.getlayer(SCTPChunkInit)
        port = self._sctp_ports[server]
        if init is None or packet.dport != port:
            return
        cookie = SCTPChunkParamStateCookie(cookie=self._greeting(server, (peer[0], packet.sport)))
        answer = SCTP(sport=port, dport=packet.sport, tag=init.init_tag) / SCTPChunkInitAck(
            init_tag=1, a_rwnd=65535, params=[cookie]
        )
        server.sendto(bytes(answer), (peer[0], 0))

    def _greeting(self, server: socket.socket, peer: tuple[str, int]) -> bytes:
        with self._lock:
            name = self._names[server]
        return f"{name} {peer[0]} {peer[1]}\n".encode()

    def _accept(self, server: socket.socket) -> None:
        connection, peer = server.accept()
        connection.setblocking(False)
        try:
            connection.send(self._greeting(server, peer))
        except ConnectionError:
            connection.close()
            raise
        self._selector.register(connection, selectors.EVENT_READ)

    def _echo(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except ConnectionError:
            data = b""
        if data:
            connection.send(data)
        else:
            self._selector.unregister(connection)
            connection.close()


def sctp_packet(raw: socket.socket, data: bytes) -> SCTP:
    """What a raw SCTP socket has received; over IPv4 the IP header comes along (raw(7))."""
    return SCTP(data if raw.family == socket.AF_INET6 else data[(data[0] & 15) * 4 :])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Who answered, and what it saw of the client."""

    name: str
    client: str
    client_port: int


def parse(line: bytes) -> Answer:
    """The greeting line of a Responder."""
    name, client, port = line.split(b"\n")[0].decode().split()
    return Answer(name=name, client=client, client_port=int(port))


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Connection:
    """An open TCP connection from ``namespace`` to a Responder, greeted. A context manager."""

    def __init__(
        self,
        namespace: Namespace,
        address: str,
        port: int,
        *,
        source: tuple[str, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.socket = namespace.socket(family_of(address), socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout_s)
            if source is not None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(source)
            self.socket.connect((address, port))
            self.answer = parse(self._line())
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            data = self.socket.recv(4096)
            if not data:
                raise ConnectionResetError("the server closed before the line ended")
            line += data
        return line

    def echo(self, text: str) -> str:
        """Send one line and return what comes back."""
        self.socket.sendall(text.encode() + b"\n")
        return self._line().decode().rstrip("\n")


def ask_tcp(namespace: Namespace, address: str, port: int, timeout_s: float = TIMEOUT_S) -> Answer:
    """Connect once, read the greeting, close."""
    with Connection(namespace, address, port, timeout_s=timeout_s) as connection:
        return connection.answer


# Below the range from which the kernel takes ports by itself.
_FLOW_PORTS = itertools.cycle(range(20000, 30000))


def new_flow(
    namespace: Namespace, address: str, port: int, timeout_s: float = TIMEOUT_S
) -> socket.socket:
    """A UDP socket connected from a source port that no other socket of this function had lately.

    The kernel would give out a port again whose flow conntrack and the set of known flows still hold.
    """
    sock = namespace.socket(family_of(address), socket.SOCK_DGRAM)
    sock.settimeout(timeout_s)
    sock.bind(("::" if ":" in address else "0.0.0.0", next(_FLOW_PORTS)))
    sock.connect((address, port))
    return sock


def ask_udp(
    namespace: Namespace,
    address: str,
    port: int,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Send one datagram of a new flow and return who answered."""
    with new_flow(namespace, address, port, timeout_s) as sock:
        sock.send(b"ping")
        data = sock.recv(65536)
    assert data.endswith(b"ping")
    return parse(data)
