"""The packet's way through the node, hook by hook, as lines ``HOOK: what happens there``.

Names of chains, sets and maps are those of ``rules/``; which slots the fallback holds is asked of
:mod:`nfqproxy.core.fallback`, which also feeds the kernel.
"""

from collections import Counter
from collections.abc import Iterable

from nfqproxy.core.explain import marked
from nfqproxy.core.explain.candidates import host_port, listed
from nfqproxy.core.explain.case import CLIENT_WORDS, Case, Origin
from nfqproxy.core.explain.explanation import Candidate
from nfqproxy.core.explain.index import is_loopback
from nfqproxy.core.explain.packet import Packet
from nfqproxy.core.fallback import frontend_elements, slots
from nfqproxy.core.plans import is_served
from nfqproxy.model import ClientClass, Family, FrontendPlan, Protocol

Steps = tuple[str, ...]

_NEW = {
    Protocol.TCP: "SYNs (-p tcp --syn)",
    Protocol.UDP: "datagrams of unknown flows (-p udp)",
    Protocol.SCTP: "INIT chunks (-p sctp --chunk-types only INIT)",
}
_ENTRIES_SHOWN = 3


def to_backend(case: Case) -> Steps:
    """A backend is picked: the way there and back, and the way without a worker."""
    packet, origin = case.packet, case.origin
    return (
        *_queued(packet, origin, case.plan),
        *_worker(case),
        *_translated(case),
        *_towards_backend(case),
        *_postrouting(case),
        *_reply(case),
        _without_worker(case),
    )


def outside_source_ranges(
    packet: Packet, origin: Origin, plan: FrontendPlan, *, is_overlay: bool
) -> Steps:
    """The source is not among those that may connect."""
    hook = "OUTPUT" if origin.is_sent_here else "INPUT or FORWARD"
    guard = (
        f"nft {_table(packet)} check-source, by the original destination: {_key(packet)} is in guarded,"
        f" {packet.source} is not in allowed-sources -> drop"
    )
    silence = "reply: none; the client tries again until its time-out"
    if not is_served(plan):
        return (
            *_not_queued(packet, origin),
            f"filter {hook}: {guard}",
            silence,
            "without a worker: the same, this check is the kernel's own",
        )
    behind = "kube-proxy's rules drop it" if is_overlay else guard
    return (
        *_queued(packet, origin, plan),
        *_dropped_by_worker(
            packet,
            f"{packet.source} is in none of loadBalancerSourceRanges",
            f"filter {hook}: {behind}",
        ),
        silence,
        f"without a worker: {behind}",
    )


def _dropped_by_worker(packet: Packet, why: str, behind: str) -> Steps:
    if packet.protocol is Protocol.UDP:
        return (
            f"worker: {why}; it lets the datagram pass as it is, for a flow that conntrack knows goes on",
            behind,
        )
    return (f"worker: {why} -> drop",)


def refused(packet: Packet, origin: Origin, plan: FrontendPlan, state: str, hook: str) -> Steps:
    """There is no endpoint at all."""
    is_queued = is_served(plan)  # for clients of another class
    return (
        *(_queued(packet, origin, plan) if is_queued else _not_queued(packet, origin)),
        *_begins(origin),
        _no_slot(packet, origin, state),
        *_routing_untranslated(packet, hook),
        f"filter {hook}: nft {_table(packet)} refuse-{hook.lower()}: {_key(packet)} is in refusals ->"
        " reject",
        _unreachable(packet),
        "without a worker: the same, refusals are the kernel's own",
    )


