"""Plain HTTP to an API server, and the few objects the contract is tried with."""

import base64
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
import yaml
from msgspec import Struct

from nfqproxy.testing import ApiServer

Object = dict[str, Any]

PREFIXES = {"endpointslices": "/apis/discovery.k8s.io/v1"}


class KubeConfig(Struct, frozen=True, kw_only=True):
    """What is needed of a kubeconfig: tokens and client certificates; no plugins."""

    url: str
    token: str = ""
    ssl: Any = None

    @classmethod
    def load(cls, path: Path) -> "KubeConfig":
        config = yaml.safe_load(path.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"])["user"]
        if {"exec", "auth-provider"} & set(user):
            raise ValueError(
                f"{path}: the user logs in by a plugin; give a kubeconfig with a token or a client certificate"
            )
        token = user.get("token", "")
        if "tokenFile" in user:
            token = Path(user["tokenFile"]).read_text().strip()
        tls = None
        if cluster["server"].startswith("https"):
            authority = _data(cluster, "certificate-authority")
            tls = ssl.create_default_context(cadata=authority.decode() if authority else None)
            if cluster.get("insecure-skip-tls-verify"):
                tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
            if certificate := _data(user, "client-certificate"):
                with tempfile.TemporaryDirectory() as directory:
                    pair = Path(directory, "pair.pem")
                    pair.write_bytes(certificate + b"\n" + _data(user, "client-key"))
                    tls.load_cert_chain(pair)
        return cls(url=cluster["server"], token=token, ssl=tls)


def _named(items: list[Object], name: str) -> Object:
    return next(item for item in items if item["name"] == name)


def _data(holder: Object, name: str) -> bytes:
    if text := holder.get(f"{name}-data"):
        return base64.b64decode(text)
    return Path(holder[name]).read_bytes() if name in holder else b""


class Answer(Struct, frozen=True):
    """An HTTP status and the JSON that came with it."""

    status: int
    body: Any


class Watch:
    """The events of one watch."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self, kind: str | None = None) -> Object:
        """The next event that is no bookmark, or the next of this type, passing over others."""
        async for event in self.events():
            if event["type"] == kind or (kind is None and event["type"] != "BOOKMARK"):
                return event
        raise AssertionError(f"the watch ended before {kind or 'an event'} came")

    async def events(self) -> AsyncIterator[Object]:
        """Up to the end of the watch."""
        async for line in self.lines():
            yield msgspec.json.decode(line)

    async def lines(self) -> AsyncIterator[bytes]:
        """As they come."""
        async for line in self._response.content:
            yield line


class Api:
    """A namespace on a server; asynchronous context manager that makes and removes it."""

    def __init__(self, config: KubeConfig, namespace: str, server: ApiServer | None) -> None:
        self._config = config
        self.namespace = namespace
        self.server = server
        """None: a real one."""

    async def __aenter__(self) -> Self:
        token = self._config.token
        self.session = aiohttp.ClientSession(
            self._config.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            connector=aiohttp.TCPConnector(ssl=self._config.ssl or True),
            # Lines of a watch may be long.
            read_bufsize=4 << 20,
        )
        made = await self.call("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        assert made.status == 201, made.body
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.server is None:
                await self.call("DELETE", f"/api/v1/namespaces/{self.namespace}")
        finally:
            await self.session.close()

    def path(self, plural: str, name: str = "", namespace: str | None = None) -> str:
        """Of the objects of this namespace, or of one of them; namespace "": of all."""
        inside = self.namespace if namespace is None else namespace
        parts = [
            PREFIXES.get(plural, "/api/v1"),
            *(("namespaces", inside) if inside else ()),
            plural,
        ]
        return "/".join([*parts, name] if name else parts)

    async def call(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        **query: str | int,
    ) -> Answer:
        """One request. Of the query an underscore at the end is left out (``continue_``)."""
        async with self.session.request(
            method,
            path.lstrip("/"),
            json=value,
            data=data,
            headers=headers,
            params={name.rstrip("_"): text for name, text in query.items()},
        ) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return Answer(response.status, msgspec.json.decode(text) if is_json else text)

    async def list(self, plural: str, namespace: str | None = None, **query: str | int) -> Object:
        """A list that must succeed."""
        answer = await self.call("GET", self.path(plural, namespace=namespace), **query)
        assert answer.status == 200, answer.body
        return answer.body

    @asynccontextmanager
    async def watch(
        self, plural: str, namespace: str | None = None, **query: str | int
    ) -> AsyncIterator[Watch]:
        """A watch that must begin; it ends by itself after a while."""
        given = {"timeoutSeconds": 30} | query | {"watch": 1}
        path = self.path(plural, namespace=namespace).lstrip("/")
        async with self.session.get(
            path, params=given, timeout=aiohttp.ClientTimeout(total=None, sock_read=40)
        ) as response:
            assert response.status == 200, await response.text()
            yield Watch(response)

    async def create(self, plural: str, value: Object) -> Object:
        """A POST that must succeed."""
        answer = await self.call("POST", self.path(plural), value)
        assert answer.status == 201, answer.body
        return answer.body

    async def put(self, plural: str, value: Object) -> Object:
        """A PUT that must succeed."""
        answer = await self.call("PUT", self.path(plural, value["metadata"]["name"]), value)
        assert answer.status == 200, answer.body
        return answer.body

    async def delete(self, plural: str, name: str) -> None:
        """A DELETE that must succeed."""
        answer = await self.call("DELETE", self.path(plural, name))
        assert answer.status == 200, answer.body


def service(name: str, **labels: str) -> Object:
    """A Service without selector: no controller of a real cluster makes slices for it."""
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    }


def endpoint_slice(name: str, *addresses: str, of: str = "web") -> Object:
    """A slice that no controller of a real cluster takes for its own."""
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [address]} for address in addresses],
    }


def names(found: Object) -> list[str]:
    """Of the items of a list."""
    return [item["metadata"]["name"] for item in found["items"]]


def version(found: Object) -> str:
    """resourceVersion of an object or a list."""
    return found["metadata"]["resourceVersion"]
