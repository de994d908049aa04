"""The service table: Services joined with their EndpointSlices (SEMANTICS 2.1 and 2.2).

One record per service port and address family. The same objects give the same table, in whatever
order they arrive: slices are merged in the order of their names, endpoints are sorted by
"ip:port" text.

:class:`ServiceTable` keeps the join between changes and computes anew only the Services that an
altered object touches; :func:`service_ports` is the same from nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from msgspec import Struct

from nfqproxy.control import annotations
from nfqproxy.control.address import family_of
from nfqproxy.control.objects import EndpointSlice, Objects, Service, SliceEndpoint
from nfqproxy.model import Endpoint, Family, Protocol, ServicePort, ServicePortName, TrafficPolicy

EXCLUDING_LABELS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
"""Label keys, any value, by which kube-proxy's informers select an object out."""

_ServiceKey = tuple[str, str]
_PortKey = tuple[str, Protocol, Family]


class TableDiff(Struct, frozen=True, kw_only=True):
    """What became of the table's records; each tuple is sorted."""

    added: tuple[ServicePortName, ...] = ()
    changed: tuple[ServicePortName, ...] = ()
    removed: tuple[ServicePortName, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def diff(
    old: Mapping[ServicePortName, ServicePort], new: Mapping[ServicePortName, ServicePort]
) -> TableDiff:
    """What it takes to go from one table to the other."""
    return TableDiff(
        added=tuple(sorted(name for name in new if name not in old)),
        changed=tuple(sorted(name for name, port in new.items() if old.get(name, port) != port)),
        removed=tuple(sorted(name for name in old if name not in new)),
    )


def service_ports(objects: Objects, *, node_name: str) -> dict[ServicePortName, ServicePort]:
    """The table of these objects, in the order of its names."""
    table = ServiceTable(node_name)
    table.replace(objects)
    return {name: table.ports[name] for name in sorted(table.ports)}


class ServiceTable:
    """The join, kept up to date by whole replacements or by single objects.

    The records depend on the node's name in one point: of two equal endpoints the local one wins.
    """

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._services: dict[_ServiceKey, Service] = {}
        self._slices: dict[_ServiceKey, EndpointSlice] = {}
        # Slices by the Service they name; the inner key is the slice's name (same namespace).
        self._slices_of: dict[_ServiceKey, dict[str, EndpointSlice]] = {}
        self._ports_of: dict[_ServiceKey, tuple[ServicePort, ...]] = {}
        self._ports: dict[ServicePortName, ServicePort] = {}
        self.ports: Mapping[ServicePortName, ServicePort] = MappingProxyType(self._ports)
        """The present records: a live view, copy it to keep it."""

    def replace(self, objects: Objects) -> TableDiff:
        """Take these objects as all there are."""
        services = {(service.namespace, service.name): service for service in objects.services}
        slices = {(slice_.namespace, slice_.name): slice_ for slice_ in objects.endpoint_slices}
        return self.apply(
            services=services.values(),
            endpoint_slices=slices.values(),
            removed_services=[key for key in self._services if key not in services],
            removed_endpoint_slices=[key for key in self._slices if key not in slices],
        )

    def apply(
        self,
        *,
        services: Iterable[Service] = (),
        endpoint_slices: Iterable[EndpointSlice] = (),
        removed_services: Iterable[tuple[str, str]] = (),
        removed_endpoint_slices: Iterable[tuple[str, str]] = (),
    ) -> TableDiff:
        """Take new or altered objects and drop those named by (namespace, name)."""
        touched: set[_ServiceKey] = set()
        for key in removed_services:
            if self._services.pop(key, None) is not None:
                touched.add(key)
        for key in removed_endpoint_slices:
            self._drop_slice(key, touched)
        for service in services:
            key = (service.namespace, service.name)
            if self._services.get(key) != service:
                self._services[key] = service
                touched.add(key)
        for slice_ in endpoint_slices:
            key = (slice_.namespace, slice_.name)
            if self._slices.get(key) == slice_:
                continue
            self._drop_slice(key, touched)
            self._slices[key] = slice_
            owner = (slice_.namespace, slice_.service)
            self._slices_of.setdefault(owner, {})[slice_.name] = slice_
            touched.add(owner)
        return self._recompute(touched)

    def _drop_slice(self, key: _ServiceKey, touched: set[_ServiceKey]) -> None:
        slice_ = self._slices.pop(key, None)
        if slice_ is None:
            return
        owner = (slice_.namespace, slice_.service)
        siblings = self._slices_of[owner]
        del siblings[slice_.name]
        if not siblings:
            del self._slices_of[owner]
        touched.add(owner)

    def _recompute(self, touched: set[_ServiceKey]) -> TableDiff:
        added: list[ServicePortName] = []
        changed: list[ServicePortName] = []
        removed: list[ServicePortName] = []
        for key in touched:
            service = self._services.get(key)
            new: tuple[ServicePort, ...] = ()
            if service is not None:
                siblings = self._slices_of.get(key, {})
                slices = [siblings[name] for name in sorted(siblings)]
                new = _ports_of_service(service, slices, self._node_name)
            if new:
                old = self._ports_of.get(key, ())
                self._ports_of[key] = new
            else:
                old = self._ports_of.pop(key, ())
            kept = {port.name for port in new}
            for port in old:
                if port.name not in kept:
                    del self._ports[port.name]
                    removed.append(port.name)
            for port in new:
                before = self._ports.get(port.name)
                if before == port:
                    continue
                (added if before is None else changed).append(port.name)
                self._ports[port.name] = port
        return TableDiff(
            added=tuple(sorted(added)),
            changed=tuple(sorted(changed)),
            removed=tuple(sorted(removed)),
        )


def is_externally_accessible(port: ServicePort) -> bool:
    """Whether the port has a frontend beside its cluster IP (SEMANTICS 2.1.5)."""
    return bool(port.node_port or port.external_ips or port.load_balancer_ips)


def uses_cluster_endpoints(port: ServicePort) -> bool:
    """Whether any frontend of the port picks from the cluster set C (SEMANTICS 2.1.6)."""
    return port.internal_policy is not TrafficPolicy.LOCAL or is_externally_accessible(port)


def uses_local_endpoints(port: ServicePort) -> bool:
    """Whether any frontend of the port picks from the local set L (SEMANTICS 2.1.6)."""
    return port.internal_policy is TrafficPolicy.LOCAL or (
        port.external_policy is TrafficPolicy.LOCAL and is_externally_accessible(port)
    )


def _is_excluded(labels: Mapping[str, str]) -> bool:
    return any(label in labels for label in EXCLUDING_LABELS)


def _ports_of_service(
    service: Service, slices: list[EndpointSlice], node_name: str
) -> tuple[ServicePort, ...]:
    if (
        service.type == "ExternalName"
        or not service.cluster_ips
        or (service.labels and _is_excluded(service.labels))
    ):
        return ()
    endpoints = _merge(service, slices, node_name)
    steered = annotations.is_steered(service.labels, service.annotations)
    balancer = service.annotations.get(annotations.BALANCER, "weighted-random")
    # The health port means something in this combination alone (SEMANTICS 2.1.4).
    health_check_node_port = (
        service.health_check_node_port
        if service.type == "LoadBalancer" and service.external_policy is TrafficPolicy.LOCAL
        else 0
    )
    ports: list[ServicePort] = []
    for cluster_ip in service.cluster_ips:
        family = family_of(cluster_ip)
        external_ips = _of_family(service.external_ips, family)
        load_balancer_ips = _of_family(service.load_balancer_ips, family)
        source_ranges = _of_family(service.load_balancer_source_ranges, family)
        for port in service.ports:
            ports.append(
                ServicePort(
                    name=ServicePortName(
                        service.namespace, service.name, port.name, port.protocol, family
                    ),
                    cluster_ip=cluster_ip,
                    port=port.port,
                    node_port=port.node_port,
                    external_ips=external_ips,
                    load_balancer_ips=load_balancer_ips,
                    load_balancer_source_ranges=source_ranges,
                    internal_policy=service.internal_policy,
                    external_policy=service.external_policy,
                    affinity_timeout_s=service.affinity_timeout_s,
                    health_check_node_port=health_check_node_port,
                    balancer=balancer,
                    steered=steered,
                    endpoints=endpoints.get((port.name, port.protocol, family), ()),
                )
            )
    return tuple(ports)


def _of_family(addresses: tuple[str, ...], family: Family) -> tuple[str, ...]:
    if not addresses:
        return addresses
    return tuple(address for address in addresses if family_of(address) is family)


def _merge(
    service: Service, slices: list[EndpointSlice], node_name: str
) -> dict[_PortKey, tuple[Endpoint, ...]]:
    """Endpoints by port, merged over the slices, which come in the order of their names.

    Of equal ip:port texts a local one wins, else the first.
    """
    merged: dict[_PortKey, dict[str, Endpoint]] = {}
    for slice_ in slices:
        if slice_.labels and _is_excluded(slice_.labels):
            continue
        weight_of = _weigher(service.weights, slice_.weight)
        for port in slice_.ports:
            by_text = merged.setdefault((port.name, port.protocol, slice_.family), {})
            for item in slice_.endpoints:
                text = _text(item.address, port.port)
                before = by_text.get(text)
                if before is not None and (before.node == node_name or item.node != node_name):
                    continue
                by_text[text] = Endpoint(
                    address=item.address,
                    port=port.port,
                    ready=item.ready,
                    serving=item.serving,
                    terminating=item.terminating,
                    node=item.node,
                    zone=item.zone,
                    weight=weight_of(item),
                    zone_hints=item.zone_hints,
                    node_hints=item.node_hints,
                )
    return {
        key: tuple(by_text[text] for text in sorted(by_text)) for key, by_text in merged.items()
    }


def _text(address: str, port: int) -> str:
    # Go's net.JoinHostPort, by whose result kube-proxy sorts.
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _weigher(
    weights: Mapping[str, int], slice_weight: int | None
) -> Callable[[SliceEndpoint], int]:
    """The first that is given: endpoint IP, targetRef name, node, zone, slice, 1."""
    default = 1 if slice_weight is None else slice_weight
    if not weights:
        return lambda item: default

    def weight_of(item: SliceEndpoint) -> int:
        for key in (item.address, item.target_name, item.node):
            if key and key in weights:
                return weights[key]
        if item.zone:
            return weights.get(annotations.ZONE_PREFIX + item.zone, default)
        return default

    return weight_of
