"""Service ports of both families as Service and EndpointSlice manifests, and kube-proxy's settings.

What the rules do not say is left out (names of target ports, labels, selectors, nodes of endpoints,
conditions); what they imply is written so that decisions on this node come out the same:

- an endpoint of KUBE-SVL is on this node; one that is not in KUBE-SVC as well is draining if nothing
  of KUBE-SVL is (SEMANTICS 2.3), else hinted to another node;
- "has no local endpoints" without any KUBE-SVC means endpoints elsewhere that nobody on this node is
  sent to: :data:`ELSEWHERE` stands for them.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from msgspec import Struct

from nfqproxy.control import annotations
from nfqproxy.model import Family
from nfqproxy.sources.config import API_VERSION, KIND
from nfqproxy.sources.endpointslice import SERVICE_NAME_LABEL
from nfqproxy.sources.iptables.chains import Picks
from nfqproxy.sources.iptables.ports import FamilyPorts, Port, PortName
from nfqproxy.sources.iptables.shares import weights
from nfqproxy.sources.iptables.text import Loss

Manifest: TypeAlias = dict[str, Any]
T = TypeVar("T")

ELSEWHERE = {Family.IPV4: "192.0.0.8", Family.IPV6: "100::8"}
"""Addresses that no packet gets to: the IPv4 dummy address (RFC 7600), and one of the discard-only
prefix (RFC 6666)."""
_NOT_HERE = "elsewhere"
"""Stands for the name of any other node."""


class ServiceManifests(Struct, frozen=True, kw_only=True):
    """What was made of one Service."""

    name: str
    """namespace/name."""
    origin: str
    line: int
    """Where the Service is first named."""
    objects: list[Manifest]
    """The Service, then its slices."""


class _Member(Struct, frozen=True, order=True):
    """An endpoint as it stands in a slice."""

    address: str
    weight: int = 1
    is_here: bool = False
    is_draining: bool = False
    is_hinted: bool = False
    """Only that which is hinted to this node is in KUBE-SVC."""
    is_foreign: bool = False
    """Hinted to another node, though it is here; or a stand-in for what is there."""


def services(
    families: Iterable[FamilyPorts], *, node_name: str, losses: list[Loss]
) -> list[ServiceManifests]:
    """Manifests of all service ports, sorted by Service."""
    found: dict[tuple[str, str], dict[PortName, dict[Family, Port]]] = {}
    for family in families:
        for name, port in family.ports.items():
            key = name.namespace, name.service
            found.setdefault(key, {}).setdefault(name, {})[family.family] = port
    return [
        made
        for key, ports in sorted(found.items())
        if (made := _Maker(key, ports, node_name, losses).made()) is not None
    ]


def node(name: str, addresses: Sequence[str]) -> Manifest:
    """A Node with these addresses."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in addresses]
        },
    }


def configuration(families: Iterable[FamilyPorts]) -> Manifest:
    """A configuration file by which nfqproxy does as this kube-proxy, as far as its rules show that."""
    families = list(families)
    found: Manifest = {"apiVersion": API_VERSION, "kind": KIND}
    networks = [text for family in families for text in family.detector.pod_networks]
    interfaces = {text: None for family in families for text in family.detector.pod_interfaces}
    if networks:
        found["clusterCIDR"] = ",".join(dict.fromkeys(networks))
    elif interfaces:
        name = next(iter(interfaces))
        by_prefix = name.endswith("+")
        field = "interfaceNamePrefix" if by_prefix else "bridgeInterface"
        found["detectLocalMode"] = field[:1].upper() + field[1:]
        found["detectLocal"] = {field: name.removesuffix("+")}
    if any(family.detector.masquerades_all for family in families):
        found["masqueradeAll"] = True
    addresses: dict[str, None] = {}
    for family in families:
        if family.node_ports.on_all:
            addresses["0.0.0.0/0" if family.family is Family.IPV4 else "::/0"] = None
        addresses |= family.node_ports.networks
        if family.node_ports.on_loopback and family.family is Family.IPV4:
            found["localhostNodePorts"] = True
    if addresses:
        found["nodePortAddresses"] = list(addresses)
    return found


