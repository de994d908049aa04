"""From a packet to its verdict and reason, by the plans that the worker decides by.

Everything is looked up by key, so that thousands of packets are explained in a second or two whatever
the number of Services. Order of the questions: can the packet arrive at all, has it a frontend (SEMANTICS
2.5), may its source connect (2.8), what does the plan say to its class of client (2.6, 2.7), and without
a frontend, is the address a Service's all the same (2.11).
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from random import Random

from nfqproxy import balancers
from nfqproxy.control.node import NodeSettings
from nfqproxy.core.explain import candidates, story
from nfqproxy.core.explain.case import CLIENT_WORDS, Case, MasqueradeSource, Origin
from nfqproxy.core.explain.explanation import Candidate, Explanation, MatchedFrontend
from nfqproxy.core.explain.index import AddressIndex, is_loopback, service_of
from nfqproxy.core.explain.packet import Packet
from nfqproxy.core.sources import AllowedSources, SourceClasses
from nfqproxy.errors import InputError
from nfqproxy.model import (
    Action,
    ClientClass,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    ServicePort,
    ServicePortName,
    TrafficPolicy,
    Verdict,
)

_POLICY_FIELD = {
    FrontendKind.CLUSTER_IP: "internalTrafficPolicy",
    FrontendKind.EXTERNAL_IP: "externalTrafficPolicy",
    FrontendKind.LOAD_BALANCER: "externalTrafficPolicy",
    FrontendKind.NODE_PORT: "externalTrafficPolicy",
}
_NO_SEED = Random(0)
_CLUSTER_SET = 0


class Explainer:
    """Answers for one node and one moment.

    ``ports`` and ``plans`` are the service table and the plans made of it. ``local_addresses``: addresses
    of the node beside those its context knows. Without ``masquerade_source`` the address that masqueraded
    connections get is told as unknown.
    """

    def __init__(
        self,
        *,
        node: NodeContext,
        settings: NodeSettings,
        ports: Iterable[ServicePort],
        plans: Mapping[FrontendKey, FrontendPlan],
        local_addresses: Iterable[str] = (),
        masquerade_source: MasqueradeSource | None = None,
    ) -> None:
        self._node = node
        self._is_overlay = settings.is_overlay
        self._marks = settings.marks
        self._is_guarded = settings.localhost_node_ports and not settings.is_overlay
        self.plans = plans
        self._index = AddressIndex(ports, node, local_addresses)
        self._classes = SourceClasses(
            node.pod_detector, [ip_address(address).packed for address in self._index.local]
        )
        self._masquerade_source = masquerade_source
        self._allowed: dict[FrontendKey, AllowedSources] = {}
        self._weighed: dict[tuple[FrontendKey, int], tuple[float, ...]] = {}
        self._backends: dict[tuple[FrontendKey, ClientClass], tuple[Candidate, ...]] = {}
        self._words: dict[tuple[FrontendKey, int], tuple[str, str]] = {}
        self._fallback: dict[tuple[FrontendKey, ClientClass], str] = {}

    def explain(self, packet: Packet) -> Explanation:
        """What happens to the first packet of a connection, and why."""
        origin = self._origin(packet)
        martian = self._martian(packet, origin)
        if martian is not None:
            return self._without_frontend(Verdict.DROP, origin, *martian)
        plan = None
        if packet.protocol is not None:
            plan = self.plans.get(FrontendKey(packet.protocol, packet.destination, packet.port))
        if plan is None:
            return self._unmatched(packet, origin)
        if plan.allowed_sources is not None:
            allowed = self._allowed.get(plan.key)
            if allowed is None:
                allowed = self._allowed[plan.key] = AllowedSources(plan.allowed_sources)
            if not allowed[ip_address(packet.source).packed]:
                return self._with_plan(
                    Verdict.DROP,
                    origin,
                    plan,
                    f"loadBalancerSourceRanges of {_service(plan)} do not hold {packet.source}"
                    f" ({candidates.listed(plan.allowed_sources)}): dropped in silence, whoever asks",
                    story.outside_source_ranges(packet, origin, plan, is_overlay=self._is_overlay),
                )
        return self._by_plan(packet, origin, plan)

    def _origin(self, packet: Packet) -> Origin:
        source, interface = packet.source, packet.interface
        is_local = self._index.is_local(source)
        is_sent_here = is_local and interface in (None, "lo")
        arriving = None if is_sent_here else interface
        client = self._classes.arriving_by(arriving)[ip_address(source).packed]
        return Origin(
            client=client,
            why=self._why(client, source, arriving),
            is_sent_here=is_sent_here,
            marks=self._marks,
        )

    def _why(self, client: ClientClass, source: str, interface: str | None) -> str:
        match client:
            case ClientClass.POD:
                if interface is not None and self._classes.is_pod_interface(interface):
                    return f"it comes in by {interface}, an interface of local pods"
                return f"{source} is in {self._index.pod_networks.holding(source)}, where pods are"
            case ClientClass.NODE:
                return f"{source} is an address of this node"
            case ClientClass.EXTERNAL:
                if not self._node.has_detector:
                    return f"{source} is not this node's, and nothing is configured that tells pods"
                if interface is None and not self._node.cluster_cidrs:
                    return (
                        f"{source} is not this node's, and pods are told by their interface,"
                        " of which nothing is said (IP%IFACE)"
                    )
                return f"{source} is neither a local pod's nor this node's"

    def _martian(self, packet: Packet, origin: Origin) -> tuple[str, tuple[str, ...]] | None:
        if origin.is_sent_here:
            return None
        for end, address in (("from", packet.source), ("to", packet.destination)):
            if is_loopback(address):
                reason = (
                    f"a packet {end} {address} that comes from outside the node is dropped: the kernel's"
                    " routing, or the guard of 127.0.0.0/8 where localhostNodePorts is on, lets nobody"
                    " else use the loopback address"
                )
                return reason, story.martian(packet, origin, is_guarded=self._is_guarded)
        return None

    def _by_plan(self, packet: Packet, origin: Origin, plan: FrontendPlan) -> Explanation:
        action = plan.actions[origin.client]
        who = _WHO[origin.client]
        policy = f"{_POLICY_FIELD[plan.kind]} {plan.policy}"
        what = f"{plan.kind} {plan.key} of {_service(plan)}"
        port = self._index.ports.get(_name_of(plan))
        goes_to_input = self._index.is_local(packet.destination)
        hook = "OUTPUT" if origin.is_sent_here else "INPUT" if goes_to_input else "FORWARD"
        match action.verdict:
            case Verdict.BACKEND:
                return self._to_backend(packet, origin, plan, action, port)
            case Verdict.REJECT:
                state = _no_candidates(port)
                return self._with_plan(
                    Verdict.REJECT,
                    origin,
                    plan,
                    f"{what}: {state}, so the client is told at once (ICMP port unreachable)",
                    story.refused(packet, origin, plan, state, hook),
                )
            case Verdict.DROP:
                state = candidates.local_set(port, self._node) if port else "no local endpoint"
                return self._with_plan(
                    Verdict.DROP,
                    origin,
                    plan,
                    f"{what}: {policy}, {who}, {state} while there are some elsewhere, so the packet is"
                    " dropped in silence",
                    story.dropped(
                        packet, origin, plan, f"{policy}: {state}", hook, self._is_overlay
                    ),
                )
            case Verdict.PASS:
                return self._with_plan(
                    Verdict.PASS,
                    origin,
                    plan,
                    f"{what} is left alone",
                    story.passed(packet, origin, is_overlay=self._is_overlay),
                )

    def _to_backend(
        self,
        packet: Packet,
        origin: Origin,
        plan: FrontendPlan,
        action: Action,
        port: ServicePort | None,
    ) -> Explanation:
        backends = self._candidates(packet, origin, plan, action)
        are, left_out = self._candidate_words(plan, action, port)
        place = (plan.key, origin.client)
        if place not in self._fallback:
            self._fallback[place] = (
                "" if self._is_overlay else story.fallback_draw(plan, origin.client)
            )
        case = Case(
            packet=packet,
            origin=origin,
            plan=plan,
            backends=backends,
            policy=_policy_words(plan, action),
            candidates_are=are,
            left_out=left_out,
            fallback=self._fallback[place],
            node=self._node,
            is_overlay=self._is_overlay,
            is_local=self._index.is_local,
            masquerade_source=self._masquerade_source,
        )
        return self._with_plan(
            Verdict.BACKEND,
            origin,
            plan,
            f"{plan.kind} {plan.key} of {_service(plan)}: {case.policy}; candidates for"
            f" {_WHO[origin.client]}: {are}; {_source_words(case, action)}",
            story.to_backend(case),
            backends,
        )

    def _candidates(
        self, packet: Packet, origin: Origin, plan: FrontendPlan, action: Action
    ) -> tuple[Candidate, ...]:
        row = plan.candidate_sets[action.candidates].backends
        is_hairpin = any(backend.address == packet.source for backend in row)
        place = (plan.key, origin.client)
        if not is_hairpin and place in self._backends:
            return self._backends[place]
        weights = self._probabilities(plan, action.candidates)
        is_pod = origin.client is ClientClass.POD
        found = tuple(
            Candidate(
                address=backend.address,
                port=backend.port,
                weight=backend.weight,
                probability=probability,
                # As the worker has it from the routes: towards the node itself there is no masquerade.
                masquerade=not self._index.is_local(backend.address)
                and (
                    action.masquerade
                    or backend.address == packet.source
                    or (is_pod and not backend.in_pod_network)
                ),
                node=backend.node,
            )
            for backend, probability in zip(row, weights, strict=True)
        )
        if not is_hairpin:
            self._backends[place] = found
        return found

    def _probabilities(self, plan: FrontendPlan, candidate_set: int) -> tuple[float, ...]:
        place = (plan.key, candidate_set)
        if place not in self._weighed:
            try:
                balancer = balancers.create(plan.balancer)
            except InputError as error:
                raise InputError(f"Service {plan.namespace}/{plan.service}: {error}") from None
            row = plan.candidate_sets[candidate_set].backends
            balancer.update([backend.weight for backend in row], _NO_SEED)
            self._weighed[place] = balancer.probabilities()
        return self._weighed[place]

    def _candidate_words(
        self, plan: FrontendPlan, action: Action, port: ServicePort | None
    ) -> tuple[str, str]:
        place = (plan.key, action.candidates)
        if place not in self._words:
            row = plan.candidate_sets[action.candidates].backends
            if port is None:
                self._words[place] = (candidates.endpoints(len(row)), "")
            else:
                name_it = (
                    candidates.cluster_set
                    if action.candidates == _CLUSTER_SET
                    else candidates.local_set
                )
                chosen = frozenset((backend.address, backend.port) for backend in row)
                self._words[place] = (
                    name_it(port, self._node),
                    candidates.left_out(port, chosen),
                )
        return self._words[place]

    def _unmatched(self, packet: Packet, origin: Origin) -> Explanation:
        """SEMANTICS 2.11; what the node itself owns goes to its own sockets."""
        index, address = self._index, packet.destination
        owner = index.cluster_ips.get(address)
        goes_to_input = not origin.is_sent_here and index.is_local(address)
        if self._is_overlay:
            whom = owner or index.outer_ips.get(address) or self._node_port_owner(packet)
            reason = (
                f"{packet} of Service {service_of(whom)} is no steered frontend that is served;"
                " kube-proxy decides"
                if whom
                else f"no steered Service has {packet}; left alone"
            )
        elif owner is not None and not goes_to_input:
            reason = (
                f"{address} is the ClusterIP of {service_of(owner)}, which has no port"
                f" {_port_words(packet)}: the client is told at once (ICMP port unreachable)"
            )
            return self._without_frontend(
                Verdict.REJECT, origin, reason, story.no_such_port(packet, origin)
            )
        elif not goes_to_input and (network := index.service_networks.holding(address)) is not None:
            reason = f"{address} is in the ServiceCIDR {network} and belongs to no Service: dropped"
            return self._without_frontend(
                Verdict.DROP, origin, reason, story.no_owner(packet, origin, network)
            )
        else:
            reason = self._why_left_alone(packet)
        steps = story.passed(packet, origin, is_overlay=self._is_overlay)
        return self._without_frontend(Verdict.PASS, origin, reason, steps)

    def _node_port_owner(self, packet: Packet) -> ServicePortName | None:
        if packet.protocol is None or not self._index.is_local(packet.destination):
            return None
        return self._index.node_ports.get((packet.protocol, packet.port, packet.family))

    def _why_left_alone(self, packet: Packet) -> str:
        address = packet.destination
        of_node_port = self._node_port_owner(packet)
        if of_node_port is not None:
            switch = "localhostNodePorts" if is_loopback(address) else "nodePortAddresses"
            return (
                f"{packet.port} is the nodePort of {service_of(of_node_port)}, but {switch} does not"
                f" serve node ports on {address}: left to the node's own sockets"
            )
        outer = self._index.outer_ips.get(address)
        if outer is not None:
            return (
                f"{address} is an external address of {service_of(outer)}, which has no port"
                f" {_port_words(packet)}; other ports of such addresses are left alone"
            )
        if self._index.is_local(address):
            return f"{address} is this node's, and no Service has {_port_words(packet)} there"
        return f"no Service has {packet}; left alone"

    def _with_plan(
        self,
        verdict: Verdict,
        origin: Origin,
        plan: FrontendPlan,
        reason: str,
        steps: tuple[str, ...],
        backends: tuple[Candidate, ...] = (),
    ) -> Explanation:
        return Explanation(
            verdict=verdict,
            frontend=MatchedFrontend(
                kind=plan.kind,
                namespace=plan.namespace,
                service=plan.service,
                port_name=plan.port_name,
            ),
            client=CLIENT_WORDS[origin.client],
            policy=plan.policy,
            backends=backends,
            reason=reason,
            steps=steps,
        )

    def _without_frontend(
        self, verdict: Verdict, origin: Origin, reason: str, steps: tuple[str, ...]
    ) -> Explanation:
        return Explanation(
            verdict=verdict,
            frontend=None,
            client=CLIENT_WORDS[origin.client],
            policy=None,
            backends=(),
            reason=reason,
            steps=steps,
        )


_WHO = {
    ClientClass.POD: "a pod",
    ClientClass.NODE: "a process of this node",
    ClientClass.EXTERNAL: "a client from outside",
}


def _service(plan: FrontendPlan) -> str:
    port = f":{plan.port_name}" if plan.port_name else ""
    return f"{plan.namespace}/{plan.service}{port}"


def _name_of(plan: FrontendPlan) -> ServicePortName:
    return ServicePortName(
        plan.namespace, plan.service, plan.port_name, plan.key.protocol, plan.key.family
    )


def _port_words(packet: Packet) -> str:
    if packet.protocol is None:
        return "that answers a ping"
    return f"{packet.port}/{packet.protocol.name.lower()}"


def _no_candidates(port: ServicePort | None) -> str:
    if port is None or not port.endpoints:
        return "it has no endpoints"
    if any(e.ready or (e.serving and e.terminating) for e in port.endpoints):
        return "all its endpoints are drained (weight 0)"
    return f"none of its {candidates.endpoints(len(port.endpoints))} is ready or still serving"


def _policy_words(plan: FrontendPlan, action: Action) -> str:
    policy = f"{_POLICY_FIELD[plan.kind]} {plan.policy}"
    if plan.kind is not FrontendKind.CLUSTER_IP and (
        plan.policy is TrafficPolicy.LOCAL and action.candidates == _CLUSTER_SET
    ):
        return f"{policy} binds only clients from outside"
    return policy


def _source_words(case: Case, action: Action) -> str:
    some = sum(backend.masquerade for backend in case.backends)
    if not some:
        return "the backend sees the client's address"
    if action.masquerade:
        here = ", but for the backends on this node itself"
        return "masqueraded" + (here if some < len(case.backends) else "")
    if some == len(case.backends):
        return "masqueraded, for the backend is the client itself or no pod"
    return "masqueraded only where the backend is the client itself or no pod"
