"""Requests to the API server: bytes in, bytes out.

The official package's asyncio client finds server, certificates and credentials (kubeconfig with tokens,
client certificates and exec plugins; the service account of a pod) and brings the HTTP session. Its models
are not used: they take many times the time and memory of what is read here.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import msgspec

from nfqproxy import __version__
from nfqproxy.errors import InputError, NfqproxyError

log = logging.getLogger(__name__)

_KEEPALIVE = (
    # A peer that is gone without a word is noticed within a minute, whatever time-out HTTP has.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
_MOST_OF_AN_ANSWER = 64 * 1024
"""Bytes of a refusal that are read for its message."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """How the API server is reached."""

    kubeconfig: str = ""
    """Path of a kubeconfig file; empty: the service account of the pod this process runs in."""


class TimeOuts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. Silence is what they measure: a long list that keeps coming is let come."""

    connect_s: float = 10.0
    answer_s: float = 60.0
    """Without a byte of an answer."""
    watch_s: float = 150.0
    """Without a byte of a watch: servers write a bookmark about once a minute."""
    refresh_s: float = 60.0
    """Age at which credentials are read again before the next request."""
    plugin_s: float = 60.0
    """Within this an exec plugin must have given credentials."""


class ApiServerError(NfqproxyError):
    """The API server refused, failed or was not reached."""

    def __init__(
        self,
        problem: str,
        *,
        status: int = 0,
        reason: str = "",
        retry_after_s: float = 0.0,
        is_silence: bool = False,
        is_unreached: bool = False,
    ) -> None:
        super().__init__(problem)
        self.is_silence = is_silence
        """Whether nothing has come for the time that was given."""
        self.is_unreached = is_unreached
        """Whether there was not even a connection."""
        self.status = status
        """HTTP status; 0: there was no answer."""
        self.reason = reason
        self.retry_after_s = retry_after_s
        """What the server asks to wait, 0 if it does not."""

    @property
    def is_gone(self) -> bool:
        """Whether the state that was asked for is no longer to be had (410)."""
        return self.status == 410 or self.reason in ("Expired", "Gone")


class _Details(msgspec.Struct, frozen=True, rename="camel"):
    retry_after_seconds: int | None = None


