"""The server: takes HTTP requests, decides who may, and answers from the store.

One asyncio event loop serves everything; start it in the network namespace it is to be reached in. Order
of a request: who it is (401), what it wants (404, 405), the faults that need no closer look (delay, 429,
500), whether it may (403), then the registry, the list or the watch.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from types import TracebackType
from typing import Self

from aiohttp import web

from nfqproxy.testing import control
from nfqproxy.testing.access import Access, Attributes
from nfqproxy.testing.certificates import Certificates
from nfqproxy.testing.discovery import document
from nfqproxy.testing.exchange import (
    PATCHES,
    Target,
    answer_json,
    answer_object,
    body_of,
    certificate_name,
    check_accept,
    gzipped,
    make_request,
    target_of,
    verb_of,
)
from nfqproxy.testing.faults import Fault, Faults
from nfqproxy.testing.listing import ListOptions, list_body, revision_of
from nfqproxy.testing.registry import Registry, kind_of
from nfqproxy.testing.resources import Resource
from nfqproxy.testing.settings import Settings
from nfqproxy.testing.slices import SecondSlices
from nfqproxy.testing.status import (
    ApiError,
    internal,
    too_large,
    too_many_requests,
    unsupported_media_type,
)
from nfqproxy.testing.store import Object, Store, Version
from nfqproxy.testing.watching import Watch, drop

__all__ = ["ApiServer"]

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 0.05
"""How long a connection that came at the very moment may hold up the closing. (To aiohttp 0 means: for ever.)"""
_ANSWER_FIRST_S = 0.01
"""How long a restart that a request asks for waits, so that the request is answered, seconds."""
_WRITES = ("create", "update", "patch", "delete")


class ApiServer:
    """A Kubernetes API server on one address; an asynchronous context manager."""

    def __init__(
        self,
        *,
        seed: int = 0,
        settings: Settings | None = None,
        access: Access | None = None,
        certificates: Certificates | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """``certificates``: for TLS; without them it is plain HTTP. Port 0: a free one, see :attr:`port`."""
        self.settings = settings or Settings()
        self.access = access or Access()
        self.certificates = certificates
        self.host = host
        self.port = port
        """Where it listens, once started; the same after a restart."""
        self.faults = Faults(seed)
        self.store = Store(history=self.settings.history)
        self.requests: Counter[tuple[str, str]] = Counter()
        """How many came, by verb and resource: ``("watch", "services")``. Of the refused only strangers' (401)
        do not count."""
        self.watches: Counter[str] = Counter()
        """How many watches are open, by resource."""
        self._chance = random.Random(f"{seed}/server")
        self._registry = Registry(self.store, self.settings, self._chance)
        self._second_slices = SecondSlices(self._registry, self.faults)
        self._runner: web.ServerRunner | None = None
        self._open: set[asyncio.Transport] = set()
        """Connections with a request that is being answered."""
        self._restarting: asyncio.Task[None] | None = None
        self._restart_lock = asyncio.Lock()

    @property
    def url(self) -> str:
        """``https://127.0.0.1:6443``, without a final slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificates else 'http'}://{host}:{self.port}"

    # Running

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; OSError if the address is taken."""
        server = web.Server(
            self._handle,
            request_factory=make_request,
            handler_cancellation=True,
            access_log=None,
        )
        runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(
                runner,
                self.host,
                self.port,
                ssl_context=self.certificates.server_context() if self.certificates else None,
                reuse_address=True,
            ).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Cut all connections and listen no more. The objects stay. Raises what a restart has failed of."""
        restarting, self._restarting = self._restarting, None
        if restarting is not None:
            restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await restarting
        await self._close()

    async def restart(self, *, is_compacted: bool = True, down_s: float = 0.0) -> None:
        """Go, stay away for so many seconds, come back on the same port; without history if so wanted."""
        async with self._restart_lock:
            await self._close()
            if is_compacted:
                self.store.reopen()
            await asyncio.sleep(down_s)
            await self.start()

    async def _close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for transport in tuple(self._open):
            transport.abort()
        await runner.cleanup()

    def restart_soon(self, *, is_compacted: bool = True, down_s: float = 0.0) -> None:
        """Begin a :meth:`restart` in a moment, answering who asks for it first; nothing if one is under way."""

        async def begin() -> None:
            await asyncio.sleep(_ANSWER_FIRST_S)
            await self.restart(is_compacted=is_compacted, down_s=down_s)

        if not self.is_restarting:
            self._restarting = asyncio.get_running_loop().create_task(
                begin(), name="restart of the API server"
            )

    @property
    def is_restarting(self) -> bool:
        """Whether a restart that a fault or :meth:`restart_soon` began is under way."""
        return self._restarting is not None and not self._restarting.done()

    # Objects, as a test writes them

    def vet(self, value: Object) -> None:
        """Raise the ApiError with which :meth:`apply` would refuse this manifest; writes nothing."""
        self._registry.vet(value)

    def apply(self, value: Object) -> None:
        """Write a manifest whole, status and all; no write if nothing differs. ApiError if it is refused."""
        revision = self.store.revision
        version = self._registry.apply(value)
        if self.store.revision != revision:
            self._written(kind_of(value), version)

    def discard(self, kind: str, name: str, namespace: str = "") -> None:
        """Delete an object, ``default`` being the namespace if none is given; ApiError if there is none."""
        if kind == "EndpointSlice":
            self._second_slices.withdraw(namespace or "default", name)
        self._registry.discard(kind, name, namespace)

    def settle(self) -> None:
        """Switch all faults off and take back what they have left in the state: the second slices.

        A restart that is under way comes to its end: see :attr:`is_restarting`.
        """
        self.faults.clear()
        self._second_slices.withdraw_all()

    def _written(self, resource: Resource, version: Version) -> None:
        if resource.kind == "EndpointSlice":
            self._second_slices.written(version)
        if self._runner is not None and self.faults.hits(Fault.RESTART, resource.plural):
            self.restart_soon()

    # Requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        if transport is not None:
            self._open.add(transport)
        try:
            return await self._answer(request)
        except ApiError as error:
            headers = (
                {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
            )
            return answer_json(error.status, status=error.code, headers=headers)
        except ConnectionError:
            return web.Response()  # for nobody: the client has gone
        except Exception as error:
            logger.exception("%s %s", request.method, request.path_qs)
            return answer_json(internal(str(error)).status, status=500)
        finally:
            if transport is not None:
                self._open.discard(transport)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        user = self.access.user(request.headers.get("Authorization", ""), certificate_name(request))
        told = document(request.path)
        if told is not None and request.method in ("GET", "HEAD"):
            return web.Response(text=told) if isinstance(told, str) else answer_json(told)
        check_accept(request)
        if request.path.startswith(control.PREFIX):
            body = await body_of(request) if request.can_read_body else {}
            return answer_json(control.carry_out(self, request.method, request.path, body))
        target = target_of(request.path)
        resource = target.resource
        options = ListOptions.parse(request.query, has_watch_list=self.settings.has_watch_list)
        verb = verb_of(request.method, target, options)
        plural = resource.plural + ("/status" if target.is_status else "")
        self.requests[verb, resource.plural] += 1
        if self.faults.hits(Fault.DELAY, resource.plural):
            await asyncio.sleep(self.faults.chance(Fault.DELAY).uniform(0, self.faults.delay_s))
        if self.faults.hits(Fault.TOO_MANY, resource.plural):
            raise too_many_requests(self.faults.retry_after_s)
        is_broken = self.faults.hits(Fault.INTERNAL, resource.plural)
        if is_broken and (verb not in _WRITES or self.faults.chance(Fault.INTERNAL).random() < 0.5):
            raise internal("a fault that was asked for")
        self.access.check(
            user,
            Attributes(
                verb=verb,
                group=resource.group,
                plural=plural,
                namespace=target.namespace,
                name=target.name,
            ),
        )
        if verb == "watch":
            return await self._watch(request, target, options)
        if verb == "list":
            return await self._list(request, target, options)
        if verb == "get":
            if options.resource_version not in ("", "0"):
                await self._fresh(revision_of(options.resource_version))
            return answer_object(
                resource, self._registry.read(resource, target.namespace, target.name)
            )
        answer = await self._write(request, target, verb)
        if is_broken:
            raise internal("a fault that was asked for, after the write")
        return answer

    async def _watch(
        self, request: web.BaseRequest, target: Target, options: ListOptions
    ) -> web.StreamResponse:
        watch = Watch(
            self.store,
            target.resource,
            target.namespace,
            options,
            settings=self.settings,
            faults=self.faults,
            chance=self._chance,
        )
        self.watches[target.resource.plural] += 1
        try:
            return await watch.run(request, self._fresh)
        finally:
            self.watches[target.resource.plural] -= 1

    async def _list(
        self, request: web.BaseRequest, target: Target, options: ListOptions
    ) -> web.StreamResponse:
        plural = target.resource.plural
        body = await list_body(
            self.store, target.resource, target.namespace, options, self.faults, self._fresh
        )
        headers = {"Content-Type": "application/json"}
        if len(body) >= self.settings.gzip_bytes and "gzip" in request.headers.get(
            "Accept-Encoding", ""
        ):
            # In a thread: tens of megabytes would hold up the watches.
            body = await asyncio.to_thread(gzipped, body)
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        if self.faults.hits(Fault.CUT_LIST, plural):
            headers["Content-Length"] = str(len(body))
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            chance = self.faults.chance(Fault.CUT_LIST)
            await response.write(body[: chance.randrange(len(body))])
            drop(request, chance.random() < 0.5)
            return response
        return web.Response(body=body, headers=headers)

    async def _write(self, request: web.BaseRequest, target: Target, verb: str) -> web.Response:
        resource, namespace, name = target.resource, target.namespace, target.name
        is_slice = resource.kind == "EndpointSlice"
        if verb == "delete":
            options = await body_of(request) if request.can_read_body else {}
            if is_slice:
                self._second_slices.withdraw(namespace, name)
            return answer_json(self._registry.delete(resource, namespace, name, options))
        is_made = False
        if verb == "create":
            version, is_made = (
                self._registry.create(resource, namespace, await body_of(request)),
                True,
            )
        elif verb == "update":
            version, is_made = self._registry.update(
                resource, namespace, name, await body_of(request), status=target.is_status
            )
        else:
            if request.content_type not in PATCHES:
                raise unsupported_media_type(PATCHES)
            version = self._registry.patch(
                resource,
                namespace,
                name,
                await body_of(request),
                merge=PATCHES[request.content_type],
                status=target.is_status,
            )
        self._written(resource, version)
        return answer_object(resource, version, status=201 if is_made else 200)

    async def _fresh(self, revision: int) -> None:
        """Wait until the store has come to a revision; ApiError (504) if that takes too long."""
        if revision <= self.store.revision:
            return
        wake = asyncio.Event()
        self.store.listeners.add(wake.set)
        try:
            async with asyncio.timeout(self.settings.fresh_wait_s):
                while self.store.revision < revision:
                    wake.clear()
                    await wake.wait()
        except TimeoutError:
            raise too_large(revision, self.store.revision) from None
        finally:
            self.store.listeners.discard(wake.set)