def dropped(
    packet: Packet, origin: Origin, plan: FrontendPlan, why: str, hook: str, is_overlay: bool
) -> Steps:
    """Policy Local, and all endpoints are elsewhere."""
    silence = "reply: none, on purpose: a load balancer that tries again may reach a node with an endpoint"
    if is_served(plan):
        # Other classes of client are served here, so the packet is queued all the same.
        behind = "kube-proxy's rules drop it" if is_overlay else _refusals_drop(packet, hook)
        return (
            *_queued(packet, origin, plan),
            *_dropped_by_worker(
                packet,
                f"{CLIENT_WORDS[origin.client]} client ({origin.why}); {why}",
                f"filter {hook}: {behind}",
            ),
            silence,
            f"without a worker: {behind}",
        )
    return (
        *_not_queued(packet, origin),
        *_begins(origin),
        _no_slot(packet, origin, why),
        *_routing_untranslated(packet, hook),
        f"filter {hook}: {_refusals_drop(packet, hook)}",
        silence,
        "without a worker: the same, this is the kernel's own",
    )


def martian(packet: Packet, origin: Origin, *, is_guarded: bool) -> Steps:
    """A loopback address on the wire. ``is_guarded``: we have opened 127.0.0.0/8 to node ports."""
    if packet.family is Family.IPV6:
        way = "routing: never comes that far, IPv6 itself drops it (net/ipv6/ip6_input.c)"
    elif is_guarded and is_loopback(packet.destination):
        way = (
            f"raw {origin.hook}: before it, nft {_table(packet)} martians-prerouting drops what comes from"
            " outside for 127.0.0.0/8, so nothing of ours may translate it"
        )
    else:
        way = "routing: the kernel itself drops it as a martian (net/ipv4/route.c)"
    return (way, "reply: none", "without a worker: the same")


def no_such_port(packet: Packet, origin: Origin) -> Steps:
    """A Service's address, but none of its ports."""
    hook = "OUTPUT" if origin.is_sent_here else "FORWARD"
    return (
        *_not_queued(packet, origin),
        *_begins(origin),
        *_routing_untranslated(packet, hook),
        f"filter {hook}: nft {_table(packet)} refuse-{hook.lower()}: {packet.destination} is in cluster-ips"
        " -> reject",
        _unreachable(packet),
        "without a worker: the same, this is the kernel's own",
    )


def no_owner(packet: Packet, origin: Origin, network: str) -> Steps:
    """An address of the Services' range that no Service has."""
    hook = "OUTPUT" if origin.is_sent_here else "FORWARD"
    return (
        *_not_queued(packet, origin),
        *_begins(origin),
        *_routing_untranslated(packet, hook),
        f"filter {hook}: nft {_table(packet)} refuse-{hook.lower()}: {packet.destination} is in"
        f" service-cidrs ({network}) -> drop",
        "reply: none",
        "without a worker: the same, this is the kernel's own",
    )


def passed(packet: Packet, origin: Origin, *, is_overlay: bool) -> Steps:
    """Nothing of ours concerns it."""
    others = "kube-proxy's rules decide" if is_overlay else "no rule of ours matches"
    return (
        *_not_queued(packet, origin),
        f"conntrack {origin.hook}: a new connection",
        f"nat {origin.hook}: {others}",
        f"routing: by its own destination {packet.destination}",
        "without a worker: the same",
    )


def _table(packet: Packet) -> str:
    return "ip nfqproxy" if packet.family is Family.IPV4 else "ip6 nfqproxy"


def _member(packet: Packet) -> str:
    """As ipset lists it."""
    if packet.protocol is None:
        return packet.destination
    return f"{packet.destination},{packet.protocol.name.lower()}:{packet.port}"


def _key(packet: Packet) -> str:
    """As nft lists it."""
    word = packet.protocol.name.lower() if packet.protocol is not None else "icmp"
    return f"{word} . {packet.destination} . {packet.port}"


def _queued(packet: Packet, origin: Origin, plan: FrontendPlan) -> Steps:
    family, protocol = int(packet.family), plan.key.protocol
    if origin.marks:
        return marked.queued(origin.hook, _member(packet), family)
    flow = ""
    if protocol is Protocol.UDP:
        flow = f", and its flow is not yet in nfqproxy-flows-{family}"
    return (
        f"raw {origin.hook}: the last rules jump to NFQPROXY-QUEUE, which takes {_NEW[protocol]}",
        f"raw {origin.hook}: {_member(packet)} is in nfqproxy-frontends-{family}{flow} -> queue",
    )


