"""HTTP listeners of the health-check node ports, with kube-proxy's status, headers and JSON.

A load balancer asks them once every few seconds; whatever the method and path, the answer is the same.
(SEMANTICS 2.17; k/pkg/proxy/healthcheck/service_health.go)
"""

import json
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from msgspec import Struct

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["HealthAnswer", "HealthListener"]

_BACKLOG = 128
_KEEPALIVE_S = 15.0
_CLOSE_TIMEOUT_S = 0.5
"""How long a request that is being answered may hold up the closing of its listener."""


class HealthAnswer(Struct, frozen=True, kw_only=True):
    """What a health-check node port says at one moment."""

    namespace: str
    service: str
    local_endpoints: int
    """Ready endpoint addresses of the Service on this node."""
    is_proxy_healthy: bool

    @property
    def status(self) -> int:
        """200 while this node should be sent traffic, else 503."""
        return 200 if self.local_endpoints > 0 and self.is_proxy_healthy else 503

    @property
    def headers(self) -> dict[str, str]:
        """What a load balancer may read without looking into the body."""
        return {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            "X-Load-Balancing-Endpoint-Weight": str(self.local_endpoints),
            # Else the library's name and version.
            "Server": "nfqproxy",
        }

    @property
    def body(self) -> bytes:
        """Byte for byte what kube-proxy writes, tabs included, without a final newline."""
        document = {
            "service": {"namespace": self.namespace, "name": self.service},
            "localEndpoints": self.local_endpoints,
            "serviceProxyHealthy": self.is_proxy_healthy,
        }
        return json.dumps(document, indent="\t").encode()


class HealthListener:
    """One address and port that answers HTTP; made by :meth:`open`."""

    def __init__(self, runner: "web.ServerRunner") -> None:
        self._runner = runner

    @classmethod
    async def open(cls, address: str, port: int, answer: Callable[[], HealthAnswer]) -> Self:
        """Listen; every request is answered with what ``answer()`` says then. OSError if it cannot."""
        # Here: most nodes have no such port, and to load it takes a fifth of the program's start.
        from aiohttp import web

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            told = answer()
            return web.Response(status=told.status, headers=told.headers, body=told.body)

        listener = _bind(address, port)
        server = web.Server(handle, access_log=None, keepalive_timeout=_KEEPALIVE_S)
        runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_TIMEOUT_S)
        try:
            await runner.setup()
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        except BaseException:
            listener.close()
            await runner.cleanup()
            raise
        return cls(runner)

    async def close(self) -> None:
        """Stop listening at once and end the connections."""
        await self._runner.cleanup()


def _bind(address: str, port: int) -> socket.socket:
    is_v6 = ":" in address
    listener = socket.socket(
        socket.AF_INET6 if is_v6 else socket.AF_INET,
        socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    try:
        if is_v6:
            # Each family has a listener of its own, with its own number of endpoints.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        # Here and not by the site: that another program listens shows only now, with SO_REUSEADDR.
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
