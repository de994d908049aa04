"""The composition root: builds the parts, decides the order of starting and stopping.

Start: read everything that can be wrong (manifests, host), bind queues and start workers, and only then
touch rules and sets. So a start that fails has changed nothing. Stop: the workers leave their queues
without losing a packet; rules, sets and the fallback stay and serve (``cleanup`` removes them).
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nfqproxy import __version__
from nfqproxy.api import admin, channel
from nfqproxy.control.node import node_context, node_facts
from nfqproxy.control.objects import Objects
from nfqproxy.control.table import ServiceTable
from nfqproxy.core.plans import Planner, is_served
from nfqproxy.errors import HostError, InputError, NfqproxyError
from nfqproxy.kernel import host_check, node_rules
from nfqproxy.kernel.counters import queue_statistics, rule_counters
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.routes import Routes
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import FrontendKey, FrontendPlan, NodeContext
from nfqproxy.sources.config import PRIMARY, ProxyConfig
from nfqproxy.sources.file import FileSource
from nfqproxy.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 2.0
"""Pause before a change that the kernel refused is tried again."""
# Any address of the Internet: asked only which of our addresses leads there.
_ANYWHERE = (ip_address("192.0.2.254").packed, ip_address("2001:db8::fe").packed)


def rule_settings(config: ProxyConfig) -> RuleSettings:
    """The bootstrap rules that a configuration asks for."""
    return RuleSettings(
        mode=RuleMode(config.mode),
        first_queue=config.first_queue,
        queue_count=config.workers,
        iptables=IptablesBackend(config.iptables),
    )


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal asked for the end while the program was starting."""