def _not_queued(packet: Packet, origin: Origin) -> Steps:
    if packet.protocol is None:
        why = "not TCP, UDP or SCTP"
    else:
        why = f"{_member(packet)} is not in nfqproxy-frontends-{int(packet.family)}"
    if origin.marks:
        return marked.not_queued(origin.hook, why)
    return (f"raw {origin.hook}: {why} -> not queued",)


def _begins(origin: Origin) -> Steps:
    """What conntrack says, where it has not had its say before the queue."""
    return () if origin.marks else (marked.new_connection(origin.hook),)


def _no_slot(packet: Packet, origin: Origin, why: str) -> str:
    return f"nat {origin.hook}: the maps of nft {_table(packet)}: no slot for it, {why}"


def _refusals_drop(packet: Packet, hook: str) -> str:
    return f"nft {_table(packet)} refuse-{hook.lower()}: {_key(packet)} is in refusals -> drop"


def _routing_untranslated(packet: Packet, hook: str) -> Steps:
    match hook:
        case "OUTPUT":
            return ()
        case "INPUT":
            return (f"routing: {packet.destination} is this node's own",)
        case _:
            return (f"routing: {packet.destination} by whatever route the node has for it",)


def _unreachable(packet: Packet) -> str:
    name = "ICMP type 3 code 3" if packet.family is Family.IPV4 else "ICMPv6 type 1 code 4"
    seen = {
        Protocol.TCP: "connect() fails at once with ECONNREFUSED",
        Protocol.UDP: "the next call on a connected socket fails with ECONNREFUSED",
        Protocol.SCTP: "the association fails at once",
        None: "ping prints it",
    }[packet.protocol]
    return f"reply: {name}, port unreachable: {seen}"


def _worker(case: Case) -> Steps:
    plan = case.plan
    port = f":{plan.port_name}" if plan.port_name else ""
    affinity: Steps = ()
    if plan.affinity_timeout_s:
        affinity = (
            f"worker: ClientIP affinity: if {case.packet.source} connected to this port within the last"
            f" {plan.affinity_timeout_s} s and its backend is still among the candidates, it gets that one"
            " again; the chances below are those of a client without such a record",
        )
    left_out = (f"worker: no candidates: {case.left_out}",) if case.left_out else ()
    return (
        f"worker: the frontend is {plan.kind} {plan.key} of Service {plan.namespace}/{plan.service}{port}",
        f"worker: the client is {_a(CLIENT_WORDS[case.origin.client])}: {case.origin.why}",
        f"worker: {case.policy}; candidates: {case.candidates_are}",
        *left_out,
        *affinity,
        f"worker: {plan.balancer} picks "
        + listed(f"{_percent(backend)} {backend}" for backend in case.backends),
    )


def _a(word: str) -> str:
    return {"pod": "a pod", "node": "a process of this node", "external": "from outside"}[word]


def _percent(backend: Candidate) -> str:
    return f"{100 * backend.probability:.4g} %"


def _source_of(case: Case, backend: Candidate) -> str:
    """The source address the backend sees; "?" when it is the node's and not known here."""
    if not backend.masquerade:
        return case.packet.source
    if case.masquerade_source is None:
        return "?"
    return case.masquerade_source(backend.address) or "?"


def _translated(case: Case) -> Steps:
    """By the entry that the worker makes, or by the mark that it gives."""
    packet, origin = case.packet, case.origin
    if origin.marks:
        table, key = _table(packet), _key(packet)
        return (*marked.decided(origin.marks, origin.hook, table, key), *_entries(case))
    return (
        "worker: makes the conntrack entry by ctnetlink (CT_NEW), then accepts the packet",
        *_entries(case),
        _mangle(case),
        f"nat {origin.hook}: the entry's own binding rewrites the destination to the backend; no nat rule"
        " is asked, neither the fallback's nor kube-proxy's or the CNI's",
    )