class _Maker:
    """One Service."""

    def __init__(
        self,
        key: tuple[str, str],
        ports: dict[PortName, dict[Family, Port]],
        node_name: str,
        losses: list[Loss],
    ) -> None:
        self._namespace, self._name = key
        self._node = node_name
        self._losses = losses
        self._cluster_ips: dict[Family, str] = {}
        self._ports = {name: self._kept(name, ports[name]) for name in sorted(ports)}
        self._all = [port for each in self._ports.values() for port in each.values()]
        self._first = min(
            (port for each in ports.values() for port in each.values()),
            key=lambda port: (port.origin, port.line),
        )

    def _kept(self, name: PortName, by_family: dict[Family, Port]) -> dict[Family, Port]:
        """The families in which the port can be told: those of one cluster IP for all the ports."""
        kept: dict[Family, Port] = {}
        for family, port in by_family.items():
            if not port.cluster_ip:
                self._lose(port, f"{name}: no rule says its cluster IP")
            elif self._cluster_ips.setdefault(family, port.cluster_ip) != port.cluster_ip:
                self._lose(
                    port,
                    f"{name}: cluster IP {port.cluster_ip}, another port of the Service has"
                    f" {self._cluster_ips[family]}",
                )
            else:
                kept[family] = port
        return kept

    def made(self) -> ServiceManifests | None:
        if not self._all:
            return None
        slices, by_address = self._slices()
        return ServiceManifests(
            name=f"{self._namespace}/{self._name}",
            origin=self._first.origin,
            line=self._first.line,
            objects=[self._service(by_address), *slices],
        )

    def _service(self, by_address: dict[str, int]) -> Manifest:
        metadata: Manifest = {"name": self._name, "namespace": self._namespace}
        if by_address:
            metadata["annotations"] = {annotations.WEIGHTS: json.dumps(by_address)}
        ports = self._all
        vips = _merged(port.vips for port in ports)
        node_ports = any(port.node_port for port in ports)
        health_port = self._one("a health-check node port", lambda port: port.health_port) or 0
        ranges = [
            text
            for family in self._cluster_ips
            for text in self._one("source ranges", _ranges, self._of(family)) or ()
        ]
        is_balanced = bool(vips or ranges or health_port)
        cluster_ips = [self._cluster_ips[family] for family in sorted(self._cluster_ips)]
        spec: Manifest = {
            "type": "LoadBalancer" if is_balanced else "NodePort" if node_ports else "ClusterIP",
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": [f"IPv{int(family)}" for family in sorted(self._cluster_ips)],
            "ipFamilyPolicy": "RequireDualStack" if len(cluster_ips) > 1 else "SingleStack",
            "ports": [self._port(name, each) for name, each in self._ports.items() if each],
        }
        external_ips = _merged(port.external_ips for port in ports)
        self._check_addresses()
        if external_ips:
            spec["externalIPs"] = external_ips
        served = [port for port in ports if port.cluster or port.local or port.is_elsewhere]
        if self._any_local("internalTrafficPolicy", "is_internal_local", served):
            spec["internalTrafficPolicy"] = "Local"
        served = [port for port in served if port.node_port or port.external_ips or port.vips]
        if self._any_local("externalTrafficPolicy", "is_external_local", served):
            spec["externalTrafficPolicy"] = "Local"
        if ranges:
            spec["loadBalancerSourceRanges"] = ranges
        if health_port:
            spec["healthCheckNodePort"] = health_port
        affinity_s = self._one("an affinity time-out", _affinity_s)
        if affinity_s:
            self._check_affinity()
            spec["sessionAffinity"] = "ClientIP"
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": affinity_s}}
        found: Manifest = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": spec,
        }
        if vips:
            found["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in vips]}}
        return found

    def _port(self, name: PortName, by_family: dict[Family, Port]) -> Manifest:
        number = self._one(f"a number of {name}", lambda port: port.port, by_family.values())
        found: Manifest = {"name": name.port} if name.port else {}
        found |= {"protocol": name.protocol.name, "port": number}
        node_port = self._one(
            f"a node port of {name}", lambda port: port.node_port, by_family.values()
        )
        if node_port:
            found["nodePort"] = node_port
        return found

    def _of(self, family: Family) -> list[Port]:
        return [each[family] for each in self._ports.values() if family in each]

    def _one(
        self, what: str, value_of: Callable[[Port], T], ports: Iterable[Port] | None = None
    ) -> T | None:
        """The one value that these ports (all by default) have, where they have any."""
        first: T | None = None
        for port in self._all if ports is None else ports:
            value = value_of(port)
            if value and first is None:
                first = value
            elif value and value != first:
                self._lose(
                    port, f"{what} of {_shown(value)} beside {_shown(first)}; the first is taken"
                )
        return first

    def _any_local(self, policy: str, field: str, ports: list[Port]) -> bool:
        """Whether the policy is Local, which all ports with endpoints must then show."""
        found = [bool(getattr(port, field)) for port in ports]
        if any(found) and not all(found):
            self._lose(
                ports[found.index(False)],
                f"{policy} is Cluster here and Local for another port; Local is taken for all",
            )
        return any(found)

    def _check_addresses(self) -> None:
        """An address belongs to all ports of a Service; take down where a port has no rule for it."""
        for family in self._cluster_ips:
            ports = self._of(family)
            addresses = _merged((*port.external_ips, *port.vips) for port in ports)
            for port in ports:
                own = port.external_ips | port.vips
                if len(own) < len(addresses):
                    first = next(address for address in addresses if address not in own)
                    self._lose(
                        port,
                        f"no rule for {first}, which another port of the Service has; it is taken to have"
                        " all addresses of the others",
                    )

    def _check_affinity(self) -> None:
        """Affinity belongs to all ports of a Service; take down a port with endpoints that has none."""
        for port in self._all:
            if (port.cluster or port.local) and not _affinity_s(port):
                self._lose(port, "no affinity, unlike another port; it is taken to have it too")

    def _slices(self) -> tuple[list[Manifest], dict[str, int]]:
        """The slices, and the weights by address if that is how they can be told."""
        members = {
            (name, family): self._members(name, family, port)
            for name, by_family in self._ports.items()
            for family, port in by_family.items()
        }
        by_address: dict[str, set[int]] = defaultdict(set)
        for by_number in members.values():
            for each in by_number.values():
                for member in each:
                    by_address[member.address].add(member.weight)
        is_told_by_slice = any(len(found) > 1 for found in by_address.values())
        groups: dict[tuple[Family, int, int, tuple[_Member, ...]], list[Manifest]] = {}
        for (name, family), by_number in members.items():
            # The numbers of one port stand in slices of their own: there a name stands once.
            for nth, (number, every) in enumerate(sorted(by_number.items())):
                split: dict[int, list[_Member]] = defaultdict(list)
                for member in every:
                    split[member.weight if is_told_by_slice else 1].append(member)
                for weight, those in sorted(split.items()):
                    port = {"name": name.port, "protocol": name.protocol.name, "port": number}
                    groups.setdefault((family, nth, weight, tuple(those)), []).append(port)
        count: dict[Family, int] = defaultdict(int)
        slices = []
        for (family, _, weight, equals), ports in groups.items():
            count[family] += 1
            slices.append(self._slice(family, count[family], weight, equals, ports))
        if is_told_by_slice:
            return slices, {}
        return slices, {
            address: weight
            for address, found in sorted(by_address.items())
            for weight in found
            if weight != 1
        }

    def _slice(
        self,
        family: Family,
        number: int,
        weight: int,
        members: Iterable[_Member],
        ports: list[Manifest],
    ) -> Manifest:
        # No other Service's slice can have this name.
        name = f"{self._name}-ipv{int(family)}" + (f"-{number}" if number > 1 else "")
        metadata: Manifest = {
            "name": name,
            "namespace": self._namespace,
            "labels": {SERVICE_NAME_LABEL: self._name},
        }
        if weight != 1:
            metadata["annotations"] = {annotations.WEIGHT: str(weight)}
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": f"IPv{int(family)}",
            "ports": ports,
            "endpoints": [self._endpoint(member) for member in members],
        }

    def _endpoint(self, member: _Member) -> Manifest:
        is_ready = not member.is_draining
        found: Manifest = {
            "addresses": [member.address],
            "conditions": {"ready": True}
            if is_ready
            else {"ready": False, "serving": True, "terminating": True},
        }
        if member.is_here:
            found["nodeName"] = self._node
        elif member.is_foreign:
            found["nodeName"] = _NOT_HERE
        if member.is_hinted:
            hint = _NOT_HERE if member.is_foreign else self._node
            found["hints"] = {"forNodes": [{"name": hint}]}
        return found

    def _members(self, name: PortName, family: Family, port: Port) -> dict[int, list[_Member]]:
        """Endpoints by their port number."""
        cluster, local = _weighed(port.cluster), _weighed(port.local)
        here = local.keys() & cluster.keys()
        if any(
            cluster[one] * local[other] != cluster[other] * local[one]
            for one, other in itertools.pairwise(sorted(here))
        ):
            self._lose(port, f"{name}: other weights among the endpoints of this node; left out")
        found: dict[int, list[_Member]] = defaultdict(list)
        is_hinted = bool(here) and not local.keys() <= cluster.keys()
        for key, weight in (local | cluster).items():
            address, number = key
            found[number].append(
                _Member(
                    address=address,
                    weight=weight,
                    is_here=key in local,
                    is_draining=bool(cluster) and key not in cluster and not here,
                    is_hinted=is_hinted,
                    is_foreign=is_hinted and key not in cluster,
                )
            )
        if not found and port.is_elsewhere:
            found[port.port].append(_Member(address=ELSEWHERE[family], is_foreign=True))
        return found

    def _lose(self, port: Port, problem: str) -> None:
        service = f"Service {self._namespace}/{self._name}"
        self._losses.append(Loss(port.origin, port.line, f"{service}: {problem}"))


def _weighed(picks: Picks | None) -> dict[tuple[str, int], int]:
    """Weight by address and port, in the order of the rules."""
    found: dict[tuple[str, int], int] = {}
    if picks is not None:
        chances = weights([pick.probability for pick in picks.picks])
        for pick, weight in zip(picks.picks, chances, strict=True):
            if pick.address:
                key = pick.address, pick.port
                found[key] = found.get(key, 0) + weight
    return found


def _affinity_s(port: Port) -> int:
    return next((each.affinity_s for each in (port.cluster, port.local) if each), 0)


def _ranges(port: Port) -> tuple[str, ...]:
    return port.ranges


def _merged(addresses: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(addresses)))


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
