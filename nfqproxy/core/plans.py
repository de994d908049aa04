"""From service ports to frontend plans (SEMANTICS 2.5 to 2.9).

One plan per virtual address, protocol and port. A plan says for each class of client which candidate
set it draws from and whether its source is masqueraded, or that it is dropped or refused.
"""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from nfqproxy.control.node import NodeSettings
from nfqproxy.control.topology import CandidateEndpoints, candidate_sets, is_pickable
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    ClientClass,
    Endpoint,
    Family,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    ServicePort,
    TrafficPolicy,
    Verdict,
)

_REJECT = Action(verdict=Verdict.REJECT)
_DROP = Action(verdict=Verdict.DROP)
_CLUSTER_SET, _LOCAL_SET = 0, 1
_Actions = tuple[Action, Action, Action]
_LOOPBACK = "127.0.0.1"


def is_steered(port: ServicePort, settings: NodeSettings) -> bool:
    """Whether the service port is this proxy's business: beside kube-proxy only the marked ones."""
    return port.steered or settings.steer_all or not settings.is_overlay


def steered_ports(ports: Iterable[ServicePort], settings: NodeSettings) -> tuple[ServicePort, ...]:
    """The service ports that are this proxy's business."""
    if settings.steer_all or not settings.is_overlay:
        return tuple(ports)  # thousands, at every change
    return tuple(port for port in ports if is_steered(port, settings))


