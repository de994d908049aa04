"""HTTP to what it asks of the API and back: paths, verbs, formats.

Sources: k8s.io/apiserver pkg/endpoints/request/requestinfo.go (what a path means).
"""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from nfqproxy.testing.listing import ListOptions
from nfqproxy.testing.patches import merge_patch, strategic_merge_patch
from nfqproxy.testing.resources import Resource, by_plural
from nfqproxy.testing.status import ApiError, bad_request, page_not_found, unsupported_media_type
from nfqproxy.testing.store import Object, Version

__all__ = [
    "PATCHES",
    "Target",
    "answer_json",
    "answer_object",
    "body_of",
    "certificate_name",
    "check_accept",
    "gzipped",
    "make_request",
    "target_of",
    "verb_of",
]

_BODY_BYTES = 3 * 1024 * 1024
"""The largest object that is taken, as by a real server."""
PATCHES: dict[str, Callable[[Object, Object], Object]] = {
    "application/merge-patch+json": merge_patch,
    "application/strategic-merge-patch+json": strategic_merge_patch,
}
"""How each kind of patch is merged, by content type."""


class Target(Struct, frozen=True, kw_only=True):
    """What a path names."""

    resource: Resource
    namespace: str
    name: str
    is_status: bool


def make_request(
    message: Any, payload: Any, protocol: Any, writer: Any, task: "asyncio.Task[None]"
) -> web.BaseRequest:
    """As aiohttp makes its requests, with room for a large object."""
    return web.BaseRequest(
        message,
        payload,
        protocol,
        writer,
        task,
        asyncio.get_running_loop(),
        client_max_size=_BODY_BYTES,
    )


def target_of(path: str) -> Target:
    """What a path names; ApiError (404) if it names nothing."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "v1"]:
        group, rest = "", parts[2:]
    elif parts[0] == "apis" and len(parts) > 2 and parts[2] == "v1":
        group, rest = parts[1], parts[3:]
    else:
        raise page_not_found()
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2 and rest[2] != "status":
        namespace, rest = rest[1], rest[2:]
    resource = by_plural.get((group, rest[0])) if rest else None
    if resource is None or len(rest) > 3 or (namespace and not resource.is_namespaced):
        raise page_not_found()
    name = rest[1] if len(rest) > 1 else ""
    is_status = len(rest) == 3
    if is_status and not (rest[2] == "status" and resource.has_status):
        raise page_not_found()
    if name and resource.is_namespaced and not namespace:
        raise page_not_found()
    return Target(resource=resource, namespace=namespace, name=name, is_status=is_status)


def verb_of(method: str, target: Target, options: ListOptions) -> str:
    """The verb as authorization knows it; ApiError (405) for none."""
    if method in ("GET", "HEAD"):
        if target.name:
            return "get"
        return "watch" if options.watch else "list"
    if (
        method == "POST"
        and not target.name
        and (target.namespace or not target.resource.is_namespaced)
    ):
        return "create"
    if target.name and method in ("PUT", "PATCH"):
        return "update" if method == "PUT" else "patch"
    if target.name and method == "DELETE" and not target.is_status:
        return "delete"
    raise ApiError(
        405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
    )


def check_accept(request: web.BaseRequest) -> None:
    """Raise ApiError (406) for a client that reads no plain JSON."""
    accept = request.headers.get("Accept", "*/*")
    kinds = [part.split(";")[0].strip() for part in accept.split(",")]
    plain = [part for part in accept.split(",") if "as=" not in part]
    if not any(kind in ("application/json", "application/*", "*/*") for kind in kinds) or not plain:
        raise ApiError(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        )


async def body_of(request: web.BaseRequest) -> Object:
    """The JSON object that was sent, empty if nothing was; ApiError (400, 415)."""
    if request.content_type not in ("application/json", *PATCHES, "application/octet-stream"):
        raise unsupported_media_type(["application/json"])
    data = await request.read()
    try:
        value = msgspec.json.decode(data) if data else {}
    except msgspec.MsgspecError as error:
        raise bad_request(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the body is no JSON object")
    return value


def certificate_name(request: web.BaseRequest) -> str:
    """The common name of the client's certificate; empty without one."""
    certificate = request.get_extra_info("peercert") or {}
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""


def answer_object(resource: Resource, version: Version, status: int = 200) -> web.Response:
    """One object with its kind."""
    return web.Response(
        body=version.whole(resource) + b"\n",
        status=status,
        headers={"Content-Type": "application/json"},
    )


def answer_json(
    value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Any value as JSON."""
    return web.Response(
        body=msgspec.json.encode(value) + b"\n",
        status=status,
        headers={"Content-Type": "application/json", **(headers or {})},
    )


def gzipped(body: bytes) -> bytes:
    """Compressed as Content-Encoding gzip."""
    # Level 1, as a real server: lists are large and read once.
    compressor = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()