def _entries(case: Case) -> Steps:
    possible = [backend for backend in case.backends if backend.probability > 0]
    shown = possible[:_ENTRIES_SHOWN]
    hint = "? is the client's port, kept where it is free"
    if any(_source_of(case, backend) == "?" for backend in shown):
        family = [a for a in case.node.primary_addresses if (":" in a) == (":" in shown[0].address)]
        guess = f", {family[0]} where that is the primary one" if family else ""
        hint += f"; dst=? is the node's address on its route to the backend{guess}"
    hook = f"conntrack {case.origin.hook}"
    finds = "the packet has now" if case.origin.marks else "the look-up finds"
    which = "an entry like one of these" if len(possible) > 1 else "this entry"
    more = len(possible) - len(shown)
    return (
        f"{hook}: {finds} {which}, as conntrack -L prints it ({hint})",
        *(f"{hook}: {_entry(case, backend)}" for backend in shown),
        *((f"{hook}: and alike for {more} more",) if more else ()),
    )


def _entry(case: Case, backend: Candidate) -> str:
    """Both directions as ``conntrack -L`` prints them, before the first answer."""
    packet, protocol = case.packet, case.plan.key.protocol
    state = {Protocol.TCP: " SYN_SENT", Protocol.UDP: "", Protocol.SCTP: " COOKIE_WAIT"}[protocol]
    return (
        f"{protocol.name.lower()} {int(protocol)} ?{state}"
        f" src={packet.source} dst={packet.destination} sport=? dport={packet.port} [UNREPLIED]"
        f" src={backend.address} dst={_source_of(case, backend)} sport={backend.port} dport=?"
    )


def _mangle(case: Case) -> str:
    hook = case.origin.hook
    if case.plan.key.protocol is not Protocol.UDP:
        return f"mangle {hook}: NFQPROXY-FLOWS remembers UDP only; nothing to do"
    member = f"{case.packet.source},udp:?,{case.packet.destination}"
    return (
        f"mangle {hook}: NFQPROXY-FLOWS adds {member} to nfqproxy-flows-{int(case.packet.family)}, so the"
        " next datagrams are not queued"
    )


def _towards_backend(case: Case) -> Steps:
    hooks: dict[str, list[Candidate]] = {"INPUT": [], "FORWARD": [], "OUTPUT": []}
    for backend in case.backends:
        if backend.probability > 0:
            hooks[_filter_hook(case, backend)].append(backend)
    steps = []
    for hook, backends in hooks.items():
        if not backends:
            continue
        places = listed(_place(backend) for backend in backends)
        way = "to the node's own socket" if hook == "INPUT" else "by the node's route"
        steps.append(f"routing: to the new destination, {way}: {places}")
        # Overlay mode has none; kube-proxy's are about its own chains.
        ours = "" if case.is_overlay else "our refusals look at untranslated connections only; "
        steps.append(
            f"filter {hook}: {ours}others' rules and network policies see the packet with the backend as its"
            " destination"
        )
    return tuple(steps)


def _filter_hook(case: Case, backend: Candidate) -> str:
    if case.origin.is_sent_here:
        return "OUTPUT"
    return "INPUT" if case.is_local(backend.address) else "FORWARD"


def _place(backend: Candidate) -> str:
    return f"{backend} on {backend.node}" if backend.node else str(backend)


