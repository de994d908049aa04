"""Opens and closes the listeners of health-check node ports as Services come and go.

By difference: a listener whose address and port stay is not touched when endpoints, or even the Service
behind it, change. What cannot be opened is logged once, shown in ``status`` and tried again.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nfqproxy.api.health import HealthAnswer, HealthListener
from nfqproxy.core.health_ports import HealthPort

__all__ = ["HealthPorts"]

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""Seconds between attempts to open what could not be opened (kube-proxy's syncPeriod)."""

_Place = tuple[str, int]


class HealthPorts:
    """See the module. All calls from one event loop."""

    def __init__(
        self,
        is_proxy_healthy: Callable[[], bool],
        warn: Callable[[HealthPort, str], None] = lambda _port, _sentence: None,
    ) -> None:
        """``warn``: told once, besides the log, of a port that cannot be opened."""
        self._is_proxy_healthy = is_proxy_healthy
        self._warn = warn
        self._ports: tuple[HealthPort, ...] = ()
        # Address and port -> the Service that is answered for there.
        self._owners: dict[_Place, HealthPort] = {}
        self._listeners: dict[_Place, HealthListener] = {}
        self._errors: dict[tuple[HealthPort, str], str] = {}
        self._complaints: set[str] = set()
        self._lock = asyncio.Lock()

    async def follow(self, ports: Iterable[HealthPort]) -> None:
        """Serve exactly these from now on. Raises nothing for a port that cannot be opened."""
        async with self._lock:
            self._ports = tuple(ports)
            await self._update()

    async def run(self) -> None:
        """Try again what failed, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_S)
            async with self._lock:
                if self._errors:
                    await self._update()

    async def close(self) -> None:
        """Close all listeners."""
        await self.follow(())

    async def _update(self) -> None:
        owners: dict[_Place, HealthPort] = {}
        errors: dict[tuple[HealthPort, str], str] = {}
        for port in self._ports:
            for address in port.addresses:
                place = (address, port.port)
                owner = owners.setdefault(place, port)
                if owner is not port:
                    errors[port, address] = (
                        f"{owner.namespace}/{owner.service} has the same port;"
                        " give one of the two another healthCheckNodePort"
                    )
        self._owners = owners
        # What goes first: a listener on all addresses is in the way of one on a single address.
        gone = [place for place in self._listeners if place not in owners]
        listeners = [self._listeners.pop(place) for place in gone]
        await asyncio.gather(*(listener.close() for listener in listeners))
        for place, owner in owners.items():
            if place not in self._listeners:
                try:
                    self._listeners[place] = await HealthListener.open(
                        *place, partial(self._answer, place)
                    )
                except OSError as error:
                    errors[owner, place[0]] = f"{error.strerror or error}; tried again later"
        self._errors = errors
        self._complain()

    def _answer(self, place: _Place) -> HealthAnswer:
        owner = self._owners.get(place)
        return HealthAnswer(
            namespace=owner.namespace if owner else "",
            service=owner.service if owner else "",
            local_endpoints=owner.local_endpoints if owner else 0,
            is_proxy_healthy=self._is_proxy_healthy(),
        )

    def _complain(self) -> None:
        complaints = {
            f"{port.namespace}/{port.service}: cannot listen on its health-check node port"
            f" {_text(address, port.port)}: {problem}": port
            for (port, address), problem in self._errors.items()
        }
        for complaint in sorted(complaints.keys() - self._complaints):
            log.error("%s", complaint)
            self._warn(complaints[complaint], complaint)
        self._complaints = set(complaints)

    def status(self) -> list[dict[str, Any]]:
        """State for the admin socket: one entry per Service and address."""
        found = []
        for port in self._ports:
            for address in port.addresses:
                problem = self._errors.get((port, address))
                found.append(
                    {
                        "namespace": port.namespace,
                        "service": port.service,
                        "address": address,
                        "port": port.port,
                        "local_endpoints": port.local_endpoints,
                        "listening": problem is None and (address, port.port) in self._listeners,
                        "error": problem,
                    }
                )
        return found


def _text(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
