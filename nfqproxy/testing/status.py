"""Refusals as the API words them: an HTTP status and a ``Status`` object.

Sources: k8s.io/apimachinery pkg/api/errors and pkg/apis/meta/v1 (Status, StatusReason); storage
errors in k8s.io/apiserver pkg/storage (errors.go, etcd3/errors.go).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "ApiError",
    "already_exists",
    "bad_request",
    "conflict",
    "expired",
    "forbidden",
    "internal",
    "invalid",
    "not_found",
    "page_not_found",
    "success",
    "too_large",
    "too_many_requests",
    "unauthorized",
    "unsupported_media_type",
]

Object = dict[str, Any]


class ApiError(Exception):
    """A request is refused; :attr:`status` is the body of the answer."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        continue_token: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        """The HTTP status."""
        self.retry_after_s: int | None = (details or {}).get("retryAfterSeconds")
        """What the header Retry-After says, seconds; None: no header."""
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {"continue": continue_token} if continue_token else {},
            "status": "Failure",
            "message": message,
            **({"reason": reason} if reason else {}),
            **({"details": dict(details)} if details else {}),
            "code": code,
        }


def unsupported_media_type(accepted: Iterable[str]) -> ApiError:
    """415."""
    return ApiError(
        415,
        "UnsupportedMediaType",
        "the body of the request was in an unknown format - accepted media types include: "
        + ", ".join(accepted),
    )


def success(**details: str) -> Object:
    """The Status that answers a DELETE."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": details,
    }


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError(400, "BadRequest", message)


def unauthorized() -> ApiError:
    """401: no bearer token, or none that is known."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def forbidden(user: str, verb: str, plural: str, group: str, namespace: str, name: str) -> ApiError:
    """403: this user may not do this."""
    place = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    qualified = _qualified(plural, group)
    subject = f'{qualified} "{name}"' if name else qualified
    return ApiError(
        403,
        "Forbidden",
        f'{subject} is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group "{group}" {place}',
        details=_details(name, group, plural),
    )


def not_found(plural: str, group: str, name: str) -> ApiError:
    """404 for an object."""
    return ApiError(
        404,
        "NotFound",
        f'{_qualified(plural, group)} "{name}" not found',
        details=_details(name, group, plural),
    )


def page_not_found() -> ApiError:
    """404 for a path that no resource has."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", details={})


def already_exists(plural: str, group: str, name: str) -> ApiError:
    """409 for the creation of what is there."""
    return ApiError(
        409,
        "AlreadyExists",
        f'{_qualified(plural, group)} "{name}" already exists',
        details=_details(name, group, plural),
    )


def conflict(plural: str, group: str, name: str, why: str) -> ApiError:
    """409: the object has changed, or is another one by now."""
    return ApiError(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {_qualified(plural, group)} "{name}": {why}',
        details=_details(name, group, plural),
    )


def invalid(kind: str, group: str, name: str, causes: Sequence[tuple[str, str, str]]) -> ApiError:
    """422; each cause is a field, a reason such as FieldValueRequired, and a sentence."""
    told = ", ".join(f"{field}: {sentence}" for field, _, sentence in causes)
    return ApiError(
        422,
        "Invalid",
        f'{_qualified(kind, group)} "{name}" is invalid: {told}',
        details={
            **_details(name, group, kind),
            "causes": [
                {"reason": reason, "message": sentence, "field": field}
                for field, reason, sentence in causes
            ],
        },
    )


def expired(message: str, continue_token: str = "") -> ApiError:
    """410: that much history is no longer kept."""
    return ApiError(410, "Expired", message, continue_token=continue_token)


def too_large(wanted: int, current: int) -> ApiError:
    """504: a version that has not come yet was asked for."""
    return ApiError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {wanted}, current: {current}",
        details={
            "causes": [
                {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            ],
            "retryAfterSeconds": 1,
        },
    )


def too_many_requests(retry_after_s: int) -> ApiError:
    """429, with Retry-After."""
    return ApiError(
        429,
        "TooManyRequests",
        "Too many requests, please try again later.",
        details={"retryAfterSeconds": retry_after_s},
    )


def internal(message: str) -> ApiError:
    """500."""
    return ApiError(
        500,
        "InternalError",
        f"Internal error occurred: {message}",
        details={"causes": [{"message": message}]},
    )


def _qualified(plural: str, group: str) -> str:
    return f"{plural}.{group}" if group else plural


def _details(name: str, group: str, kind: str) -> Object:
    found = {"name": name, "group": group, "kind": kind}
    return {key: value for key, value in found.items() if value}