class App:
    """One running proxy."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._rules = rule_settings(config)
        self._node_name = config.hostname_override or socket.gethostname().lower()
        self._source = FileSource([Path(path) for path in config.manifests])
        self._table = ServiceTable(self._node_name)
        self._node = NodeContext(node_name=self._node_name)
        self._kernel = KernelTable(self._rules)
        self._supervisor = Supervisor(self)
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._is_behind = asyncio.Event()
        self._wanted: dict[FrontendKey, FrontendPlan] = {}

    # What the supervisor needs of the kernel's sets and maps.
    def restore(self) -> None:
        """Put back rules that somebody took away; the next sync replaces sets and maps as a whole."""
        node_rules.apply(self._rules)
        self._kernel.forget()

    def sync(self, plans: Mapping[FrontendKey, FrontendPlan]) -> object:
        """Make sets and fallback maps follow ``plans``."""
        return self._kernel.sync(plans, self._node)

    async def run(self, *, once: bool) -> None:
        """Run until SIGTERM or SIGINT, or with ``once`` program the kernel and return."""
        if os.geteuid() != 0:
            raise HostError("programming the kernel needs root; run as root (sudo nfqproxy run)")
        if not self._config.manifests:
            raise InputError("no Services to serve; give a file or directory with --manifests")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        # From the first moment: a reload that comes during the start is done after it, not fatal.
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        with admin.listen() as listener:
            plans = self._wanted = self._plans(self._source.load())
            await asyncio.to_thread(host_check.check_host, self._rules)
            self._raise_if_stopped()
            if once:
                await self._program(plans)
                log.info("the kernel serves %d frontends by its fallback", len(plans))
                return
            try:
                await self._start_workers(plans)
                self._raise_if_stopped()
                await self._program(plans)
                await self._serve(listener, loop)
            finally:
                # A second Ctrl-C must not cut this short: it is what keeps packets from being lost.
                await asyncio.shield(self._supervisor.stop_workers())
        log.info("stopped; rules and fallback stay and serve, nfqproxy cleanup removes them")

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    async def _start_workers(self, plans: dict[FrontendKey, FrontendPlan]) -> None:
        config = self._config
        await self._until_stopped(
            self._supervisor.start_workers(
                [
                    channel.Configure(
                        queue=config.first_queue + index,
                        reader=config.reader,
                        queue_length=config.queue_length,
                        seed=None if config.seed is None else config.seed + index,
                        cluster_cidrs=config.cluster_cidrs,
                    )
                    for index in range(config.workers)
                ],
                plans,
            )
        )

    async def _until_stopped(self, work: Awaitable[T]) -> T:
        """Await ``work``, or cancel it and raise Interrupted when a signal asks for the end."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Interrupted
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, NfqproxyError):
                    await task

    async def _program(self, plans: dict[FrontendKey, FrontendPlan]) -> None:
        """Put rules, sets and maps on the node; takes what it made back when it fails."""
        had_rules = bool(await asyncio.to_thread(rule_counters))
        try:
            await asyncio.to_thread(node_rules.apply, self._rules)
            await self._supervisor.publish(plans)
        except NfqproxyError:
            if not had_rules:
                await asyncio.to_thread(node_rules.cleanup)
            raise

    async def _serve(self, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        server = await admin.serve(listener, {"status": self._status})
        tasks = [
            loop.create_task(self._follow(), name="follow-source"),
            loop.create_task(self._reload_on_hangup(), name="reload"),
            loop.create_task(self._catch_up(), name="catch-up"),
        ]
        log.info(
            "serving %d frontends on node %s, mode %s, %d worker(s), queue %d",
            len(self._supervisor.plans),
            self._node_name,
            self._config.mode,
            self._config.workers,
            self._config.first_queue,
        )
        stop = loop.create_task(self._stop.wait(), name="stop")
        try:
            # All of these end only by failing: then the proxy ends, and the fallback serves.
            watched = (*tasks, *self._supervisor.keepers)
            done, _ = await asyncio.wait({*watched, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                if not self._stop.is_set():
                    task.result()
        finally:
            self._stop.set()
            for task in (*tasks, stop):
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)
            server.close()

    async def _follow(self) -> None:
        async for objects in self._source.changes(self._stop):
            self._wanted = self._plans(objects)
            await self._publish()

    async def _reload_on_hangup(self) -> None:
        """SIGHUP: read the manifests, and put everything into the kernel anew whatever it holds."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            objects = await self._source.reload()
            if objects is not None:
                self._wanted = self._plans(objects)
            await self._publish(anew=True)

    async def _catch_up(self) -> None:
        """Try a change that the kernel did not take again and again: no other may ever come.

        With the rules anew, for what it lacks may be a set or table that somebody removed.
        """
        while True:
            await self._is_behind.wait()
            await asyncio.sleep(_RETRY_S)
            await self._publish(anew=True)

    async def _publish(self, *, anew: bool = False) -> None:
        try:
            changed = await self._supervisor.publish(self._wanted, anew=anew)
        except NfqproxyError as error:
            log.error("the kernel did not take a change: %s; trying again in %g s", error, _RETRY_S)
            self._is_behind.set()
            return
        self._is_behind.clear()
        if changed:
            log.info("revision %d", self._supervisor.revision)

    def _plans(self, objects: Objects) -> dict[FrontendKey, FrontendPlan]:
        """Service table and plans of the present objects; only frontends that somebody is served by."""
        self._table.replace(objects)
        self._node = self._node_context(objects)
        overlay = self._config.mode == "overlay"
        ports = [
            port
            for port in self._table.ports.values()
            if port.steered or not overlay or self._config.steer_all
        ]
        plans = Planner(self._node).plans(ports)
        return {key: plan for key, plan in plans.items() if is_served(plan)}

    def _node_context(self, objects: Objects) -> NodeContext:
        config = self._config
        facts = node_facts(objects, self._node_name, config.node_addresses)
        if not facts.primary_addresses:
            facts = node_facts(objects, self._node_name, _own_addresses())
        context = node_context(
            facts, cluster_cidrs=config.cluster_cidrs, masquerade_all=config.masquerade_all
        )
        if config.node_port_addresses == PRIMARY:
            return context
        return msgspec.structs.replace(context, node_port_addresses=config.node_port_addresses)

    async def _status(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        ready = [worker for worker in self._supervisor.workers if worker.is_ready]
        await asyncio.gather(*(worker.fresh_stats(1.0) for worker in ready))
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mode": self._config.mode,
            "node": self._node_name,
            "node_port_addresses": list(self._node.node_port_addresses),
            "source_error": self._source.last_error,
            **self._supervisor.status(queue_statistics),
        }


def _own_addresses() -> list[str]:
    """The address of each family with which this node would speak to the outside."""
    routes = Routes()
    try:
        found = [routes.masquerade_source(anywhere) for anywhere in _ANYWHERE]
    finally:
        routes.close()
    return [str(ip_address(packed)) for packed in found if packed]
