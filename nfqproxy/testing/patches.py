"""Patches: RFC 7396 (merge patch), and the API's own strategic merge patch, which kubectl and recorders send.

Source of the latter: k8s.io/apimachinery pkg/util/strategicpatch; merge keys by the ``patchMergeKey`` tags of
k8s.io/api for the resources that are served. Every other list is replaced whole.
"""

from collections.abc import Mapping
from typing import Any

from nfqproxy.testing.status import bad_request

__all__ = ["merge_patch", "strategic_merge_patch"]

_PRIMITIVE = ""
_MERGE_KEYS = {
    "metadata.finalizers": _PRIMITIVE,
    "metadata.ownerReferences": "uid",
    "spec.podCIDRs": _PRIMITIVE,
    "spec.ports": "port",
    "status.addresses": "type",
    "status.conditions": "type",
}
"""By path: what names an element of a list that is merged; nothing: the elements are plain values."""
_ORDER, _DELETE = "$setElementOrder/", "$deleteFromPrimitiveList/"
_Object = dict[str, Any]


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: members of the patch replace, null removes, objects merge, all else replaces whole."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def strategic_merge_patch(target: _Object, patch: Mapping[str, Any]) -> _Object:
    """The same, but some lists merge by a key, and directives begin with ``$``; ApiError (400) if malformed."""
    merged = _merge_objects(target, patch, "")
    return {} if merged is None else merged


def _merge_objects(target: Any, patch: Mapping[str, Any], path: str) -> _Object | None:
    """None: the patch deletes the object."""
    directive = patch.get("$patch", "merge")
    if directive == "delete":
        return None
    kept = isinstance(target, dict) and directive != "replace"
    merged: _Object = dict(target) if kept else {}
    for key, value in patch.items():
        where = f"{path}.{key}".lstrip(".")
        if key.startswith("$"):
            continue
        inner: Any
        if isinstance(value, dict):
            inner = _merge_objects(merged.get(key), value, where)
        elif isinstance(value, list) and where in _MERGE_KEYS:
            inner = _merge_lists(merged.get(key) or [], value, where)
        else:
            inner = value
        if inner is None:
            merged.pop(key, None)
        else:
            merged[key] = inner
    for key, value in patch.items():
        if not key.startswith("$"):
            continue
        if not isinstance(value, list) and key != "$patch":
            raise bad_request(f"{key} of a strategic merge patch must be a list")
        if key == "$retainKeys":
            merged = {name: item for name, item in merged.items() if name in value}
        elif key.startswith(_DELETE):
            name = key.removeprefix(_DELETE)
            merged[name] = [item for item in merged.get(name) or [] if item not in value]
        elif key.startswith(_ORDER):
            name = key.removeprefix(_ORDER)
            where = f"{path}.{name}".lstrip(".")
            if name in merged and where in _MERGE_KEYS:
                merged[name] = _ordered(merged[name], value, where)
    return merged


def _name(item: Any, path: str) -> Any:
    """What tells an element of a merged list from the others."""
    key = _MERGE_KEYS[path]
    if key == _PRIMITIVE:
        return item
    if not isinstance(item, dict) or key not in item:
        raise bad_request(
            f"an element of {path} in a strategic merge patch lacks its merge key {key}"
        )
    return item[key]


def _merge_lists(target: list[Any], patch: list[Any], path: str) -> list[Any]:
    replaces = {"$patch": "replace"}
    if replaces in patch:
        return [item for item in patch if item != replaces]
    merged = {_name(item, path): item for item in target}
    for item in patch:
        name = _name(item, path)
        inner = _merge_objects(merged.get(name), item, path) if isinstance(item, dict) else item
        if inner is None:
            merged.pop(name, None)
        else:
            merged[name] = inner
    return list(merged.values())


def _ordered(items: list[Any], order: list[Any], path: str) -> list[Any]:
    """In this order; what it does not name comes last."""
    places = {_name(item, path): place for place, item in enumerate(order)}
    return sorted(items, key=lambda item: places.get(_name(item, path), len(places)))
