"""All objects that decisions depend on, kept up to date by changes of single ones."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from msgspec import Struct

from nfqproxy.control.objects import (
    EndpointSlice,
    KubernetesObject,
    Node,
    ObjectChange,
    ObjectKey,
    Objects,
    Service,
    ServiceCidr,
    object_key,
)
from nfqproxy.control.table import ServiceTable, TableDiff
from nfqproxy.model import ServicePort, ServicePortName

T = TypeVar("T", Service, EndpointSlice)


class ClusterDiff(Struct, frozen=True, kw_only=True):
    """What a change of objects comes to."""

    ports: TableDiff
    surroundings: bool
    """A Node or ServiceCIDR differs, which may alter the plans of every service port."""


class ClusterState:
    """The service table of one node, and the Nodes and ServiceCIDRs beside it."""

    def __init__(self, node_name: str) -> None:
        self._table = ServiceTable(node_name)
        self._surroundings: dict[ObjectKey, KubernetesObject] = {}
        self._keys: set[ObjectKey] = set()
        self.ports: Mapping[ServicePortName, ServicePort] = self._table.ports
        """The present service ports: a live view, copy it to keep it."""

    @property
    def surroundings(self) -> Objects:
        """The Nodes and ServiceCIDRs, sorted by name, without Services and slices."""
        values = [self._surroundings[key] for key in sorted(self._surroundings, key=_name)]
        return Objects(
            nodes=tuple(value for value in values if isinstance(value, Node)),
            service_cidrs=tuple(value for value in values if isinstance(value, ServiceCidr)),
        )

    def replace(self, objects: Objects) -> ClusterDiff:
        """Take these objects as all there are."""
        every: tuple[KubernetesObject, ...] = (
            *objects.services,
            *objects.endpoint_slices,
            *objects.nodes,
            *objects.service_cidrs,
        )
        wanted = {object_key(value) for value in every}
        return self.apply(ObjectChange(upserts=every, removes=tuple(self._keys - wanted)))

    def apply(self, change: ObjectChange) -> ClusterDiff:
        """Take a change; objects that are given as they were and unknown removals are fine."""
        is_altered = False
        for value in change.upserts:
            key = object_key(value)
            self._keys.add(key)
            if isinstance(value, Node | ServiceCidr) and self._surroundings.get(key) != value:
                self._surroundings[key] = value
                is_altered = True
        for key in change.removes:
            self._keys.discard(key)
            is_altered |= self._surroundings.pop(key, None) is not None
        ports = self._table.apply(
            services=_of(Service, change.upserts),
            endpoint_slices=_of(EndpointSlice, change.upserts),
            removed_services=_names(Service, change.removes),
            removed_endpoint_slices=_names(EndpointSlice, change.removes),
        )
        return ClusterDiff(ports=ports, surroundings=is_altered)


def _of(kind: type[T], values: Iterable[KubernetesObject]) -> Iterable[T]:
    return (value for value in values if isinstance(value, kind))


def _names(kind: type[KubernetesObject], keys: Iterable[ObjectKey]) -> list[tuple[str, str]]:
    return [(namespace, name) for a_kind, namespace, name in keys if a_kind is kind]


def _name(key: ObjectKey) -> tuple[str, str]:
    return key[0].__name__, key[2]