def _postrouting(case: Case) -> Steps:
    possible = [b for b in case.backends if b.probability > 0]
    masqueraded = [b for b in possible if b.masquerade]
    kept = [b for b in possible if not b.masquerade and not case.is_local(b.address)]
    here = [b for b in possible if not b.masquerade and case.is_local(b.address)]

    def only(some: list[Candidate]) -> str:
        return "" if len(some) == len(possible) else f" for {listed(map(str, some))}"

    marks, table = case.origin.marks, _table(case.packet)
    steps = []
    if masqueraded:
        why = _why_masqueraded(case, masqueraded)
        sources = sorted({_source_of(case, backend) for backend in masqueraded})
        seen = "the node's address on the way there" if "?" in sources else " or ".join(sources)
        how = (
            marked.masqueraded(marks, table, seen)
            if marks
            else f"the entry's binding makes the source {seen}"
        )
        steps.append(f"nat POSTROUTING: {how}{only(masqueraded)} ({why})")
    if kept:
        how = (
            marked.kept(marks, table, case.packet.source)
            if marks
            else f"the source stays {case.packet.source}; the entry says so, and no masquerade rule of"
            " others is asked"
        )
        steps.append(f"nat POSTROUTING: {how}{only(kept)}")
    if here:
        steps.append(
            f"nat POSTROUTING: the source stays {case.packet.source}{only(here)}: nobody is masqueraded"
            " towards the node's own address"
        )
    if marks:
        ends = {
            "POSTROUTING" if _filter_hook(case, backend) != "INPUT" else "INPUT": None
            for backend in possible
        }
        steps += [marked.unmarked(table, hook) for hook in ends]
    return tuple(steps)


def _why_masqueraded(case: Case, backends: Iterable[Candidate]) -> str:
    row = list(backends)
    if case.plan.actions[case.origin.client].masquerade:
        if case.plan.kind == "ClusterIP":
            if case.node.masquerade_all:
                return "masqueradeAll"
            return "not a pod: the answer must come back by this node"
        return f"{case.plan.kind}: the answer must come back by this node"
    if any(backend.address == case.packet.source for backend in row):
        return "hairpin: the client was given itself, and would not know an answer from itself"
    return "the backend is outside the pod network, where nobody has a route to a pod"


def _reply(case: Case) -> Steps:
    packet = case.packet
    first = next(backend for backend in case.backends if backend.probability > 0)
    host, port = first.address, first.port
    target = _source_of(case, first)
    seen = "the node's address" if target == "?" else target
    back = f", the destination again {packet.source}" if first.masquerade else ""
    goal = "the process of this node" if case.origin.is_sent_here else packet.source
    origin_hook = "OUTPUT" if _is_answered_here(case, first) else "PREROUTING"
    table = "mangle" if case.origin.marks else "raw"
    come = (
        f"reply {table} {origin_hook}: {host} answers from port {port} to {seen}; not a first packet -> not"
        " queued",
        f"reply conntrack {origin_hook}: the reply direction of the entry matches",
    )
    return (
        *(reversed(come) if case.origin.marks else come),
        f"reply nat: the source becomes {packet.destination} port {packet.port} again{back}, and it goes to"
        f" {goal}; no later packet of the connection reaches userspace",
    )


def _is_answered_here(case: Case, backend: Candidate) -> bool:
    return case.is_local(backend.address)


def fallback_draw(plan: FrontendPlan, client: ClientClass) -> str:
    """How the kernel fallback picks for this class of client; the same for every packet of it."""
    elements = frontend_elements(plan).elements
    protocol = plan.key.protocol.name.lower()
    key = f"{protocol} . {plan.key.address} . {plan.key.port}"
    places = (f"slot-count-{CLIENT_WORDS[client]}", "slot-count")
    found = next((place for place in places if (place, key) in elements), "slot-count")
    row = plan.candidate_sets[plan.actions[client].candidates].backends
    dealt = Counter(slots(row))
    shares = listed(
        [
            f"{count} x {host_port(row[index].address, row[index].port)}"
            for index, count in dealt.items()
        ]
    )
    stays = " by a hash of the client's address" if plan.affinity_timeout_s else ""
    return (
        f"finds {key} in {found} and draws one of {_count(dealt.total(), 'slot')}{stays} ({shares})"
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _without_worker(case: Case) -> str:
    if case.is_overlay:
        return "without a worker: --queue-bypass lets the packet pass, and kube-proxy's rules translate it"
    return (
        f"without a worker: --queue-bypass lets the packet pass; nft {_table(case.packet)}"
        f" {case.origin.hook.lower()} {case.fallback}; postrouting masquerades by the same rule as the"
        " worker"
    )
