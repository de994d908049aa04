"""Conntrack requests: exact bytes, stable order, round trips, refusals."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.errors import CodecError
from nfqproxy.wire import ctnetlink, nfnetlink, nlmsg
from nfqproxy.wire.conntrack import Nat, Tuple

PORTS = st.integers(0, 0xFFFF)


@st.composite
def tuples(draw: st.DrawFn) -> Tuple:
    size = draw(st.sampled_from((4, 16)))
    src, dst = (
        draw(st.binary(min_size=size, max_size=size)),
        draw(st.binary(min_size=size, max_size=size)),
    )
    protocol = draw(st.sampled_from((6, 17, 132, 1, 58)))
    if protocol in (1, 58):
        types = (0, 8, 13, 14, 15, 16, 17, 18) if protocol == 1 else (128, 129, 139, 140)
        return Tuple(
            src,
            dst,
            protocol,
            icmp_id=draw(PORTS),
            icmp_type=draw(st.sampled_from(types)),
            icmp_code=draw(st.integers(0, 255)),
        )
    return Tuple(src, dst, protocol, draw(PORTS), draw(PORTS))


def body_of(request: bytes) -> tuple[nlmsg.Message, nfnetlink.Header, list[tuple[int, bytes]]]:
    (message,) = nlmsg.messages(request)
    header, body = nfnetlink.split(message.payload, "request")
    return message, header, list(nlmsg.attribute_list(body))


def test_new_entry_bytes() -> None:
    """Golden bytes: the worker's templates depend on them."""
    request = ctnetlink.new_entry(
        Tuple(b"\xc0\0\2\x0a", b"\x0a\x60\0\1", 6, 40000, 80),
        dnat=Nat(b"\x0a\xf4\1\x0a", 8080),
        snat=Nat(b"\x0a\xf4\1\1"),
        timeout_s=30,
        seq=7,
        mark=0x11223344,
    )
    original = (
        "3400 0180"  # CTA_TUPLE_ORIG, nested
        "1400 0180 0800 0100 c000020a 0800 0200 0a600001"
        "1c00 0280 0500 0100 06000000 0600 0200 9c400000 0600 0300 00500000"
    )
    reply = (
        "3400 0280"
        "1400 0180 0800 0100 0a600001 0800 0200 c000020a"
        "1c00 0280 0500 0100 06000000 0600 0200 00500000 0600 0300 9c400000"
    )
    rest = (
        "0800 0700 0000001e"  # CTA_TIMEOUT
        "1800 0d80 0800 0100 0af4010a 0c00 0380 0600 0100 1f900000"  # CTA_NAT_DST
        "0c00 0680 0800 0100 0af40101"  # CTA_NAT_SRC
        "0800 0800 11223344"  # CTA_MARK
    )
    attributes = bytes.fromhex(original + reply + rest)
    if struct.pack("=H", 1) == b"\1\0":  # the golden attribute headers are little-endian
        head = struct.pack("=IHHII", 20 + len(attributes), 0x0100, 0x0601, 7, 0) + b"\2\0\0\0"
        assert request == head + attributes
    assert len(request) == 176


