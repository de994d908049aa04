"""Userspace proxies in TCP mode: they end the client's connection and open another one.

They need real servers behind them and cannot stand a SYN load to sinks. They serve the measured
Service alone, however many the world holds, with one thread on the worker's CPU, round robin.
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from bench.contenders.base import Contender, Placement, Serving, StartError
from bench.process import Service, descendants, service
from bench.world import Backend, World
from nfqproxy.errors import HostError

_LISTEN_BACKLOG = 4096


class _Relay(Contender):
    """What both programs share."""

    is_queued: ClassVar[bool] = False
    is_relay: ClassVar[bool] = True

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        """Round robin over all backends."""
        return {str(backend): 1 / len(backends) for backend in backends}

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Gives the node the Service's address and runs the program."""
        world.node.ip(f"address add {world.measured.address}/32 dev lo")
        # One connection to a backend per client's: more ports, and those in TIME_WAIT again.
        world.node.sysctl(
            {"net/ipv4/ip_local_port_range": "1024 65535", "net/ipv4/tcp_tw_reuse": 1}
        )
        with tempfile.TemporaryDirectory(prefix="nfqb-") as home:
            config = Path(home) / "config"
            config.write_text(self._config(world, Path(home)))
            words = self._command(config)
            with service(world.node, *words, cpu=placement.worker) as running:
                address, port = world.measured.address, world.measured.port
                try:
                    world.node.wait_for_port(address, port, process=running.popen)
                except HostError as error:
                    raise StartError(f"{self.name}: {error}; {running.complained()}") from error
                yield _RelayServing(running)

    @abstractmethod
    def _config(self, world: World, home: Path) -> str:
        """The program's configuration; ``home`` is its own directory."""

    @abstractmethod
    def _command(self, config: Path) -> tuple[str, ...]:
        """Runs it in the foreground."""


class Haproxy(_Relay):
    """HAProxy, ``mode tcp``."""

    name: ClassVar[str] = "haproxy"
    title: ClassVar[str] = "userspace: HAProxy, TCP mode, one thread"

    def check(self) -> None:
        """The program must be installed."""
        if shutil.which("haproxy") is None:
            raise HostError("haproxy is not installed: run ./task setup")

    def _config(self, world: World, home: Path) -> str:
        servers = "\n".join(f"    server {backend.device} {backend}" for backend in world.backends)
        return f"""global
    nbthread 1
    maxconn 4096
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen measured
    bind {world.measured.address}:{world.measured.port} backlog {_LISTEN_BACKLOG}
    balance roundrobin
{servers}
"""

    def _command(self, config: Path) -> tuple[str, ...]:
        return ("haproxy", "-db", "-f", str(config))


class NginxStream(_Relay):
    """nginx, module stream."""

    name: ClassVar[str] = "nginx-stream"
    title: ClassVar[str] = "userspace: nginx stream, one worker"

    def check(self) -> None:
        """The module must be installed."""
        _stream_module()

    def _config(self, world: World, home: Path) -> str:
        servers = "\n".join(f"        server {backend};" for backend in world.backends)
        measured = world.measured
        return f"""load_module {_stream_module()};
user nobody nogroup;
worker_processes 1;
daemon off;
pid {home}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
stream {{
    upstream backends {{
{servers}
    }}
    server {{
        listen {measured.address}:{measured.port} backlog={_LISTEN_BACKLOG};
        proxy_pass backends;
    }}
}}
"""

    def _command(self, config: Path) -> tuple[str, ...]:
        return ("nginx", "-p", str(config.parent), "-e", "stderr", "-c", str(config))


def _stream_module() -> Path:
    """Where nginx keeps its stream module; :class:`HostError` names the package."""
    missing = HostError("nginx's stream module is not installed: run ./task setup")
    if shutil.which("nginx") is None:
        raise missing
    told = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=False).stderr
    folder = re.search(r"--modules-path=(\S+)", told)
    module = Path(folder[1] if folder else "/usr/lib/nginx/modules", "ngx_stream_module.so")
    if not module.exists():
        raise missing
    return module


class _RelayServing(Serving):
    def __init__(self, running: Service) -> None:
        self.workers = tuple(descendants(running.pid))
        self._running = running

    def complaints(self) -> str:
        return self._running.complained()
