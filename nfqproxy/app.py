"""The composition root: builds the parts, decides the order of starting and stopping.

Start: read everything that can be wrong (manifests, host), start workers and let them bind their queues,
and only then touch rules and sets. So a start that fails has changed nothing. Stop: the workers leave their queues
without losing a packet; rules, sets and the fallback stay and serve (``cleanup`` removes them).
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from nfqproxy import __version__
from nfqproxy.api import admin, channel
from nfqproxy.control.cluster import ClusterDiff, ClusterState
from nfqproxy.control.node import NonPodBackends, detector_gap, node_context
from nfqproxy.control.objects import Objects
from nfqproxy.core.health_ports import HealthPort, health_ports
from nfqproxy.core.plan_table import PlanChange, PlanTable
from nfqproxy.core.plans import steered_ports
from nfqproxy.errors import InputError, NfqproxyError
from nfqproxy.kernel import host_check, iptables, node_rules
from nfqproxy.kernel.affinity_file import store_path
from nfqproxy.kernel.capabilities import require_network_rights
from nfqproxy.kernel.counters import queue_statistics, rule_counters
from nfqproxy.kernel.kernel_table import KernelTable
from nfqproxy.kernel.mark_map import MarkMap
from nfqproxy.kernel.mark_users import conflict, mark_users
from nfqproxy.kernel.routes import Routes
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import DataPath, FrontendKey, FrontendPlan, NodeContext, ServicePort
from nfqproxy.sources.base import Source
from nfqproxy.sources.config import ProxyConfig
from nfqproxy.sources.file import FileSource
from nfqproxy.sources.iptables.source import IptablesSaveSource
from nfqproxy.sources.iptables.text import Dump
from nfqproxy.supervisor.affinity_store import AffinityStore
from nfqproxy.supervisor.health_ports import HealthPorts
from nfqproxy.supervisor.reconciler import Reconciler, SweepReport
from nfqproxy.supervisor.supervisor import Supervisor
from nfqproxy.supervisor.sync_health import SyncHealth

if TYPE_CHECKING:
    from nfqproxy.core.explain import Explainer

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 2.0
"""Pause before a change that the kernel refused is tried again."""
_KUBE_PROXY_TABLES = ("nat", "filter")
# Any address of the Internet: asked only which of our addresses leads there.
_ANYWHERE = (ip_address("192.0.2.254").packed, ip_address("2001:db8::fe").packed)


def rule_settings(config: ProxyConfig) -> RuleSettings:
    """The bootstrap rules that a configuration asks for."""
    # Of the names in detectLocal only that of the detector in use counts.
    detector = node_context(Objects(), config.node_settings("")).pod_detector
    return RuleSettings(
        mode=RuleMode(config.mode),
        data_path=DataPath(config.data_path),
        mark_mask=config.mark_mask,
        first_queue=config.first_queue,
        queue_count=config.workers,
        iptables=IptablesBackend(config.iptables),
        localhost_node_ports=config.localhost_node_ports,
        bridge_interface=detector.bridge_interface,
        interface_name_prefix=detector.interface_name_prefix,
    )


def kube_proxy_rules(wanted: IptablesBackend) -> Callable[[], list[Dump]]:
    """What reads those tables of this node in which kube-proxy has rules, as iptables-save prints them.

    With AUTO it goes by the back end that has them, which is looked for once.
    """
    known: IptablesBackend | None = None

    def read() -> list[Dump]:
        nonlocal known
        backend = known or iptables.choose_backend(wanted)
        dumps = [Dump(*each) for each in iptables.saved(backend, _KUBE_PROXY_TABLES)]
        known = backend if any("KUBE-SERVICES" in dump.text for dump in dumps) else None
        return dumps

    return read


def source_of(config: ProxyConfig, node_name: str) -> Source:
    """Where the Services of a configuration come from."""
    if not (config.kubeconfig or config.in_cluster):
        return file_source_of(config, node_name)
    # Here: who reads manifests need not load it.
    from nfqproxy.sources.kubernetes.client import Access
    from nfqproxy.sources.kubernetes.source import KubernetesSource

    return KubernetesSource(
        Access(kubeconfig=config.kubeconfig),
        node_name=node_name,
        # Only there the pod networks of other nodes are looked at, and only if nothing else tells them.
        all_nodes=config.masquerade_non_pod_backends == NonPodBackends.ALWAYS
        and not config.cluster_cidr,
    )


def file_source_of(config: ProxyConfig, node_name: str) -> FileSource | IptablesSaveSource:
    """The same of a configuration that names files or the node's own rules, which can be read at once."""
    if not config.iptables_save:
        return FileSource([Path(path) for path in config.manifests])
    if config.mode == "overlay" and not config.steer_all:
        raise InputError(
            "kube-proxy's rules hold no labels, so in overlay mode no Service is chosen by them; give"
            " --steer-all"
        )
    return IptablesSaveSource(
        config,
        kube_proxy_rules(IptablesBackend(config.iptables)),
        node_name=node_name,
    )


