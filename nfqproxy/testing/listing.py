"""What a list or a watch asks for, and lists: consistent, in pages, as of a version.

Sources: the tables of kubernetes.io/docs/reference/using-api/api-concepts ("Resource versions");
k8s.io/apimachinery pkg/apis/meta/internalversion/validation (ListOptions); k8s.io/apiserver
pkg/storage/continue.go and pkg/storage/etcd3/errors.go (tokens).
"""

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from msgspec import Struct

from nfqproxy.testing.faults import Fault, Faults
from nfqproxy.testing.resources import Resource
from nfqproxy.testing.selectors import Selector, selector
from nfqproxy.testing.status import bad_request, expired, invalid
from nfqproxy.testing.store import CompactedError, Store, Version

__all__ = ["ListOptions", "lagging", "list_body", "revision_of"]

_LIST_EXPIRED = "The resourceVersion for the provided list is too old."
_CONTINUE_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list "
    "without the continue parameter, or use the continue token in this response to retrieve the remainder of "
    "the results. What was created, modified or deleted meanwhile may then show up in the list."
)
_NEWEST = -1
"""The version in a continue token that goes on with whatever is there, not with what was."""


class ListOptions(Struct, frozen=True, kw_only=True):
    """The query of a list or a watch."""

    labels: str = ""
    fields: str = ""
    resource_version: str = ""
    match: str = ""
    """resourceVersionMatch: empty, Exact or NotOlderThan."""
    limit: int = 0
    """0: no limit."""
    token: str = ""
    """continue."""
    watch: bool = False
    timeout_s: int = 0
    """timeoutSeconds; 0: not given."""
    bookmarks: bool = False
    send_initial_events: bool | None = None

    @classmethod
    def parse(cls, query: Mapping[str, str], *, has_watch_list: bool) -> "ListOptions":
        """From a URL; ApiError (400, 422)."""
        initial = query.get("sendInitialEvents")
        options = cls(
            labels=query.get("labelSelector", ""),
            fields=query.get("fieldSelector", ""),
            resource_version=query.get("resourceVersion", ""),
            match=query.get("resourceVersionMatch", ""),
            limit=_number(query, "limit"),
            token=query.get("continue", ""),
            watch=_is_true(query.get("watch")),
            timeout_s=_number(query, "timeoutSeconds"),
            bookmarks=_is_true(query.get("allowWatchBookmarks")),
            send_initial_events=None if initial is None else _is_true(initial),
        )
        fault = options._watch_fault(has_watch_list) if options.watch else options._list_fault()
        if fault:
            field, sentence = fault
            raise invalid(
                "ListOptions",
                "meta.k8s.io",
                "",
                [(field, "FieldValueForbidden", f"Forbidden: {sentence}")],
            )
        return options

    def _watch_fault(self, has_watch_list: bool) -> tuple[str, str] | None:
        if self.send_initial_events is None:
            if self.match:
                return (
                    "resourceVersionMatch",
                    "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
                )
            return None
        if not has_watch_list:
            return (
                "sendInitialEvents",
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            )
        if self.match != "NotOlderThan":
            return (
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            )
        return None

    def _list_fault(self) -> tuple[str, str] | None:
        if self.send_initial_events is not None:
            return "sendInitialEvents", "sendInitialEvents is forbidden for list"
        if not self.match:
            return None
        field = "resourceVersionMatch"
        if not self.resource_version:
            return field, f"{field} is forbidden unless resourceVersion is provided"
        if self.token:
            return field, f"{field} is forbidden when continue is provided"
        if self.match not in ("Exact", "NotOlderThan"):
            return field, f'Unsupported value: "{self.match}"'
        if self.match == "Exact" and self.resource_version == "0":
            return field, f'{field} "exact" is forbidden for resourceVersion "0"'
        return None

    @property
    def version(self) -> int:
        """resourceVersion as a number, 0 if it is not given; ApiError (400) if it is none."""
        return revision_of(self.resource_version) if self.resource_version else 0

    def selector(self, resource: Resource, namespace: str) -> Selector | None:
        """What selects the objects; None: all."""
        return selector(resource, self.labels, self.fields, namespace)