@given(
    original=tuples(),
    port=st.none() | PORTS,
    timeout_s=st.integers(0, 0xFFFFFFFF),
    mark=st.none() | st.integers(0, 0xFFFFFFFF),
    labels=st.none() | st.sampled_from((4, 8, 12, 16)).map(lambda size: b"\x81" * size),
    zone=st.none() | st.integers(0, 0xFFFF),
    status=st.none() | st.integers(0, 0xFFFFFFFF),
    with_dnat=st.booleans(),
    with_snat=st.booleans(),
    exclusive=st.booleans(),
    ack=st.booleans(),
)
def test_new_entry_round_trip(
    original: Tuple,
    port: int | None,
    timeout_s: int,
    mark: int | None,
    labels: bytes | None,
    zone: int | None,
    status: int | None,
    with_dnat: bool,
    with_snat: bool,
    exclusive: bool,
    ack: bool,
) -> None:
    nat = Nat(original.dst, port)
    request = ctnetlink.new_entry(
        original,
        dnat=nat if with_dnat else None,
        snat=nat if with_snat else None,
        timeout_s=timeout_s,
        seq=5,
        mark=mark,
        labels=labels,
        zone=zone,
        status=status,
        exclusive=exclusive,
        ack=ack,
    )
    message, header, attributes = body_of(request)
    assert message.type == ctnetlink.MSG_NEW
    assert bool(message.flags & nlmsg.NLM_F_EXCL) == exclusive
    assert bool(message.flags & nlmsg.NLM_F_ACK) == ack
    assert message.flags & nlmsg.NLM_F_CREATE
    assert header.family == (nlmsg.AF_INET if len(original.src) == 4 else nlmsg.AF_INET6)
    order = [type_ for type_, _ in attributes]
    assert order == [
        ctnetlink.CTA_TUPLE_ORIG,
        ctnetlink.CTA_TUPLE_REPLY,
        ctnetlink.CTA_TIMEOUT,
        *([ctnetlink.CTA_NAT_DST] if with_dnat else []),
        *([ctnetlink.CTA_NAT_SRC] if with_snat else []),
        *([ctnetlink.CTA_MARK] if mark is not None else []),
        *([ctnetlink.CTA_STATUS] if status is not None else []),
        *([ctnetlink.CTA_LABELS] if labels is not None else []),
        *([ctnetlink.CTA_ZONE] if zone is not None else []),
    ]
    for type_, payload in attributes:
        if type_ in (ctnetlink.CTA_NAT_DST, ctnetlink.CTA_NAT_SRC):
            children = nlmsg.attributes(payload)
            wide = len(original.src) == 16
            address = ctnetlink.CTA_NAT_V6_MINIP if wide else ctnetlink.CTA_NAT_V4_MINIP
            assert children.pop(address) == nat.address
            ports = nlmsg.attributes(children.pop(ctnetlink.CTA_NAT_PROTO, b""))
            assert ports == (
                {} if port is None else {ctnetlink.CTA_PROTONAT_PORT_MIN: port.to_bytes(2, "big")}
            )
            assert not children
    got = ctnetlink.parse_entry(message.payload)
    assert got.status == (status or 0)
    assert (got.original, got.reply) == (original, original.inverse())
    assert (got.timeout_s, got.mark, got.labels, got.zone) == (
        timeout_s,
        mark or 0,
        labels or b"",
        zone or 0,
    )


@given(tuples())
def test_inverse_of_the_inverse_is_the_tuple(original: Tuple) -> None:
    inverse = original.inverse()
    assert (inverse.src, inverse.dst) == (original.dst, original.src)
    assert (inverse.src_port, inverse.dst_port) == (original.dst_port, original.src_port)
    assert inverse.inverse() == original


@given(original=tuples(), id_=st.none() | st.integers(0, 0xFFFFFFFF), ack=st.booleans())
def test_get_and_delete(original: Tuple, id_: int | None, ack: bool) -> None:
    message, _, attributes = body_of(ctnetlink.get_entry(original, 3, zone=9))
    assert (message.type, message.flags, message.seq) == (0x0101, nlmsg.NLM_F_REQUEST, 3)
    assert [type_ for type_, _ in attributes] == [ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_ZONE]
    message, _, attributes = body_of(ctnetlink.delete_entry(original, 4, id_, ack))
    assert message.type == 0x0102
    assert message.flags == nlmsg.NLM_F_REQUEST | (nlmsg.NLM_F_ACK if ack else 0)
    # Without its tuple a deletion would flush the whole table.
    assert attributes[0][0] == ctnetlink.CTA_TUPLE_ORIG
    found = dict(attributes)
    assert found.get(ctnetlink.CTA_ID) == (None if id_ is None else id_.to_bytes(4, "big"))