def _settle_memory() -> None:
    """Let the collector look only at what is made from now on, not at the tables there are."""
    gc.freeze()
    gc.enable()


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal asked for the end while the program was starting."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What workers and kernel shall follow."""

    node: NodeContext
    ports: tuple[ServicePort, ...] = ()
    """The service ports that are this proxy's business."""
    plans: Mapping[FrontendKey, FrontendPlan] = {}
    altered: frozenset[FrontendKey] = frozenset()
    """The only keys whose plans can differ from what workers and kernel follow."""


class App:
    """One running proxy."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._rules = rule_settings(config)
        self._shared_seed = secrets.randbits(63) if config.seed is None else config.seed
        self._node_name = config.hostname_override or socket.gethostname().lower()
        self._settings = config.node_settings(self._node_name)
        self._source = source_of(config, self._node_name)
        self._cluster = ClusterState(self._node_name)
        self._plans = PlanTable(self._settings)
        self._routes: Routes
        # Family's address of _ANYWHERE -> the last address with which this node spoke outside.
        self._outward: dict[bytes, bytes] = {}
        self._wanted = self._published = Wanted(node=NodeContext(node_name=self._node_name))
        self._detector_gap: str | None = None
        self._kernel = KernelTable(self._rules)
        self._affinities = AffinityStore(store_path())
        marks = self._rules.marks
        self._marks = None if marks is None else MarkMap(marks, self._rules.families)
        self._supervisor = Supervisor(self, self._affinities, self._marks)
        self._reconciler = Reconciler(self._kernel.forget_flows)
        self._sync_health = SyncHealth(time.monotonic)
        self._health_ports = HealthPorts(
            lambda: self._sync_health.is_healthy, self._warn_of_health_port
        )
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._is_behind = asyncio.Event()
        self._has_other_addresses = asyncio.Event()

    # What the supervisor needs of the kernel's sets and maps.
    def restore(self) -> None:
        """Put back rules that somebody took away; the next sync replaces sets and maps as a whole."""
        node_rules.apply(self._rules)
        self._kernel.forget()
        if self._marks is not None:
            self._marks.forget()

    def sync(
        self,
        plans: Mapping[FrontendKey, FrontendPlan],
        node: NodeContext,
        altered: Collection[FrontendKey] | None,
    ) -> object:
        """Make sets and fallback maps follow ``plans`` and ``node``."""
        return self._kernel.sync(plans, node, altered)

    async def run(self, *, once: bool) -> None:
        """Run until SIGTERM or SIGINT, or with ``once`` program the kernel and return."""
        require_network_rights("programming the kernel")
        if not self._config.has_source:
            raise InputError(
                "no Services to serve; give a file or directory with --manifests, the Kubernetes API"
                " with --kubeconfig or --in-cluster, or kube-proxy's rules with --iptables-save"
            )
        # Nothing of what is made now goes again, so the collector would walk it over and over in vain.
        gc.disable()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        # From the first moment: a reload that comes during the start is done after it, not fatal.
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        with admin.listen() as listener, contextlib.closing(Routes()) as self._routes:
            try:
                objects, rules, had_rules = await self._prepare(once=once)
                await self._program(objects, rules, had_rules=had_rules)
                if once:
                    count = len(self._wanted.plans)
                    log.info("the kernel serves %d frontends by its fallback", count)
                    return
                await self._supervisor.wait_ready()
                _settle_memory()
                await asyncio.to_thread(self._warn_of_mark_users)
                await self._serve(listener, loop)
            finally:
                # A second Ctrl-C must not cut this short: it is what keeps packets from being lost.
                await asyncio.shield(self._supervisor.stop_workers())
                self._affinities.close()
                await self._source.close()
        log.info("stopped; rules and fallback stay and serve, nfqproxy cleanup removes them")

    def _warn_of_mark_users(self) -> None:
        mask = self._rules.marks
        if mask is None:
            return
        try:
            found = conflict(mark_users(), mask)
        except NfqproxyError as error:
            log.warning("who else uses packet marks could not be found out: %s", error)
            return
        if found is not None:
            log.warning(
                "bits of markMask %#x are used in %s: %s; nfqproxy doctor --data-path mark says which"
                " are free",
                mask.mask,
                found.where,
                found.rule,
            )

    def reconcile(self, *, dry_run: bool) -> SweepReport:
        """Hold connection tracking against the manifests once, without a running proxy."""
        require_network_rights("reading connection tracking")
        if not self._config.has_source:
            raise InputError(
                "no Services to compare with; give a file or directory with --manifests"
            )
        with contextlib.closing(Routes()) as self._routes:
            self._start_with(asyncio.run(self._read_once()))
        self._reconciler.follow(self._wanted.ports, self._wanted.node)
        return self._reconciler.sweep(dry_run=dry_run)

    async def _read_once(self) -> Objects:
        try:
            return await self._source.start()
        finally:
            await self._source.close()

    def _warn_of_health_port(self, port: HealthPort, sentence: str) -> None:
        self._source.warn(
            port.namespace,
            port.service,
            "FailedToStartServiceHealthcheck",
            f"node {self._node_name}: {sentence}",
        )

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    async def _prepare(self, *, once: bool) -> tuple[Objects, RuleSettings, bool]:
        """Do all that can go wrong and changes nothing, at a time what does not need each other.

        Returns the objects, the rules for this host and whether it has some of ours already.
        """
        loop = asyncio.get_running_loop()
        check = loop.run_in_executor(None, self._check_host)
        try:
            if not once:
                await self._supervisor.launch_workers(self._configures())
            objects = await self._until_stopped(self._source.start())
            rules, had_rules = await check
            self._raise_if_stopped()
            if not once:
                await self._until_stopped(self._supervisor.bind_workers())
                self._raise_if_stopped()
                self._affinities.open(time.clock_gettime(time.CLOCK_BOOTTIME))
            return objects, rules, had_rules
        finally:
            # The check cannot be cut short; of two faults one is told.
            await asyncio.gather(check, return_exceptions=True)

    def _check_host(self) -> tuple[RuleSettings, bool]:
        backend = host_check.check_host(self._rules)
        return msgspec.structs.replace(self._rules, iptables=backend), bool(rule_counters())

    def _configures(self) -> list[channel.Configure]:
        config = self._config
        return [
            channel.Configure(
                queue=config.first_queue + index,
                reader=config.reader,
                queue_length=config.queue_length,
                seed=None if config.seed is None else config.seed + index,
                shared_seed=self._shared_seed,
                mark_mask=None if self._marks is None else config.mark_mask,
            )
            for index in range(config.workers)
        ]

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

    async def _program(self, objects: Objects, rules: RuleSettings, *, had_rules: bool) -> None:
        """Put rules, sets and maps on the node; takes what it made back when it fails.

        The kernel's tools are at work while the plans are made, the workers while the sets are filled:
        until a worker decides, its queue lets everything pass.
        """
        loop = asyncio.get_running_loop()
        applied = loop.run_in_executor(None, node_rules.apply, rules)
        try:
            self._start_with(objects)
            self._supervisor.feed_workers(self._wanted.plans, self._wanted.node)
            await applied
            await self._supervisor.publish(self._wanted.plans, self._wanted.node)
        except Exception:
            await asyncio.gather(applied, return_exceptions=True)
            if not had_rules:
                await asyncio.to_thread(node_rules.cleanup)
            raise

    async def _serve(self, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        await self._follow_published(self._wanted)
        server = await admin.serve(
            listener,
            {
                "status": self._status,
                "explain": self._explain,
                "reconcile": self._answer_reconcile,
            },
        )
        tasks = [
            loop.create_task(self._follow(), name="follow-source"),
            loop.create_task(self._follow_addresses(), name="follow-addresses"),
            loop.create_task(self._reload_on_hangup(), name="reload"),
            loop.create_task(self._catch_up(), name="catch-up"),
            loop.create_task(self._reconciler.run(), name="reconcile"),
            loop.create_task(self._health_ports.run(), name="health-ports"),
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
        loop.add_reader(self._routes.fileno(), self._on_routes)
        try:
            # All of these end only by failing: then the proxy ends, and the fallback serves.
            watched = (*tasks, *self._supervisor.keepers)
            done, _ = await asyncio.wait({*watched, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                if not self._stop.is_set():
                    task.result()
        finally:
            self._stop.set()
            loop.remove_reader(self._routes.fileno())
            for task in (*tasks, stop):
                task.cancel()
            await asyncio.gather(*tasks, stop, return_exceptions=True)
            server.close()
            await self._health_ports.close()

    async def _follow(self) -> None:
        async for change in self._source.changes(self._stop):
            self._take(self._cluster.apply(change))
            await self._publish()

    def _on_routes(self) -> None:
        if self._routes.changed():
            self._has_other_addresses.set()

    async def _follow_addresses(self) -> None:
        """Node ports are served on what the interfaces have now; no manifest need change for that."""
        while True:
            await self._has_other_addresses.wait()
            self._has_other_addresses.clear()
            try:
                node = self._node_context()
            except OSError as error:
                log.error("the node's addresses cannot be listed: %s; trying again", error)
                await asyncio.sleep(_RETRY_S)
                self._has_other_addresses.set()
                continue
            if node != self._wanted.node:
                log.info(
                    "node ports are served on %s", ", ".join(node.node_port_addresses) or "none"
                )
                self._want(node)
                await self._publish()

    async def _reload_on_hangup(self) -> None:
        """SIGHUP: read manifests or dumps, and put everything into the kernel anew whatever it holds."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self._take(self._cluster.apply(await self._source.reload()))
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
        number = self._sync_health.queued()
        wanted = self._wanted
        try:
            changed = await self._supervisor.publish(
                wanted.plans, wanted.node, altered=wanted.altered, anew=anew
            )
        except NfqproxyError as error:
            log.error("the kernel did not take a change: %s; trying again in %g s", error, _RETRY_S)
            self._is_behind.set()
            return
        self._is_behind.clear()
        self._sync_health.done(number)
        # Also when no plan has changed: which endpoints are local, ready or serving may have.
        await self._follow_published(wanted)
        if changed:
            log.info("revision %d", self._supervisor.revision)

    async def _follow_published(self, wanted: Wanted) -> None:
        """What follows service table and node only when workers and kernel do."""
        self._published = wanted
        self._reconciler.follow(wanted.ports, wanted.node)
        # In overlay mode kube-proxy has these listeners.
        own = () if self._config.mode == "overlay" else wanted.ports
        await self._health_ports.follow(health_ports(own, wanted.node))

    def _start_with(self, objects: Objects) -> None:
        """Want what these objects, all there are, say."""
        self._cluster.replace(objects)
        self._want(self._node_context())

    def _take(self, diff: ClusterDiff) -> None:
        """Want what the cluster's objects say after this change."""
        node = self._node_context() if diff.surroundings else self._wanted.node
        if node != self._wanted.node:
            self._want(node)
            return
        changed = [self._cluster.ports[name] for name in (*diff.ports.added, *diff.ports.changed)]
        self._want_plans(node, self._plans.apply(changed, diff.ports.removed))

    def _want(self, node: NodeContext) -> None:
        """Want the plans of the present service ports on this node."""
        gap = detector_gap(node, self._settings)
        if gap is not None and gap != self._detector_gap:
            log.warning("%s", gap)
        self._detector_gap = gap
        self._want_plans(node, self._plans.replace(self._cluster.ports.values(), node))

    def _want_plans(self, node: NodeContext, change: PlanChange) -> None:
        # What is wanted already but not yet followed stays to be done.
        behind = frozenset() if self._published is self._wanted else self._wanted.altered
        self._wanted = Wanted(
            node=node,
            ports=steered_ports(self._cluster.ports.values(), self._settings),
            plans=self._plans.plans.copy(),
            altered=behind.union(change.keys),
        )

    def _node_context(self) -> NodeContext:
        """The node as its objects and, where they are asked for, its interfaces say now."""
        objects = self._cluster.surroundings
        node = node_context(objects, self._settings)
        if self._settings.node_port_networks is None and node.primary_addresses:
            return node
        own = [address.address for address in self._routes.addresses()]
        return node_context(
            objects,
            self._settings,
            interface_addresses=[str(ip_address(packed)) for packed in own],
            outward_addresses=[str(ip_address(packed)) for packed in self._outward_addresses(own)],
        )

    def _outward_addresses(self, own: Sequence[bytes]) -> Iterable[bytes]:
        """Of each family the address with which this node speaks outside.

        While it has no route, the last one, if it is still an address of this node: a default route that
        is away for a moment must not take the node ports along.
        """
        for anywhere in _ANYWHERE:
            found = self._routes.masquerade_source(anywhere)
            if found:
                self._outward[anywhere] = found
            elif self._outward.get(anywhere) not in own:
                self._outward.pop(anywhere, None)
        return self._outward.values()

    async def _status(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        ready = [worker for worker in self._supervisor.workers if worker.is_ready]
        await asyncio.gather(*(worker.fresh_stats(1.0) for worker in ready))
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mode": self._config.mode,
            "data_path": self._config.data_path,
            "marks": None if self._marks is None else self._marks.status(),
            "node": self._node_name,
            "node_port_addresses": list(self._published.node.node_port_addresses),
            "source_error": self._source.last_error,
            "conntrack": self._reconciler.status(),
            "health_check_ports": self._health_ports.status(),
            **self._supervisor.status(queue_statistics),
        }

    async def _answer_reconcile(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        sweep = self._reconciler.reconcile(dry_run=bool(request.get("dry_run", False)))
        try:
            # Shielded: an asker that goes away must not make two sweeps run at once.
            return (await asyncio.shield(sweep)).document()
        except (NfqproxyError, OSError) as error:
            return {"error": f"reconciling connection tracking: {error}"}

    async def _explain(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``packets``: a list of {"from", "to"}; ``explanations`` in the same order."""
        # Here: a proxy that nobody asks need not load it at its start.
        from nfqproxy.core.explain import parse_packet

        routes = Routes()
        try:
            explainer = self._explainer(routes)
            explanations = [
                msgspec.to_builtins(explainer.explain(parse_packet(each["from"], each["to"])))
                for each in request["packets"]
            ]
        except (InputError, KeyError, TypeError, AttributeError) as error:
            return {"error": f"cannot explain that: {error}"}
        finally:
            routes.close()
        return {"explanations": explanations}

    def _explainer(self, routes: Routes) -> "Explainer":
        from nfqproxy.core.explain import Explainer

        def masquerade_source(backend: str) -> str | None:
            found = routes.masquerade_source(ip_address(backend).packed)
            return str(ip_address(found)) if found else None

        return Explainer(
            node=self._published.node,
            settings=self._settings,
            ports=self._cluster.ports.values(),
            plans=self._supervisor.plans,
            local_addresses=[str(ip_address(each.address)) for each in routes.addresses()],
            masquerade_source=masquerade_source,
        )