def revision_of(text: str) -> int:
    """A resourceVersion; ApiError (400) if it is none of this server's."""
    if not text.isascii() or not text.isdigit():
        raise bad_request(f'invalid resource version "{text}"')
    return int(text)


async def list_body(
    store: Store,
    resource: Resource,
    namespace: str,
    options: ListOptions,
    faults: Faults,
    fresh: Callable[[int], Awaitable[None]],
) -> bytes:
    """A list as JSON. ``fresh`` waits for a version to come, or raises; ApiError (400, 410, 504)."""
    start, is_exact = "", False
    if options.token:
        revision, start = _open_token(options)
        if faults.hits(Fault.EXPIRE, resource.plural):
            raise expired(_CONTINUE_EXPIRED, _token(start, _NEWEST))
        if revision == _NEWEST:
            revision = store.revision
    elif options.version:
        await fresh(options.version)
        # With a limit and no word on the match an exact version is meant, as ever before the word came.
        is_exact = options.match == "Exact" or (not options.match and options.limit > 0)
        revision = options.version if is_exact else store.revision
    else:
        revision = store.revision
    is_cached = options.resource_version == "0" and not options.token
    if is_cached:
        revision = lagging(store, faults, resource, revision)
    try:
        items = store.snapshot(resource, revision)
    except CompactedError:
        if options.token:
            raise expired(_CONTINUE_EXPIRED, _token(start, _NEWEST)) from None
        raise expired(_LIST_EXPIRED) from None
    if start:
        items = [item for item in items if item.key >= start]
    selects = options.selector(resource, namespace)
    if selects is not None:
        items = [item for item in items if selects(item)]
    if is_cached and faults.hits(Fault.SHUFFLE, resource.plural):
        items = faults.chance(Fault.SHUFFLE).sample(items, len(items))
    metadata: dict[str, str | int] = {"resourceVersion": str(revision)}
    # The watch cache, which answers version 0, knows no limit.
    if options.limit and len(items) > options.limit and not is_cached:
        metadata["continue"] = _token(items[options.limit].key, revision)
        if not options.labels and not options.fields:
            metadata["remainingItemCount"] = len(items) - options.limit
        items = items[: options.limit]
    return _encode(resource, metadata, items)


def _encode(resource: Resource, metadata: Mapping[str, str | int], items: list[Version]) -> bytes:
    head = (
        f'{{"kind":"{resource.kind}List","apiVersion":"{resource.api_version}","metadata":'
    ).encode() + msgspec.json.encode(metadata)
    return head + b',"items":[' + b",".join([item.body for item in items]) + b"]}\n"


def lagging(store: Store, faults: Faults, resource: Resource, revision: int) -> int:
    """The revision that a read from the cache sees: the newest, or an older one if the fault comes."""
    if store.compacted < revision and faults.hits(Fault.STALE, resource.plural):
        return faults.chance(Fault.STALE).randint(store.compacted, revision)
    return revision


def _token(start: str, revision: int) -> str:
    value = {"v": "meta.k8s.io/v1", "rv": revision, "start": start}
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).rstrip(b"=").decode()


def _open_token(options: ListOptions) -> tuple[int, str]:
    """The version and the key to go on from."""
    if options.resource_version not in ("", "0"):
        raise bad_request("specifying resource version is not allowed when using continue")
    try:
        padded = options.token + "=" * (-len(options.token) % 4)
        value = msgspec.json.decode(base64.urlsafe_b64decode(padded))
        return int(value["rv"]), str(value["start"])
    except (binascii.Error, ValueError, msgspec.MsgspecError, LookupError, TypeError):
        raise bad_request("continue key is not valid: it is none of this server's") from None


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name) or "0"
    if not text.isascii() or not text.isdigit():
        raise bad_request(f'{name}: strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def _is_true(text: str | None) -> bool:
    return text is not None and text.lower() not in ("false", "0", "")
