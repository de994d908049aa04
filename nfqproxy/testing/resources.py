"""The resources that are served, and what the API server knows of each.

Sources: k8s.io/api (groups, versions, kinds); k/pkg/registry/{core,discovery,networking}/*/strategy.go
(whether PUT may create, what counts as a new generation) and k/pkg/apis/*/v1/conversion.go (field labels).
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

__all__ = ["RESOURCES", "Resource", "by_kind", "by_plural"]


class Resource(Struct, frozen=True, eq=False, kw_only=True):
    """One resource of the API."""

    group: str = ""
    """Empty: the core group."""
    plural: str
    """As in a path."""
    singular: str
    kind: str
    short_names: tuple[str, ...] = ()
    is_namespaced: bool = True
    fields: Mapping[str, tuple[str, ...]] = {}
    """Further field selectors, each with the path it compares; metadata.name and .namespace always."""
    may_put_create: bool = False
    """Whether PUT makes what is not there."""
    has_status: bool = False
    """Whether status is a resource of its own, which PUT and PATCH of the object leave alone."""
    has_generation: bool = False
    """Whether metadata.generation counts the changes of what is neither metadata nor status."""
    is_returned_deleted: bool = False
    """Whether DELETE answers with the object; otherwise with a Status."""
    immutable: tuple[str, ...] = ()
    """Top-level fields that never change once made."""
    empty: Mapping[str, Any] = {}
    """What an object without content has beside metadata, as in a bookmark: Go prints its zero values."""

    @property
    def api_version(self) -> str:
        """``v1``, ``discovery.k8s.io/v1``."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def prefix(self) -> str:
        """The start of its paths, without a final slash."""
        return f"/apis/{self.group}/v1" if self.group else "/api/v1"

    def selectable(self, value: Mapping[str, Any]) -> dict[str, str]:
        """What field selectors compare, of one object."""
        metadata = value["metadata"]
        found = {
            "metadata.name": metadata["name"],
            "metadata.namespace": metadata.get("namespace", ""),
        }
        for name, path in self.fields.items():
            at: Any = value
            for part in path:
                at = at.get(part) if isinstance(at, dict) else None
            found[name] = "" if at is None else str(at).lower() if at in (True, False) else str(at)
        return found


def _paths(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(name.split(".")) for name in names}


RESOURCES = (
    Resource(
        plural="services",
        singular="service",
        kind="Service",
        short_names=("svc",),
        fields=_paths("spec.clusterIP", "spec.type"),
        may_put_create=True,
        has_status=True,
        is_returned_deleted=True,
        empty={"spec": {}, "status": {"loadBalancer": {}}},
    ),
    Resource(
        plural="nodes",
        singular="node",
        kind="Node",
        short_names=("no",),
        is_namespaced=False,
        fields=_paths("spec.unschedulable"),
        has_status=True,
        empty={"spec": {}, "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}}},
    ),
    Resource(
        plural="namespaces",
        singular="namespace",
        kind="Namespace",
        short_names=("ns",),
        is_namespaced=False,
        fields=_paths("status.phase"),
        has_status=True,
        empty={"spec": {}, "status": {}},
    ),
    Resource(
        plural="events",
        singular="event",
        kind="Event",
        short_names=("ev",),
        fields=_paths(
            *(
                f"involvedObject.{name}"
                for name in (
                    "kind",
                    "namespace",
                    "name",
                    "uid",
                    "apiVersion",
                    "resourceVersion",
                    "fieldPath",
                )
            ),
            "reason",
            "reportingComponent",
            "type",
        )
        | {"source": ("source", "component")},
        may_put_create=True,
        empty={"involvedObject": {}, "source": {}, "firstTimestamp": None, "lastTimestamp": None},
    ),
    Resource(
        group="discovery.k8s.io",
        plural="endpointslices",
        singular="endpointslice",
        kind="EndpointSlice",
        has_generation=True,
        immutable=("addressType",),
        empty={"addressType": "", "endpoints": None, "ports": None},
    ),
    Resource(
        group="networking.k8s.io",
        plural="servicecidrs",
        singular="servicecidr",
        kind="ServiceCIDR",
        is_namespaced=False,
        has_status=True,
        has_generation=True,
        empty={"spec": {}, "status": {}},
    ),
)

by_plural = {(resource.group, resource.plural): resource for resource in RESOURCES}
"""By group and plural, as in a path."""

by_kind = {(resource.api_version, resource.kind): resource for resource in RESOURCES}
"""By apiVersion and kind, as in a manifest."""