def test_dump_filters() -> None:
    message, header, attributes = body_of(ctnetlink.dump(nlmsg.AF_INET6, 8))
    assert (message.type, message.flags) == (0x0101, nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP)
    assert (header.family, attributes) == (nlmsg.AF_INET6, [])
    _, _, attributes = body_of(
        ctnetlink.dump(nlmsg.AF_UNSPEC, 8, mark=0x10, mark_mask=0xF0, status=ctnetlink.IPS_DST_NAT)
    )
    assert attributes == [
        (ctnetlink.CTA_STATUS, b"\0\0\0\x20"),
        (ctnetlink.CTA_STATUS_MASK, b"\0\0\0\x20"),
        (ctnetlink.CTA_MARK, b"\0\0\0\x10"),
        (ctnetlink.CTA_MARK_MASK, b"\0\0\0\xf0"),
    ]
    _, _, attributes = body_of(ctnetlink.dump(nlmsg.AF_INET, 8, protocol=17))
    wanted = dict(attributes)
    tuple_parts = nlmsg.attributes(wanted.pop(ctnetlink.CTA_TUPLE_ORIG))
    number = nlmsg.attributes(tuple_parts.pop(ctnetlink.CTA_TUPLE_PROTO))
    assert (number, tuple_parts) == ({ctnetlink.CTA_PROTO_NUM: b"\x11"}, {})
    flags = nlmsg.attributes(wanted.pop(ctnetlink.CTA_FILTER))
    assert list(flags) == [ctnetlink.CTA_FILTER_ORIG_FLAGS]
    assert nlmsg.integer(flags[ctnetlink.CTA_FILTER_ORIG_FLAGS], 4, "", big_endian=False) == 8
    assert wanted == {}


FLOW = Tuple(bytes(4), bytes(4), 6, 1, 2)


@pytest.mark.parametrize(
    ("original", "options", "problem"),
    [
        (Tuple(bytes(4), bytes(16), 6), {}, "4 and 16 bytes"),
        (Tuple(bytes(5), bytes(5), 6), {}, "5 and 5 bytes"),
        (Tuple(bytes(4), bytes(4), 256), {}, "IP protocol 256"),
        (Tuple(bytes(4), bytes(4), 6, 70000), {}, "source port 70000"),
        (Tuple(bytes(4), bytes(4), 6, 1, -1), {}, "destination port -1"),
        (Tuple(bytes(4), bytes(4), 1, icmp_type=3), {}, "ICMP type 3"),
        (FLOW, {"dnat": Nat(bytes(16))}, "cannot translate between families"),
        (FLOW, {"dnat": Nat(bytes(4), 65536)}, "NAT port 65536"),
        (FLOW, {"timeout_s": -1}, "timeout -1"),
        (FLOW, {"labels": bytes(20)}, "labels of 20 bytes"),
        (FLOW, {"labels": bytes(3)}, "labels of 3 bytes"),
        (FLOW, {"zone": 65536}, "zone 65536"),
        (FLOW, {"mark": 1 << 32}, "mark 4294967296"),
    ],
)
def test_values_that_cannot_be_encoded_are_refused(
    original: Tuple, options: dict[str, object], problem: str
) -> None:
    arguments: dict[str, object] = {"dnat": None, "snat": None, "timeout_s": 1, "seq": 1} | options
    with pytest.raises(CodecError, match=problem):
        ctnetlink.new_entry(original, **arguments)  # type: ignore[arg-type]


def test_zone_of_one_direction_is_read() -> None:
    """With ``CT --zone-orig`` the zone stands inside the original tuple (CTA_TUPLE_ZONE)."""
    (message,) = nlmsg.messages(ctnetlink.new_entry(FLOW, dnat=None, snat=None, timeout_s=1, seq=1))
    parts = nlmsg.attributes(message.payload[4:])
    zone = nlmsg.attribute(ctnetlink.CTA_TUPLE_ZONE, b"\0\x05")
    body = nlmsg.nested(ctnetlink.CTA_TUPLE_ORIG, parts[ctnetlink.CTA_TUPLE_ORIG], zone)
    body += nlmsg.nested(ctnetlink.CTA_TUPLE_REPLY, parts[ctnetlink.CTA_TUPLE_REPLY])
    assert ctnetlink.parse_entry(message.payload[:4] + body).zone == 5


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_an_entry_or_codec_error(payload: bytes) -> None:
    try:
        ctnetlink.parse_entry(payload)
    except CodecError:
        pass
