"""What clients ask a server before they use it: its version, its groups, its resources.

Sources: k8s.io/apimachinery pkg/apis/meta/v1 (APIVersions, APIGroupList, APIResourceList).
"""

from typing import Any

from nfqproxy.testing.resources import RESOURCES

__all__ = ["VERSION", "document"]

VERSION = {
    "major": "1",
    "minor": "33",
    "gitVersion": "v1.33.0-nfqproxy.testing",
    "platform": "linux/amd64",
}
"""The release whose behaviour is followed."""

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_HEALTH = frozenset({"/healthz", "/livez", "/readyz"})


def document(path: str) -> Any:
    """What is served there: JSON, or text ("ok"); None if nothing is."""
    path = path.rstrip("/")
    if path in _HEALTH:
        return "ok"
    if path == "/version":
        return VERSION
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        groups = dict.fromkeys(resource.group for resource in RESOURCES if resource.group)
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [_group(name) for name in groups],
        }
    inside = [resource for resource in RESOURCES if resource.prefix == path]
    if inside:
        return _resource_list(inside)
    for resource in RESOURCES:
        if resource.group and path == f"/apis/{resource.group}":
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(resource.group)}
    return None


def _group(name: str) -> dict[str, Any]:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _resource_list(inside: list[Any]) -> dict[str, Any]:
    told = []
    for resource in inside:
        one = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.is_namespaced,
            "kind": resource.kind,
            "verbs": _VERBS,
            "shortNames": list(resource.short_names),
        }
        told.append(one)
        if resource.has_status:
            told.append(
                {
                    "name": f"{resource.plural}/status",
                    "singularName": "",
                    "namespaced": resource.is_namespaced,
                    "kind": resource.kind,
                    "verbs": ["get", "patch", "update"],
                }
            )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": inside[0].api_version,
        "resources": told,
    }
