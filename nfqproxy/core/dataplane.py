"""The per-packet path: from a batch of queued packets to what translates them.

Theory of operation. A snapshot of frontend plans is compiled into nested look-ups::

    protocol -> (packed address + port) -> one action per client class -> pick() -> (target, masquerade)

and every target (one backend of one frontend) carries message templates, made when it is first picked,
or on the data path ``mark`` the bits of the packet mark that stand for it.
``_decide`` is one flat loop over rows: packet id, addresses and ports. It deliberately uses no helper
calls, properties or objects per packet: at some 10 microseconds a connection, of which the kernel takes
the larger part, each Python call shows. Rows come from ``AlikePackets``, where a whole batch is known
to be of one kind, or from ``_parse``, which takes anything apart. ``tests/unit/core/reference.py`` holds
the slow and obvious function of the same meaning, and hypothesis holds them equal.

``assemble`` gives CT_NEW messages, ``mark`` the marks of packets; both by the same loop.

A packet for which no entry or mark is made (unknown frontend, nothing to pick, a balancer that raised, a datagram
that no new flow may begin with) is accepted all the same, and what stands behind the queue (the kernel's
fallback and refusals, or kube-proxy) decides.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from random import Random
from struct import Struct
from struct import error as struct_error
from typing import NamedTuple
from weakref import WeakSet

from nfqproxy import balancers
from nfqproxy.core import template
from nfqproxy.core.affinity import Affinity, AffinityRecord, Identity, ServiceKey
from nfqproxy.core.draws import SharedDraws
from nfqproxy.core.flow_memory import FLOW_BYTES, LIFE_S, FlowMemory
from nfqproxy.core.marks import FrontendMarks
from nfqproxy.core.sources import (
    AllowedSources,
    Interfaces,
    PodArrivals,
    SourceClasses,
    SourceClassifier,
)
from nfqproxy.errors import CodecError
from nfqproxy.model import (
    CandidateSet,
    ClientClass,
    FrontendKey,
    FrontendPlan,
    MarkMask,
    Protocol,
    Verdict,
)
from nfqproxy.wire import packet

QueuedPacket = tuple[int, int, bytes]
"""(packet id, interface it came in by, packet from the IP header on).