class Planner:
    """Computes plans for one node; remembers which backend addresses lie in a pod CIDR."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._networks = tuple(map(ip_network, node.pod_networks or node.cluster_cidrs))
        self._in_pod_network: dict[str, bool] = {}
        # kube-proxy has one detector for each family: pod CIDRs of one say nothing of the other.
        by_interface = bool(node.bridge_interface or node.interface_name_prefix)
        self._has_detector = {
            family: by_interface
            or any((":" in cidr) == (family is Family.IPV6) for cidr in node.cluster_cidrs)
            for family in Family
        }

    def plans_of(self, port: ServicePort) -> Iterable[tuple[int, FrontendPlan]]:
        """The plans of one port alone, each with the rank of its kind in the match order (2.5)."""
        for rank, kind in enumerate(FrontendKind):
            for plan in self._plans_of_kind(port, kind):
                yield rank, plan

    def _addresses(self, port: ServicePort, kind: FrontendKind) -> tuple[str, ...]:
        match kind:
            case FrontendKind.CLUSTER_IP:
                return (port.cluster_ip,)
            case FrontendKind.EXTERNAL_IP:
                return port.external_ips
            case FrontendKind.LOAD_BALANCER:
                return port.load_balancer_ips
            case FrontendKind.NODE_PORT:
                if not port.node_port:
                    return ()
                is_v6 = port.name.family is Family.IPV6
                accepted = tuple(
                    address
                    for address in self._node.node_port_addresses
                    if (":" in address) == is_v6
                )
                with_loopback = self._node.localhost_node_ports and not is_v6
                return (*accepted, _LOOPBACK) if with_loopback else accepted

    def _plans_of_kind(self, port: ServicePort, kind: FrontendKind) -> Iterable[FrontendPlan]:
        addresses = self._addresses(port, kind)
        if not addresses:
            return
        number = port.node_port if kind is FrontendKind.NODE_PORT else port.port
        found = candidate_sets(port, self._node.node_name, self._node.zone)
        cluster = self._candidates(found.cluster)
        # Often the same: then held once.
        local = cluster if found.local == found.cluster else self._candidates(found.local)
        sets = (cluster, local)
        if kind is FrontendKind.CLUSTER_IP:
            policy = port.internal_policy
            actions = self._internal_actions(port, _Pickable(found))
        else:
            policy = port.external_policy
            actions = _external_actions(port, _Pickable(found))
        for address in dict.fromkeys(addresses):
            is_loopback = kind is FrontendKind.NODE_PORT and address == _LOOPBACK
            yield FrontendPlan(
                key=FrontendKey(port.name.protocol, address, number),
                kind=kind,
                namespace=port.name.namespace,
                service=port.name.service,
                port_name=port.name.port_name,
                policy=policy,
                balancer=port.balancer,
                affinity_timeout_s=port.affinity_timeout_s,
                allowed_sources=self._allowed_sources(port, kind),
                candidate_sets=sets,
                actions=_only_node(actions) if is_loopback else actions,
            )

    def _allowed_sources(self, port: ServicePort, kind: FrontendKind) -> tuple[str, ...] | None:
        """SEMANTICS 2.8: the ranges bind load-balancer addresses only.

        Where they let this node in, a source equal to one of the Service's own load-balancer addresses
        is let in too: a node to which that address is bound uses it as source.
        """
        ranges = port.load_balancer_source_ranges
        if kind is not FrontendKind.LOAD_BALANCER or not ranges:
            return None
        networks = [ip_network(text) for text in ranges]
        own = [ip_address(text) for text in self._node.primary_addresses]
        if any(address in network for address in own for network in networks):
            hosts = (f"{vip}/{128 if ':' in vip else 32}" for vip in port.load_balancer_ips)
            return (*ranges, *hosts)
        return ranges

    def _internal_actions(self, port: ServicePort, found: "_Pickable") -> _Actions:
        """SEMANTICS 2.6."""
        if not found.has_any:
            return _REJECT, _REJECT, _REJECT
        is_local = port.internal_policy is TrafficPolicy.LOCAL
        always = self._node.masquerade_all
        outside = always or self._has_detector[port.name.family]

        def action(masquerade: bool) -> Action:
            return found.local(masquerade) if is_local else found.cluster(masquerade)

        return action(always), action(outside), action(outside)

    def _candidates(self, endpoints: Iterable[Endpoint]) -> CandidateSet:
        return CandidateSet(
            backends=tuple(
                Backend(
                    address=endpoint.address,
                    port=endpoint.port,
                    weight=endpoint.weight,
                    node=endpoint.node,
                    in_pod_network=self._is_in_pod_network(endpoint.address),
                )
                for endpoint in endpoints
            )
        )

    def _is_in_pod_network(self, address: str) -> bool:
        known = self._in_pod_network.get(address)
        if known is None:
            # Without pod CIDRs nothing tells a pod from another address: treat all alike.
            packed = ip_address(address)
            own = [network for network in self._networks if network.version == packed.version]
            known = not (own and self._node.masquerade_non_pod_backends) or any(
                packed in network for network in own
            )
            self._in_pod_network[address] = known
        return known


class _Pickable:
    """What a connection may come to, by the candidate sets of a service port."""

    def __init__(self, found: CandidateEndpoints) -> None:
        self._has_local = is_pickable(found.local)
        self.has_any = found.has_any

    def cluster(self, masquerade: bool) -> Action:
        """Draw from C."""
        return Action(verdict=Verdict.BACKEND, candidates=_CLUSTER_SET, masquerade=masquerade)

    def local(self, masquerade: bool) -> Action:
        """Draw from L; silence when all endpoints are elsewhere, since another node may have some."""
        if not self._has_local:
            return _DROP
        return Action(verdict=Verdict.BACKEND, candidates=_LOCAL_SET, masquerade=masquerade)


def _external_actions(port: ServicePort, found: _Pickable) -> _Actions:
    """SEMANTICS 2.7: clients inside the cluster ignore policy Local; masqueradeAll plays no part."""
    if not found.has_any:
        return _REJECT, _REJECT, _REJECT
    if port.external_policy is TrafficPolicy.CLUSTER:
        action = found.cluster(masquerade=True)
        return action, action, action
    return found.cluster(masquerade=False), found.cluster(masquerade=True), found.local(False)


def _only_node(actions: _Actions) -> _Actions:
    """SEMANTICS 2.7: only this node itself can mean its own loopback address."""
    own = actions[ClientClass.NODE]
    return (_DROP, own, _DROP) if own.verdict is Verdict.BACKEND else actions


def is_served(plan: FrontendPlan) -> bool:
    """True when some class of client gets a backend: such frontends are queue and fallback members."""
    return any(
        action.verdict is Verdict.BACKEND
        and any(backend.weight > 0 for backend in plan.candidate_sets[action.candidates].backends)
        for action in plan.actions
    )
