"""Creating, updating, patching and deleting by the API's rules, over the store.

Sources: k8s.io/apiserver pkg/registry/generic/registry/store.go, pkg/registry/rest/{create,update,delete}.go.
"""

import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from nfqproxy.testing.objects import Allocator, check, check_types, set_defaults
from nfqproxy.testing.resources import RESOURCES, Resource, by_kind, by_plural
from nfqproxy.testing.settings import Settings
from nfqproxy.testing.status import (
    ApiError,
    already_exists,
    bad_request,
    conflict,
    invalid,
    not_found,
    success,
)
from nfqproxy.testing.store import Object, Store, Version

__all__ = ["Registry"]

_NAMESPACES = by_plural["", "namespaces"]
_FIRST_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
"""Letters of generated names (k8s.io/apimachinery pkg/util/rand): no vowels, hence no words."""
_FIXED_METADATA = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "selfLink")
_MODIFIED = (
    "the object has been modified; please apply your changes to the latest version and try again"
)


class Registry:
    """Writes to a store. All methods raise ApiError as the API refuses."""

    def __init__(self, store: Store, settings: Settings, chance: random.Random) -> None:
        self.store = store
        self._chance = chance
        self._allocator = Allocator(settings)
        for name in _FIRST_NAMESPACES:
            self._create_namespace(name)

    # As a client does it

    def read(self, resource: Resource, namespace: str, name: str) -> Version:
        """The object; 404."""
        found = self.store.get(resource, namespace, name)
        if found is None:
            raise not_found(resource.plural, resource.group, name)
        return found

    def create(self, resource: Resource, namespace: str, value: Object) -> Version:
        """POST: 400, 404 (its namespace), 409 (is there), 422."""
        value = _adopted(resource, namespace, value)
        metadata = value["metadata"]
        if metadata.get("resourceVersion"):
            raise ApiError(500, "", "resourceVersion should not be set on objects to be created")
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + "".join(
                self._chance.choices(_SUFFIX, k=5)
            )
        set_defaults(resource, value)
        check(resource, value)
        if resource.is_namespaced and not self.store.get(_NAMESPACES, "", namespace):
            raise not_found("namespaces", "", namespace)
        name = metadata["name"]
        if self.store.get(resource, namespace, name):
            raise already_exists(resource.plural, resource.group, name)
        if resource.kind == "Service":
            value["status"] = {"loadBalancer": {}}
            self._allocator.fill(value)
        self._begin(resource, value)
        return self.store.put(resource, value)

    def update(
        self, resource: Resource, namespace: str, name: str, value: Object, *, status: bool = False
    ) -> tuple[Version, bool]:
        """PUT of the object, or of its status alone: the new version, and whether it was made."""
        value = _adopted(resource, namespace, value)
        if value["metadata"].get("name") != name:
            raise bad_request(
                f"the name of the object ({value['metadata'].get('name', '')}) does not match "
                f"the name on the URL ({name})"
            )
        before = self.store.get(resource, namespace, name)
        if before is None:
            if not resource.may_put_create or status:
                raise not_found(resource.plural, resource.group, name)
            value["metadata"].pop("resourceVersion", None)
            return self.create(resource, namespace, value), True
        return self._replace(resource, before, value, status=status), False

    def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        patch: Object,
        *,
        merge: Callable[[Object, Object], Object],
        status: bool = False,
    ) -> Version:
        """PATCH by this kind of merging (:mod:`nfqproxy.testing.patches`)."""
        before = self.read(resource, namespace, name)
        wanted = patch.get("metadata") or {}
        value = _adopted(resource, namespace, merge(before.parsed(), patch))
        if value["metadata"].get("name") != name:
            raise bad_request("metadata.name cannot be patched")
        if not wanted.get("resourceVersion"):
            value["metadata"].pop("resourceVersion", None)
        return self._replace(resource, before, value, status=status)

    def delete(self, resource: Resource, namespace: str, name: str, options: Object) -> Object:
        """DELETE, and what it answers. 409: a precondition does not hold. A namespace goes with what is in it."""
        found = self.read(resource, namespace, name)
        metadata = found.parsed()["metadata"]
        for field, title in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            wanted = (options.get("preconditions") or {}).get(field)
            if wanted is not None and wanted != metadata[field]:
                raise conflict(
                    resource.plural,
                    resource.group,
                    name,
                    f"Precondition failed: {title} in precondition: {wanted}, "
                    f"{title} in object meta: {metadata[field]}",
                )
        if resource is _NAMESPACES:
            if name in _FIRST_NAMESPACES[:1] + _FIRST_NAMESPACES[2:]:
                raise ApiError(
                    403,
                    "Forbidden",
                    f'namespaces "{name}" is forbidden: this namespace may not be deleted',
                )
            for inner in RESOURCES:
                for version in self.store.all(inner):
                    if version.namespace == name:
                        self.store.remove(inner, version)
        self.store.remove(resource, found)
        if resource.is_returned_deleted:
            return {"kind": resource.kind, "apiVersion": resource.api_version, **found.parsed()}
        told = success(name=name, kind=resource.plural, uid=metadata["uid"])
        if resource.group:
            told["details"]["group"] = resource.group
        return told

    # As a test does it

    def apply(self, value: Object) -> Version:
        """Write a manifest whole, status and all, whether or not it is there; its namespace is made if need be.

        No write if nothing differs. ApiError (400) for a kind that is not served, (422) for a bad object.
        """
        resource, namespace, value = self.vet(value)
        if namespace and not self.store.get(_NAMESPACES, "", namespace):
            self._create_namespace(namespace)
        before = self.store.get(resource, namespace, value["metadata"]["name"])
        if resource.kind == "Service":
            if before:
                _keep_allocated(before.parsed(), value)
            self._allocator.fill(value)
        if before:
            return self._write(resource, before, before.parsed(), value)
        self._begin(resource, value)
        return self.store.put(resource, value)

    def vet(self, value: Object) -> tuple[Resource, str, Object]:
        """A manifest's resource and namespace, and what would be written; ApiError as :meth:`apply`."""
        resource = kind_of(value)
        namespace = (value.get("metadata") or {}).get("namespace") or "default"
        if not resource.is_namespaced:
            namespace = ""
        value = _adopted(resource, namespace, value)
        for field in ("resourceVersion", "managedFields"):
            value["metadata"].pop(field, None)
        set_defaults(resource, value)
        check(resource, value)
        return resource, namespace, value

    def discard(self, kind: str, name: str, namespace: str = "") -> None:
        """Delete by kind; ApiError (404) if it is not there."""
        resource = next((item for item in RESOURCES if item.kind == kind), None)
        if resource is None:
            raise bad_request(f'the kind "{kind}" is not served')
        self.delete(resource, (namespace or "default") if resource.is_namespaced else "", name, {})

    def _replace(
        self, resource: Resource, before: Version, value: Object, *, status: bool
    ) -> Version:
        old = before.parsed()
        name = before.name
        metadata = value["metadata"]
        wanted = metadata.get("resourceVersion")
        if wanted and wanted != str(before.revision):
            raise conflict(resource.plural, resource.group, name, _MODIFIED)
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            raise conflict(
                resource.plural,
                resource.group,
                name,
                f"Precondition failed: UID in precondition: {metadata['uid']}, "
                f"UID in object meta: {old['metadata']['uid']}",
            )
        if status:
            value = {**old, "status": value.get("status")}
            if value["status"] is None:
                del value["status"]
        elif resource.has_status:
            value["status"] = old.get("status")
            if value["status"] is None:
                del value["status"]
        set_defaults(resource, value)
        if resource.kind == "Service":
            _keep_allocated(old, value)
        check(resource, value)
        _check_immutable(resource, old, value)
        if resource.kind == "Service":
            self._allocator.fill(value)
        return self._write(resource, before, old, value)

    def _write(self, resource: Resource, before: Version, old: Object, value: Object) -> Version:
        metadata = value["metadata"]
        for field in (*_FIXED_METADATA, "resourceVersion"):
            if field in old["metadata"]:
                metadata[field] = old["metadata"][field]
            else:
                metadata.pop(field, None)
        if value == old:
            return before
        if resource.has_generation and _desired(old) != _desired(value):
            metadata["generation"] = old["metadata"]["generation"] + 1
        return self.store.put(resource, value)

    def _begin(self, resource: Resource, value: Object) -> None:
        metadata = value["metadata"]
        for field in _FIXED_METADATA:
            metadata.pop(field, None)
        metadata["uid"] = str(uuid.UUID(int=self._chance.getrandbits(128), version=4))
        metadata["creationTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if resource.has_generation:
            metadata["generation"] = 1

    def _create_namespace(self, name: str) -> None:
        self.create(_NAMESPACES, "", {"metadata": {"name": name}})


def kind_of(value: Object) -> Resource:
    """The resource of a manifest; ApiError (400) if it is not served."""
    kind = (value.get("apiVersion"), value.get("kind"))
    resource = by_kind.get(kind)  # type: ignore[arg-type]
    if resource is None:
        raise bad_request(f"no resource {kind[1]} of {kind[0]} is served")
    return resource


def _adopted(resource: Resource, namespace: str, value: Any) -> Object:
    """A copy that belongs to this resource and namespace; 400 if it says otherwise."""
    if not isinstance(value, dict) or not isinstance(value.get("metadata", {}), dict):
        raise bad_request(
            "the object provided is unrecognized (must be a JSON object with metadata)"
        )
    for field, wanted in (("kind", resource.kind), ("apiVersion", resource.api_version)):
        if value.get(field, wanted) != wanted:
            raise bad_request(
                f"the {field} in the data ({value[field]}) does not match the expected {field} ({wanted})"
            )
    metadata = dict(value.get("metadata") or {})
    if metadata.get("namespace", namespace) != namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
    if namespace:
        metadata["namespace"] = namespace
    for field in ("labels", "annotations"):
        if not metadata.get(field):
            metadata.pop(field, None)
    rest = {
        key: item for key, item in value.items() if key not in ("kind", "apiVersion", "metadata")
    }
    adopted = {"metadata": _copy(metadata), **_copy(rest)}
    check_types(resource, adopted)
    return adopted


def _copy(value: Any) -> Any:
    """The same, with containers of its own: defaults are written into it. Nulls are absent fields."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _keep_allocated(old: Object, value: Object) -> None:
    """What was handed out stays with the Service when an update does not say otherwise."""
    before, spec = old.get("spec") or {}, value["spec"]
    if spec["type"] == "ExternalName":
        return
    for field in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"):
        if field in before and not spec.get(field):
            spec[field] = before[field]
    if spec["type"] in ("NodePort", "LoadBalancer"):
        ports = {
            (p.get("protocol"), p.get("port")): p.get("nodePort") for p in before.get("ports") or ()
        }
        for port in spec.get("ports") or ():
            known = ports.get((port.get("protocol"), port.get("port")))
            if known and not port.get("nodePort"):
                port["nodePort"] = known


def _check_immutable(resource: Resource, old: Object, value: Object) -> None:
    causes = [
        (field, "FieldValueInvalid", "Invalid value: field is immutable")
        for field in resource.immutable
        if old.get(field) != value.get(field)
    ]
    if resource.kind == "Service":
        before, after = (item.get("spec") or {} for item in (old, value))
        if (
            before.get("clusterIP")
            and before.get("clusterIP") != after.get("clusterIP")
            and "ExternalName" not in (before.get("type"), after.get("type"))
        ):
            causes.append(
                (
                    "spec.clusterIPs[0]",
                    "FieldValueInvalid",
                    f'Invalid value: "{after.get("clusterIP")}": field is immutable',
                )
            )
    if causes:
        raise invalid(resource.kind, resource.group, old["metadata"]["name"], causes)


def _desired(value: Object) -> Object:
    """What metadata.generation counts the changes of: all but metadata (save labels) and status."""
    kept = {key: item for key, item in value.items() if key not in ("metadata", "status")}
    return kept | {"labels": value["metadata"].get("labels")}
