"""The slow and obvious twin of ``core.dataplane``: parses with the codec, decides by the plan, encodes anew.

It shares with the fast path only the codecs and the balancer (seeded alike), so that the two can be held
equal packet by packet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from nfqproxy import balancers
from nfqproxy.core.template import ENTRY_TIMEOUT_S
from nfqproxy.errors import CodecError
from nfqproxy.model import ClientClass, FrontendKey, FrontendPlan, Protocol, Verdict
from nfqproxy.wire import ctnetlink, packet


def client_class(src: bytes, cidrs: Sequence[str], node: Sequence[str]) -> ClientClass:
    address = ip_address(src)
    if any(address in ip_network(c) for c in cidrs if ip_network(c).version == address.version):
        return ClientClass.POD
    if str(address) in node or address.is_loopback:
        return ClientClass.NODE
    return ClientClass.EXTERNAL


def may_connect(src: bytes, plan: FrontendPlan) -> bool:
    if plan.allowed_sources is None:
        return True
    address = ip_address(src)
    networks = [ip_network(text) for text in plan.allowed_sources]
    return any(address in network for network in networks if network.version == address.version)


def flow_of(headers: packet.PacketHeaders, payload: bytes) -> tuple[object, ...]:
    """What two packets of one flow have in common: a TCP flow begins anew with another sequence number."""
    own = (headers.protocol, headers.src, headers.dst, headers.src_port, headers.dst_port)
    start = headers.transport_offset
    if headers.protocol == Protocol.TCP:
        return (*own, payload[start + 4 : start + 8])
    if headers.protocol == Protocol.SCTP:
        return (*own, payload[start + 4 : start + 12])
    return own


class Decision(NamedTuple):
    """What becomes of one packet: dropped (no backend), or sent to a backend."""

    packet_id: int
    headers: packet.PacketHeaders
    key: FrontendKey
    flow: tuple[object, ...]
    backend: tuple[bytes, int] | None
    masquerade: bool


def decisions(
    packets: Sequence[tuple[int, int, bytes]],
    plans: Mapping[FrontendKey, FrontendPlan],
    *,
    seed: int,
    cidrs: Sequence[str],
    node: Sequence[str],
    pod_interfaces: Sequence[int] = (),
    known: Mapping[tuple[object, ...], Decision] = MappingProxyType({}),
) -> Iterator[Decision]:
    """In packet order; a packet that is let pass is left out.

    ``known``: flow -> what was decided for it; asked for each packet anew.
    """
    rng = Random(seed)
    pickers = {}
    for key, plan in plans.items():
        for index, candidates in enumerate(plan.candidate_sets):
            balancer = balancers.create(plan.balancer)
            balancer.update([backend.weight for backend in candidates.backends], rng)
            pickers[key, index] = balancer
    for packet_id, interface, payload in packets:
        try:
            headers = packet.parse(payload)
        except CodecError:
            continue
        if headers.is_fragment or headers.protocol not in set(Protocol):
            continue
        key = FrontendKey(
            Protocol(headers.protocol), str(ip_address(headers.dst)), headers.dst_port
        )
        plan = plans.get(key)
        if plan is None:
            continue
        who = client_class(headers.src, cidrs, node)
        if interface in pod_interfaces:
            who = ClientClass.POD
        action = plan.actions[who]
        flow = flow_of(headers, payload)
        if action.verdict is Verdict.DROP or not may_connect(headers.src, plan):
            # Conntrack, which the worker does not ask, may know the flow of a datagram.
            if key.protocol is not Protocol.UDP:
                yield Decision(packet_id, headers, key, flow, None, False)
            continue
        if flow in known:
            yield known[flow]._replace(packet_id=packet_id)
            continue
        if action.verdict is not Verdict.BACKEND:
            continue
        index = pickers[key, action.candidates].pick()
        if index < 0:
            continue
        backend = plan.candidate_sets[action.candidates].backends[index]
        address = ip_address(backend.address).packed
        masquerade = (
            action.masquerade
            or headers.src == address
            or (who is ClientClass.POD and not backend.in_pod_network)
        )
        yield Decision(packet_id, headers, key, flow, (address, backend.port), masquerade)


def assemble(
    packets: Sequence[tuple[int, int, bytes]],
    plans: Mapping[FrontendKey, FrontendPlan],
    *,
    seed: int,
    cidrs: Sequence[str],
    node: Sequence[str],
    pod_interfaces: Sequence[int] = (),
    masquerade_source: Callable[[bytes], bytes | None],
) -> tuple[list[bytes], list[int]]:
    entries: list[bytes] = []
    dropped: list[int] = []
    for packet_id, headers, _key, _flow, backend, masquerade in decisions(
        packets, plans, seed=seed, cidrs=cidrs, node=node, pod_interfaces=pod_interfaces
    ):
        if backend is None:
            dropped.append(packet_id)
            continue
        address, port = backend
        source = masquerade_source(address) if masquerade else b""
        if source is None:
            continue
        entries.append(
            ctnetlink.new_entry(
                ctnetlink.Tuple(
                    src=headers.src,
                    dst=headers.dst,
                    protocol=headers.protocol,
                    src_port=headers.src_port,
                    dst_port=headers.dst_port,
                ),
                dnat=ctnetlink.Nat(address=address, port=port),
                snat=ctnetlink.Nat(address=source) if source else None,
                timeout_s=ENTRY_TIMEOUT_S,
                seq=len(entries) + 1,
            )
        )
    return entries, dropped


def mark(
    packets: Sequence[tuple[int, int, bytes]],
    plans: Mapping[FrontendKey, FrontendPlan],
    numbers: Mapping[tuple[FrontendKey, bytes, int], int],
    *,
    seed: int,
    cidrs: Sequence[str],
    node: Sequence[str],
) -> tuple[dict[int, int], list[int]]:
    """By ``numbers`` of backends, with the default mask; a flow once decided keeps its mark."""
    known: dict[tuple[object, ...], Decision] = {}
    marks: dict[int, int] = {}
    dropped: list[int] = []
    for found in decisions(packets, plans, seed=seed, cidrs=cidrs, node=node, known=known):
        if found.backend is None:
            dropped.append(found.packet_id)
            continue
        number = numbers.get((found.key, *found.backend))
        if number is None:
            continue
        known[found.flow] = found
        marks[found.packet_id] = number | (0x2000 if found.masquerade else 0x1000)
    return marks, dropped