The first two are as the reader gives them: its ``answer`` takes the id, its ``arrived_by`` the interface.
"""

Row = tuple[int, bytes, bytes, bytes, bytes]
"""(packet id, source, destination, source port, destination port), as they stand in the packet."""


class AlikePackets(Sequence[QueuedPacket]):
    """A batch known to be unfragmented packets of one IP version and one protocol, without options or
    extension headers, each long enough for its flow (core.flow_memory). Good until the next is read.
    """

    protocol: int

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """One row a packet, in order."""

    @abstractmethod
    def flows(self) -> dict[int, bytes]:
        """Packet id -> source, destination and the bytes from the transport header on that tell a flow."""


# RFC 791 without options: version/IHL, fragment bits, protocol, addresses, then the ports.
_IPV4_PORTS = Struct("!6xHxB2x4s4s2s2s").unpack_from
# RFC 8200 without extension headers: next header, addresses, then the ports.
_IPV6_PORTS = Struct("!6xBx16s16s2s2s").unpack_from
_FRAGMENT_OFFSET = 0x1FFF
_UDP = Protocol.UDP.value
_NO_FLOWS: Mapping[int, bytes] = {}

Run = tuple[int, SourceClassifier, Iterable[Row]]
"""Protocol, what classifies the sources, the packets."""


def _pick_nothing() -> int:
    return -1


class Target:
    """One backend of one frontend, with the message templates of connections to it."""

    __slots__ = ("__weakref__", "address", "keep", "mark", "masquerade", "picks", "port")

    def __init__(self, address: bytes, port: int) -> None:
        self.address = address
        self.port = port
        self.keep: template.Template | None = None
        self.masquerade: template.Template | None = None
        self.mark = 0
        """Bits of the packet mark that stand for this target, 0: none do (any more)."""
        self.picks = 0


class Sticky(NamedTuple):
    """What affinity needs of one candidate set."""

    affinity: Affinity
    row: dict[Identity, int]
    """Index of every backend that may be drawn."""
    identities: list[Identity]


Action = tuple[Callable[[], int], list[tuple[Target, bool]], Sticky | None]
"""pick; in its order, the targets each with "masquerade the client"; affinity, if any."""


_PASS: Action = (_pick_nothing, [], None)


class Frontend:
    """A compiled plan; the plan itself is not kept, it is larger than this."""

    __slots__ = ("actions", "address", "allowed", "key", "port", "targets")

    def __init__(self, plan: FrontendPlan) -> None:
        self.key = plan.key
        self.address = ip_address(plan.key.address).packed
        self.port = plan.key.port
        self.targets: dict[tuple[bytes, int], Target] = {}
        # Packed source -> may it connect; None: everybody may.
        self.allowed = (
            None if plan.allowed_sources is None else AllowedSources(plan.allowed_sources)
        )
        # By ClientClass: an action, or None to drop.
        self.actions: list[Action | None] = [None, None, None]


class Dataplane:
    """Holds the compiled snapshot and the counters of the packet path.

    ``masquerade_source`` maps a packed backend address to the packed address that backend shall see of
    masqueraded clients: None when the node has no route to it, empty when the backend is on the node
    itself, where nobody is masqueraded. ``interfaces`` are asked only where the detector of pods goes by
    them. ``mask`` is that of the data path ``mark``, None on the other; ``shared_seed`` is the same in all workers
    of a proxy (core/draws.py).
    """

    def __init__(
        self,
        *,
        rng: Random,
        classes: SourceClasses,
        interfaces: Interfaces,
        masquerade_source: Callable[[bytes], bytes | None],
        mask: MarkMask | None = None,
        shared_seed: int = 0,
    ) -> None:
        self._rng = rng
        # What other workers may have to decide at the same moment: a client's first backend, and by marks,
        # where no entry tells, every flow.
        self._draws = SharedDraws(shared_seed)
        self._draws_flows = mask is not None
        self._interfaces = interfaces
        self.set_classes(classes)
        self._masquerade_source = masquerade_source
        self._tables: dict[int, dict[bytes, Frontend]] = {protocol: {} for protocol in Protocol}
        self._affinities: dict[ServiceKey, Affinity] = {}
        self._mask = mask or MarkMask()
        # Flow -> its target and the bits it was marked with.
        self._flows: FlowMemory[tuple[Target, int]] = FlowMemory()
        # Weak: a backend that leaves takes its templates along.
        self._masqueraded: WeakSet[Target] = WeakSet()
        self.unknown = 0
        """Packets whose frontend has no plan (any more)."""
        self.unparsed = 0
        """Packets whose headers could not be read."""
        self.failed_picks = 0
        """Packets for which the balancer raised."""
        self.no_route = 0
        """Connections to be masqueraded without a route to the backend: left to what stands behind."""
        self.unmarked = 0
        """Connections to a backend that no mark stands for: left to what stands behind."""
        self.source_range_dropped = 0
        """SYNs and INITs whose source is in no source range; all else of this sort the kernel counts."""
        self.no_local_endpoint_dropped = 0
        """SYNs and INITs of clients that a Local policy leaves no endpoint; the same."""

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables.values())

    @staticmethod
    def _table_key(key: FrontendKey) -> bytes:
        return ip_address(key.address).packed + key.port.to_bytes(2)

    def upsert(self, plans: Iterable[FrontendPlan]) -> None:
        """Add or replace frontends; targets that stay keep their templates and counters."""
        for plan in plans:
            table = self._tables[plan.key.protocol]
            key = self._table_key(plan.key)
            frontend = Frontend(plan)
            previous = table.get(key)
            kept = previous.targets if previous else {}
            self._compile(plan, frontend, kept)
            table[key] = frontend
            _unmark(target for each, target in kept.items() if each not in frontend.targets)

    def remove(self, keys: Iterable[FrontendKey]) -> None:
        """Forget frontends; unknown keys are fine."""
        for key in keys:
            gone = self._tables[key.protocol].pop(self._table_key(key), None)
            if gone is not None:
                _unmark(gone.targets.values())

    def clear(self) -> None:
        """Forget all frontends."""
        for table in self._tables.values():
            table.clear()
        self._flows.clear()

    def set_marks(self, frontends: Iterable[FrontendMarks]) -> None:
        """Take the marks that stand for the backends of these frontends, instead of all they had."""
        for each in frontends:
            frontend = self._tables[each.key.protocol].get(self._table_key(each.key))
            if frontend is None:
                continue
            _unmark(frontend.targets.values())
            for mark, (address, port) in each.marks.items():
                target = frontend.targets.get((ip_address(address).packed, port))
                if target is not None:
                    target.mark = mark

    def set_classes(self, classes: SourceClasses) -> None:
        """Replace the classification of sources (another detector, or other addresses of the node)."""
        self._by_address = classes.by_address
        self._pods = classes.pods
        self._arrivals = (
            PodArrivals(classes, self._interfaces) if classes.detector.is_by_interface else None
        )

    def forget_masquerade_sources(self) -> None:
        """Routes or addresses changed: look every masquerade source up again at its next use."""
        for target in self._masqueraded:
            target.masquerade = None
        self._masqueraded.clear()

    def has_backend(self, key: bytes, protocol: int, address: bytes, port: int) -> bool:
        """True when the frontend (packed address + port) counts address:port among its candidates."""
        table = self._tables.get(protocol)
        frontend = table.get(key) if table is not None else None
        return frontend is not None and (address, port) in frontend.targets

    @property
    def has_affinity(self) -> bool:
        """True when some frontend has ClientIP affinity, so that ``assemble`` needs the time."""
        return bool(self._affinities)

    def take_affinity(self) -> list[AffinityRecord]:
        """Affinity records made or refreshed since the last call, for the other workers."""
        return [
            record
            for affinity in self._affinities.values()
            if affinity.has_fresh
            for record in affinity.take_fresh()
        ]

    def put_affinity(self, records: Iterable[AffinityRecord]) -> None:
        """Take records that others made; those of service ports without affinity are ignored."""
        for record in records:
            affinity = self._affinities.get(record.service)
            if affinity is not None:
                affinity.put(record.client, (record.address, record.port), record.last_s)

    def expire_affinity(self, now_s: float) -> None:
        """Forget affinity records that count no longer."""
        for affinity in self._affinities.values():
            affinity.expire(now_s)

    def _sticky(self, plan: FrontendPlan, candidates: CandidateSet) -> Sticky | None:
        if not plan.affinity_timeout_s:
            return None
        key = (plan.namespace, plan.service, plan.port_name, int(plan.key.protocol))
        affinity = self._affinities.get(key)
        if affinity is None:
            affinity = self._affinities[key] = Affinity(key, plan.affinity_timeout_s, self._draws)
        affinity.timeout_s = plan.affinity_timeout_s
        identities = [
            (ip_address(backend.address).packed, backend.port) for backend in candidates.backends
        ]
        row = {
            identity: index
            for index, (identity, backend) in enumerate(
                zip(identities, candidates.backends, strict=True)
            )
            if backend.weight > 0
        }
        return Sticky(affinity, row, identities)

    def _chance(self, plan: FrontendPlan) -> Random:
        """What the picks of this frontend are drawn from."""
        return self._draws if plan.affinity_timeout_s or self._draws_flows else self._rng

    def picks(self) -> dict[tuple[FrontendKey, bytes, int], int]:
        """Picks so far per frontend and backend, zero ones left out."""
        return {
            (frontend.key, target.address, target.port): target.picks
            for table in self._tables.values()
            for frontend in table.values()
            for target in frontend.targets.values()
            if target.picks
        }

    def _compile(
        self, plan: FrontendPlan, frontend: Frontend, kept: dict[tuple[bytes, int], Target]
    ) -> None:
        # Backends of both candidate sets share their targets.
        target_lists: list[list[tuple[Target, bool]]] = []
        for candidates in plan.candidate_sets:
            row = []
            for backend in candidates.backends:
                identity = (ip_address(backend.address).packed, backend.port)
                target = frontend.targets.get(identity) or kept.get(identity) or Target(*identity)
                frontend.targets[identity] = target
                row.append((target, not backend.in_pod_network))
            target_lists.append(row)
        stickies = [self._sticky(plan, candidates) for candidates in plan.candidate_sets]
        # Each is made once, however many classes of client use it; a set that none uses has no picker.
        pickers: dict[int, Callable[[], int]] = {}
        actions: dict[tuple[int, bool, bool], Action] = {}
        for client_class in ClientClass:
            action = plan.actions[client_class]
            if action.verdict is Verdict.DROP:
                continue
            if action.verdict is not Verdict.BACKEND:
                # Refused or left alone: the packet passes, and the kernel's own rules decide.
                frontend.actions[client_class] = _PASS
                continue
            number = action.candidates
            if number not in pickers:
                balancer = balancers.create(plan.balancer)
                weights = [backend.weight for backend in plan.candidate_sets[number].backends]
                balancer.update(weights, self._chance(plan))
                pickers[number] = balancer.pick
            outside_counts = client_class is ClientClass.POD
            kind = (number, action.masquerade, outside_counts and not action.masquerade)
            if kind not in actions:
                actions[kind] = (
                    pickers[number],
                    [
                        (target, action.masquerade or (outside_counts and is_outside))
                        for target, is_outside in target_lists[number]
                    ],
                    stickies[number],
                )
            frontend.actions[client_class] = actions[kind]

    def _template(
        self, frontend: Frontend, target: Target, *, masquerade: bool
    ) -> template.Template | None:
        """Make the template that a target still lacks; None without a route to it.

        An entry without the source it needs would outlive the lack of a route, and the connection
        would stay broken. Nothing is remembered: the next packet asks again.
        """
        source = self._masquerade_source(target.address) if masquerade else None
        if masquerade and source is None:
            self.no_route += 1
            return None
        made = template.build(
            protocol=frontend.key.protocol,
            frontend=(frontend.address, frontend.port),
            backend=(target.address, target.port),
            masquerade_source=source or None,
        )
        if masquerade:
            target.masquerade = made
            self._masqueraded.add(target)
        else:
            target.keep = made
        return made

    def assemble(
        self, packets: Sequence[QueuedPacket], now_s: float = 0.0
    ) -> tuple[list[bytes], list[int]]:
        """Decide a batch; ``now_s`` is the time affinity counts by.

        Returns the CT_NEW messages in packet order, all with sequence number 0, and the ids of
        packets to drop; every other packet is to be accepted once the messages have been handled.
        """
        entries: list[bytes] = []
        dropped: list[int] = []
        for protocol, classes, rows in self._runs(packets, None):
            self._decide(protocol, classes, rows, now_s, entries, dropped, None, _NO_FLOWS)
        return entries, dropped

    def mark(
        self, packets: Sequence[QueuedPacket], now_s: float
    ) -> tuple[dict[int, int], list[int]]:
        """Decide a batch by marks; ``now_s`` is the time that affinity and flows count by.

        Returns packet id -> the bits to mark it with, and the ids of packets to drop; every other packet is
        to be accepted as it is.
        """
        marks: dict[int, int] = {}
        dropped: list[int] = []
        flows: dict[int, bytes] = {}
        for protocol, classes, rows in self._runs(packets, flows):
            self._decide(protocol, classes, rows, now_s, [], dropped, marks, flows)
        return marks, dropped

    def _runs(
        self, packets: Sequence[QueuedPacket], flows: dict[int, bytes] | None
    ) -> Iterable[Run]:
        """The batch in parts of one protocol and one way to classify sources; ``flows`` is filled."""
        if self._arrivals is None:
            if isinstance(packets, AlikePackets):
                if flows is not None:
                    flows.update(packets.flows())
                return ((packets.protocol, self._by_address, packets.rows()),)
        else:
            self._arrivals.refresh()
        return self._parse(packets, flows)

    def _parse(
        self, packets: Iterable[QueuedPacket], flows: dict[int, bytes] | None
    ) -> Iterable[Run]:
        """Rows of packets of any kind; what cannot be read is counted and left out."""
        tables, arrivals = self._tables, self._arrivals
        classes = self._by_address
        runs: list[Run] = []
        last: tuple[int, SourceClassifier | None] = -1, None
        rows: list[Row] = []
        for packet_id, arrival, payload in packets:
            try:
                first = payload[0]
                if first == 0x45:
                    transport = 20
                    fragment, protocol, src, dst, sport, dport = _IPV4_PORTS(payload)
                    if fragment & _FRAGMENT_OFFSET:
                        self.unparsed += 1
                        continue
                elif first >> 4 == 6 and payload[6] in tables:
                    transport = 40
                    protocol, src, dst, sport, dport = _IPV6_PORTS(payload)
                else:
                    headers = packet.parse(payload)
                    if headers.is_fragment:
                        self.unparsed += 1
                        continue
                    transport = headers.transport_offset
                    protocol, src, dst = headers.protocol, headers.src, headers.dst
                    sport, dport = headers.src_port.to_bytes(2), headers.dst_port.to_bytes(2)
            except (struct_error, IndexError, CodecError):
                self.unparsed += 1
                continue
            if protocol not in tables:
                self.unknown += 1
                continue
            if flows is not None:
                flow_end = transport + FLOW_BYTES[protocol]
                flows[packet_id] = src + dst + payload[transport:flow_end]
            if arrivals is not None:
                classes = self._pods if arrivals[arrival] else self._by_address
            if protocol != last[0] or classes is not last[1]:
                last = protocol, classes
                rows = []
                runs.append((protocol, classes, rows))
            rows.append((packet_id, src, dst, sport, dport))
        return runs

    def _decide(
        self,
        protocol: int,
        classes: SourceClassifier,
        rows: Iterable[Row],
        now_s: float,
        entries: list[bytes],
        dropped: list[int],
        marks: dict[int, int] | None,
        flows: Mapping[int, bytes],
    ) -> None:
        """The flat loop: append the messages that ``rows`` bring about, and the ids to drop.

        With ``marks`` no messages, but the bits of each packet's mark go there.
        """
        append = entries.append
        known_classes = classes.known
        table = self._tables[protocol]
        if marks is not None:
            older = self._flows.turn(now_s)
            recent = self._flows.recent
            draw_about, period = self._draws.about, int(now_s // LIFE_S)
            to_masquerade, to_keep = self._mask.masquerade, self._mask.keep
        for packet_id, src, dst, sport, dport in rows:
            try:
                frontend = table[dst + dport]
            except KeyError:
                self.unknown += 1
                continue
            # A datagram that may not begin a flow may belong to one that exists, which conntrack tells:
            # what stands behind the queue looks at new connections only.
            if frontend.allowed is not None and not frontend.allowed[src]:
                if protocol != _UDP:
                    self.source_range_dropped += 1
                    dropped.append(packet_id)
                continue
            try:
                action = frontend.actions[known_classes[src]]
            except KeyError:
                action = frontend.actions[classes.classify(src)]
            if action is None:
                if protocol != _UDP:
                    self.no_local_endpoint_dropped += 1
                    dropped.append(packet_id)
                continue
            if marks is not None:
                flow = flows[packet_id]
                known = recent.get(flow) or older(flow)
                # A backend that has left since then has no mark any more.
                if known is not None and known[0].mark:
                    marks[packet_id] = known[1]
                    continue
                draw_about(flow, period)
            pick, targets, sticky = action
            try:
                if sticky is None:
                    index = pick()
                else:
                    affinity, row, identities = sticky
                    index = affinity.choose(src, now_s, row, pick, identities)
                if index < 0:
                    continue
                target, masquerade = targets[index]
            except Exception:  # a balancer is foreign code: its failure costs this choice only
                self.failed_picks += 1
                continue
            if marks is not None:
                if not target.mark:
                    self.unmarked += 1
                    continue
                is_masqueraded = masquerade or src == target.address
                bits = target.mark | (to_masquerade if is_masqueraded else to_keep)
                marks[packet_id] = bits
                recent[flow] = target, bits
                target.picks += 1
                continue
            if masquerade or src == target.address:
                made = target.masquerade or self._template(frontend, target, masquerade=True)
            else:
                made = target.keep or self._template(frontend, target, masquerade=False)
            if made is None:
                continue
            pack, a, b, c, d, e = made
            append(pack(a, src, b, sport, c, src, d, sport, e))
            target.picks += 1


def _unmark(targets: Iterable[Target]) -> None:
    for target in targets:
        target.mark = 0