class Status(msgspec.Struct, frozen=True):
    """metav1.Status: how the API server says no."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: _Details | None = None

    def error(self, what: str, status: int = 0, retry_after_s: float = 0.0) -> ApiServerError:
        """As an error of doing ``what``; ``status`` and ``retry_after_s``: what HTTP says."""
        code = self.code or status
        asked = self.details.retry_after_seconds if self.details else None
        message = (self.message or self.reason or "no reason given").strip().rstrip(".")
        advice = {
            401: "; check the credentials",
            403: "; grant it (docs/kubernetes.md lists what is needed)",
        }.get(code, "")
        return ApiServerError(
            f"the API server answers {code} when asked to {what}: {message}{advice}",
            status=code,
            reason=self.reason or "",
            retry_after_s=float(asked or retry_after_s),
        )


class ApiServer:
    """One API server, over one HTTP session. Use :meth:`open` first and :meth:`close` at the end."""

    def __init__(self, access: Access, time_outs: TimeOuts) -> None:
        self._access = access
        self._time_outs = time_outs
        # Of the package: kubernetes.aio.client.ApiClient.
        self._client: Any = None
        # The one before, whose watches last for some minutes yet.
        self._former: Any = None
        self._transport: tuple[object, ...] = ()
        self._read_at_s = 0.0
        self._is_stale = False
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Read the configuration; raises InputError if it cannot be used. Asks the server nothing."""
        await self._read()

    async def close(self) -> None:
        """Close the session and with it all that is under way."""
        for client in (self._client, self._former):
            if client is not None:
                await client.close()

    def forget_credentials(self) -> None:
        """Read them again before the next request."""
        self._is_stale = True

    async def get(self, path: str, query: Mapping[str, str], what: str) -> bytes:
        """The body of a 200; raises ApiServerError that says ``what`` was asked for."""
        return await self._whole("GET", path, query, what)

    async def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, object],
        what: str,
        *,
        content_type: str = "application/json",
    ) -> bytes:
        """POST or PATCH; the answer's body. Raises ApiServerError."""
        return await self._whole(method, path, {}, what, body, content_type)

    async def _whole(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        what: str,
        body: Mapping[str, object] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        idle_s = self._time_outs.answer_s
        with self._plain_errors():
            response = await self._request(method, path, query, idle_s, body, content_type)
            async with response:
                if not 200 <= response.status < 300:
                    await self._refuse(response, what)
                data: bytes = await response.read()
                return data

    @contextlib.asynccontextmanager
    async def watch(
        self, path: str, query: Mapping[str, str], what: str
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """The lines of a watch, until the server ends it; raises ApiServerError, the lines too.

        The last line is left out if it has no end: it was cut off.
        """
        with self._plain_errors():
            # A server begins its answer at once, however long there is nothing to tell.
            async with asyncio.timeout(self._time_outs.answer_s):
                response = await self._request("GET", path, query, self._time_outs.watch_s)
        try:
            if response.status != 200:
                with self._plain_errors():
                    await self._refuse(response, what)
            _keep_alive(response)
            async with contextlib.aclosing(self._lines(response)) as lines:
                yield lines
        finally:
            response.close()

    async def _lines(self, response: Any) -> AsyncGenerator[bytes, None]:
        parts: list[bytes] = []
        with self._plain_errors():
            async for chunk in response.content.iter_any():
                *ended, rest = chunk.split(b"\n")
                if ended:
                    parts.append(ended[0])
                    ended[0] = b"".join(parts)
                    parts.clear()
                    for line in ended:
                        if line:
                            yield line
                if rest:
                    parts.append(rest)

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        idle_s: float,
        body: Mapping[str, object] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        import aiohttp

        await self._refresh()
        client = self._client
        method, url, headers, *_ = await client.param_serialize(
            method,
            path,
            header_params={"Accept": "application/json", "Content-Type": content_type},
            auth_settings=["BearerToken"],
        )
        time_out = aiohttp.ClientTimeout(
            total=None, sock_connect=self._time_outs.connect_s, sock_read=idle_s
        )
        if query:
            url += "?" + urlencode(query)
        answer = await client.call_api(method, url, headers, body, _request_timeout=time_out)
        return answer.response

    async def _refuse(self, response: Any, what: str) -> NoReturn:
        if response.status == 401:
            self.forget_credentials()
        with contextlib.suppress(ValueError):
            data = await response.content.read(_MOST_OF_AN_ANSWER)
            raise msgspec.json.decode(data, type=Status).error(
                what, response.status, _seconds(response.headers.get("Retry-After", ""))
            )
        raise Status(message=response.reason).error(
            what, response.status, _seconds(response.headers.get("Retry-After", ""))
        )

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """What can go wrong between here and the server, as ApiServerError."""
        import aiohttp

        try:
            yield
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            host = self._client.configuration.host
            if isinstance(error, aiohttp.ClientSSLError):
                self.forget_credentials()  # its certificate may be another by now, and so may ours
            is_silence = isinstance(error, TimeoutError)
            problem = "it is silent" if is_silence else str(error) or repr(error)
            is_unreached = isinstance(error, aiohttp.ClientConnectorError)
            if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
                problem = os.strerror(error.os_error.errno)
            elif isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
                problem = "the connection was cut"
            raise ApiServerError(
                f"the API server {host} does not answer: {problem}",
                is_silence=is_silence,
                is_unreached=is_unreached,
            ) from error

    async def _refresh(self) -> None:
        """Before a request: read credentials again that are old or were refused."""
        age_s = time.monotonic() - self._read_at_s
        if not self._is_stale and age_s < self._time_outs.refresh_s:
            return
        async with self._lock:
            if not self._is_stale and time.monotonic() - self._read_at_s < age_s:
                return  # another request has done it
            try:
                await self._read()
            except InputError as error:
                log.error("%s; what was read before stays in use", error)
                self._read_at_s = time.monotonic()
                self._is_stale = False

    async def _read(self) -> None:
        """Take configuration and credentials from where they lie; a new session only if it must be."""
        from kubernetes.aio.client import ApiClient, Configuration

        configuration = Configuration()
        try:
            await asyncio.wait_for(self._load(configuration), self._time_outs.plugin_s)
            transport = _transport(configuration)
            if self._client is None or transport != self._transport:
                new = ApiClient(configuration)
                new.user_agent = f"nfqproxy/{__version__}"
                oldest, self._former, self._client = self._former, self._client, new
                self._transport = transport
                if oldest is not None:
                    await oldest.close()
            else:
                self._client.configuration.api_key = configuration.api_key
        except InputError:
            raise
        # The package raises whatever its look into a strange file comes to.
        except Exception as error:
            problem = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            if self._access.kubeconfig:
                raise InputError(
                    f"{self._access.kubeconfig}: cannot be used as a kubeconfig: {problem};"
                    " kubectl --kubeconfig with it shows whether it is one"
                ) from error
            raise InputError(
                f"--in-cluster: {problem}; that works in a pod with a service account,"
                " elsewhere give --kubeconfig FILE"
            ) from error
        self._read_at_s = time.monotonic()
        self._is_stale = False

    async def _load(self, configuration: Any) -> None:
        from kubernetes.aio import config

        if not self._access.kubeconfig:
            config.load_incluster_config(configuration, try_refresh_token=False)
            return
        path = Path(self._access.kubeconfig).expanduser()
        try:
            path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: the kubeconfig cannot be read: {error.strerror};"
                " give another with --kubeconfig"
            ) from error
        await config.load_kube_config(
            str(path), client_configuration=configuration, persist_config=False
        )


def _transport(configuration: Any) -> tuple[object, ...]:
    """What a session is made of; certificates by what the files are now."""
    files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    return (
        configuration.host,
        configuration.verify_ssl,
        configuration.tls_server_name,
        configuration.proxy,
        *((name, _identity(name)) for name in files if name),
    )


def _identity(file: str) -> tuple[int, int, int]:
    status = Path(file).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _seconds(text: str) -> float:
    """Retry-After in seconds; its other form, a date, counts as not given."""
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def _keep_alive(response: Any) -> None:
    connection = response.connection
    transport = connection.transport if connection is not None else None
    own = transport.get_extra_info("socket") if transport is not None else None
    if own is not None and own.family in (socket.AF_INET, socket.AF_INET6):
        for option in _KEEPALIVE:
            own.setsockopt(*option)
