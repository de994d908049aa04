"""Captured messages decode to what their scenario did; mutilated ones are refused cleanly."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.errors import CodecError
from nfqproxy.wire import conntrack, ctnetlink, nfqueue, nlmsg, packet, rtnetlink

DOCUMENT = json.loads((Path(__file__).parent / "captures" / "messages.json").read_text())
CAPTURES = [
    pytest.param(
        capture["name"], bytes.fromhex(capture["hex"]), capture["expect"], id=capture["name"]
    )
    for capture in DOCUMENT["captures"]
]

pytestmark = pytest.mark.skipif(
    DOCUMENT["byte_order"] != sys.byteorder,
    reason="netlink headers are in host order, the captures come from the other one",
)


def queued(message: nlmsg.Message) -> object:
    queued_packet = nfqueue.parse_packet(message.payload)
    return queued_packet, packet.parse(queued_packet.payload) if queued_packet.payload else None


def entry(message: nlmsg.Message) -> object:
    return ctnetlink.parse_entry(message.payload)


def route_or_address(message: nlmsg.Message) -> object:
    if message.type in (rtnetlink.RTM_NEWROUTE, rtnetlink.RTM_DELROUTE):
        return rtnetlink.parse_route(message.payload)
    return rtnetlink.parse_address(message.payload)


PARSERS: dict[str, Callable[[nlmsg.Message], object]] = {
    "packet": queued,
    "get": entry,
    "dump": entry,
    "event": entry,
    "route": route_or_address,
    "addresses": route_or_address,
    "ack": nlmsg.ack,
}


def decode(name: str, datagram: bytes) -> list[object]:
    """All values of a datagram, by the parser its message type (or else its name) calls for."""
    values: list[object] = []
    for message in nlmsg.messages(datagram):
        if message.type in (nlmsg.NLMSG_ERROR, nlmsg.NLMSG_DONE):
            values.append(nlmsg.ack(message))
        elif message.type in (rtnetlink.RTM_NEWADDR, rtnetlink.RTM_DELADDR):
            values.append(rtnetlink.parse_address(message.payload))
        else:
            values.append(PARSERS[name.split(" ", 1)[0]](message))
    return values


def names(prefix: str) -> list[Any]:
    return [parameter for parameter in CAPTURES if str(parameter.id).startswith(prefix)]


def only(datagram: bytes) -> nlmsg.Message:
    (message,) = nlmsg.messages(datagram)
    return message


@pytest.mark.parametrize(("name", "datagram", "expect"), names("ack"))
def test_acknowledgement(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    answer = nlmsg.ack(only(datagram))
    assert answer == nlmsg.Ack(
        errno=expect["errno"],
        seq=expect["seq"],
        request_type=expect["type"],
        message=expect.get("message", ""),
        offset=expect.get("offset"),
    )


def test_both_styles_of_acknowledgement_were_captured() -> None:
    flags = {
        parameter.id: only(parameter.values[1]).flags & nlmsg.NLM_F_CAPPED
        for parameter in names("ack EEXIST")
    }
    assert flags == {
        "ack EEXIST, capped": nlmsg.NLM_F_CAPPED,
        "ack EEXIST, whole request": 0,
    }


@pytest.mark.parametrize(("name", "datagram", "expect"), names("packet"))
def test_queued_packet(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    message = only(datagram)
    assert message.type == nfqueue.MSG_PACKET
    got = nfqueue.parse_packet(message.payload)
    if "payload_length" in expect:
        assert (len(got.payload), got.is_truncated) == (expect["payload_length"], True)
        assert got.cap_len > len(got.payload)
        with pytest.raises(CodecError, match="raise the copy range"):
            packet.parse(got.payload)
        return
    headers = packet.parse(got.payload)
    values = {
        **{key: getattr(got, key) for key in ("queue", "hook", "indev", "outdev", "mark", "uid")},
        **{key: getattr(got, key) for key in ("hw_protocol", "skb_info")},
        **{key: getattr(headers, key) for key in ("family", "protocol", "src_port", "dst_port")},
        "src": headers.src.hex(),
        "dst": headers.dst.hex(),
    }
    assert {key: values[key] for key in expect} == expect
    assert got.family == headers.family
    assert not got.is_truncated
    assert got.cap_len == len(got.payload)
    assert headers.is_tcp_syn == (headers.protocol == packet.IPPROTO_TCP)
    assert len(got.hw_address) == (6 if got.hook == nfqueue.NF_INET_PRE_ROUTING else 0)


def flat(got: conntrack.Entry) -> dict[str, Any]:
    return {
        "src": got.original.src.hex(),
        "dst": got.original.dst.hex(),
        "protocol": got.original.protocol,
        "src_port": got.original.src_port,
        "dst_port": got.original.dst_port,
        "icmp_id": got.original.icmp_id,
        "reply_src": got.destination.address.hex(),
        "reply_dst": got.source.address.hex(),
        "reply_src_port": got.destination.port,
        "reply_dst_port": got.source.port,
        "is_dnat": got.is_dnat,
        "is_snat": got.is_snat,
        "has_seen_reply": got.has_seen_reply,
        "mark": got.mark,
        "labels": got.labels.hex(),
        "tcp_state": got.tcp_state,
        "timeout_s": got.timeout_s,
    }


@pytest.mark.parametrize(("name", "datagram", "expect"), names("get"))
def test_entry_by_get(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    message = only(datagram)
    assert message.type == ctnetlink.MSG_NEW
    got = ctnetlink.parse_entry(message.payload)
    assert {key: flat(got)[key] for key in expect} == expect
    assert got.id
    assert got.timeout_s
    if "inserted" not in name and "connection" in name:
        assert got.is_assured
        assert got.original_packets
        assert got.reply_bytes
    elif got.original.protocol == conntrack.IPPROTO_SCTP:
        assert got.sctp_state == conntrack.SCTP_CONNTRACK_NONE
    if got.original.protocol in (conntrack.IPPROTO_ICMP, conntrack.IPPROTO_ICMPV6):
        assert got.reply.icmp_type == got.original.inverse().icmp_type


@pytest.mark.parametrize(
    ("name", "datagram", "expect"), [p for p in names("event") if "ADDR" not in str(p.id)]
)
def test_entry_event(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    message = only(datagram)
    assert message.type == (ctnetlink.MSG_NEW if "NEW" in name else ctnetlink.MSG_DELETE)
    # Events carry the port id of the socket that caused them: own inserts can be told apart.
    assert message.pid == expect["pid"]
    got = flat(ctnetlink.parse_entry(message.payload))
    assert {**got, "pid": message.pid}.items() >= expect.items()


@pytest.mark.parametrize("version", [4, 6])
def test_dump_lists_every_entry_and_ends(version: int) -> None:
    values = [
        value
        for parameter in names(f"dump IPv{version}")
        for value in decode("dump", parameter.values[1])
    ]
    *entries, done = values
    assert done == nlmsg.Ack(0, 400, 0, "")
    icmp = conntrack.IPPROTO_ICMP if version == 4 else conntrack.IPPROTO_ICMPV6
    assert sorted(one.original.protocol for one in entries) == sorted([icmp, 6, 17, 132])
    assert {one.mark for one in entries} == {0x77}


@pytest.mark.parametrize(("name", "datagram", "expect"), names("route"))
def test_route(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    got = rtnetlink.parse_route(only(datagram).payload)
    values = {
        "dst": got.dst and got.dst.hex(),
        "type": got.type,
        "oif": got.oif,
        "gateway": got.gateway and got.gateway.hex(),
        "prefsrc": got.prefsrc and got.prefsrc.hex(),
    }
    assert values == expect
    assert got.dst_length == len(got.dst or b"") * 8


@pytest.mark.parametrize(
    ("name", "datagram", "expect"), names("event DELADDR") + names("event NEWADDR")
)
def test_address_event(name: str, datagram: bytes, expect: dict[str, Any]) -> None:
    got = rtnetlink.parse_address(only(datagram).payload)
    values = {
        "ifindex": got.ifindex,
        "address": got.address.hex(),
        "prefix_length": got.prefix_length,
        "is_secondary": got.is_secondary,
    }
    assert values == expect


def test_address_dumps_list_what_was_configured() -> None:
    found = {
        (value.address.hex(), value.prefix_length, value.is_secondary)
        for parameter in names("addresses")
        for value in decode("addresses", parameter.values[1])
        if isinstance(value, rtnetlink.InterfaceAddress)
        and value.scope == rtnetlink.RT_SCOPE_UNIVERSE
    }
    assert found == {
        ("c0000201", 24, False),
        ("c0000202", 24, True),
        ("0af40101", 24, False),
        ("20010db8000200000000000000000001", 64, False),
        ("fd000010024400010000000000000001", 64, False),
    }


@pytest.mark.parametrize(("name", "datagram", "expect"), CAPTURES)
def test_every_truncation_of_the_datagram_is_refused(
    name: str, datagram: bytes, expect: dict[str, Any]
) -> None:
    ends = []
    offset = 0
    for message in nlmsg.messages(datagram):
        offset += nlmsg.HEADER_LENGTH + len(message.payload)
        # Behind the last payload byte only padding may be missing.
        ends += range(offset, offset + -len(message.payload) % 4 + 1)
        offset += -len(message.payload) % 4
    for length in range(1, len(datagram)):
        if length in ends:
            decode(name, datagram[:length])
        else:
            with pytest.raises(CodecError):
                decode(name, datagram[:length])


@pytest.mark.parametrize(("name", "datagram", "expect"), CAPTURES)
def test_every_truncation_of_the_payload_gives_a_value_or_codec_error(
    name: str, datagram: bytes, expect: dict[str, Any]
) -> None:
    refused = 0
    for message in nlmsg.messages(datagram):
        for length in range(len(message.payload)):
            cut = nlmsg.message(message.type, message.flags, message.seq, message.payload[:length])
            try:
                decode(name, cut)
            except CodecError:
                refused += 1
    assert refused >= 3


@pytest.mark.parametrize(("name", "datagram", "expect"), CAPTURES)
def test_flipped_bits_give_a_value_or_codec_error(
    name: str, datagram: bytes, expect: dict[str, Any]
) -> None:
    random_source = random.Random(name)
    outcomes = {"value": 0, "refused": 0}
    for _ in range(300):
        broken = bytearray(datagram)
        for _ in range(random_source.choice((1, 1, 2, 8))):
            broken[random_source.randrange(len(broken))] ^= 1 << random_source.randrange(8)
        try:
            decode_as(name, datagram, bytes(broken))
            outcomes["value"] += 1
        except CodecError:
            outcomes["refused"] += 1
    assert all(outcomes.values()), outcomes


def decode_as(name: str, original: bytes, datagram: bytes) -> None:
    """Like decode, but a flipped message type does not change the parser."""
    for was, message in zip(nlmsg.messages(original), nlmsg.messages(datagram), strict=False):
        payload = nlmsg.message(was.type, message.flags, message.seq, message.payload)
        decode(name, payload)
