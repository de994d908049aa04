"""The fault duplicate-slice: second EndpointSlices that hold the endpoints of another for a while.

An endpoint may be in several slices of a Service at one time; whoever reads them must merge
(kubernetes.io/docs/concepts/services-networking/endpoint-slices, "Duplicate endpoints").
"""

from nfqproxy.testing.faults import Fault, Faults
from nfqproxy.testing.registry import Registry
from nfqproxy.testing.resources import by_plural
from nfqproxy.testing.store import Version

__all__ = ["SecondSlices"]

_SLICES = by_plural["discovery.k8s.io", "endpointslices"]
_SUFFIX = "-second"


class SecondSlices:
    """Makes them after a slice is written, takes them back when it is written or deleted again."""

    def __init__(self, registry: Registry, faults: Faults) -> None:
        self._registry = registry
        self._faults = faults
        self._made: set[tuple[str, str]] = set()
        """Namespace and name of the slices that have a second one."""

    def written(self, first: Version) -> None:
        """A slice has just been written; its former double goes, a new one may come."""
        if first.name.endswith(_SUFFIX):
            return
        self.withdraw(first.namespace, first.name)
        if not self._faults.hits(Fault.DUPLICATE_SLICE, _SLICES.plural):
            return
        value = first.parsed()
        kept = {
            key: value["metadata"][key]
            for key in ("labels", "annotations")
            if key in value["metadata"]
        }
        endpoints = value.get("endpoints") or []
        self._faults.chance(Fault.DUPLICATE_SLICE).shuffle(endpoints)
        second = {
            **value,
            "metadata": {"name": first.name + _SUFFIX, **kept},
            "endpoints": endpoints,
        }
        self._registry.create(_SLICES, first.namespace, second)
        self._made.add((first.namespace, first.name))

    def withdraw(self, namespace: str, name: str) -> None:
        """Delete the second slice of this one, if it has one."""
        if (namespace, name) not in self._made:
            return
        self._made.discard((namespace, name))
        store = self._registry.store
        second = store.get(_SLICES, namespace, name + _SUFFIX)
        if second is not None:
            store.remove(_SLICES, second)

    def withdraw_all(self) -> None:
        """Delete them all."""
        for namespace, name in sorted(self._made):
            self.withdraw(namespace, name)
