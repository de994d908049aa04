"""Routing requests byte by byte, and answers beyond those captured."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.errors import CodecError
from nfqproxy.wire import nlmsg, rtnetlink


def payload_of(request: bytes) -> tuple[nlmsg.Message, bytes]:
    (message,) = nlmsg.messages(request)
    return message, message.payload


def test_get_route_bytes() -> None:
    message, payload = payload_of(rtnetlink.get_route(b"\x0a\xf4\1\x0a", 5))
    assert (message.type, message.flags, message.seq) == (26, nlmsg.NLM_F_REQUEST, 5)
    assert payload == bytes([2, 32, 0, 0, 0, 0, 0, 0]) + bytes(4) + struct.pack(
        "=HH4s", 8, 1, b"\x0a\xf4\1\x0a"
    )


def test_get_route_with_all_conditions() -> None:
    _, payload = payload_of(rtnetlink.get_route(b"\xfd" * 16, 5, oif=3, src=b"\xfc" * 16, mark=9))
    assert payload[:3] == bytes([10, 128, 128])
    assert nlmsg.attributes(payload[12:]) == {
        rtnetlink.RTA_DST: b"\xfd" * 16,
        rtnetlink.RTA_SRC: b"\xfc" * 16,
        rtnetlink.RTA_OIF: struct.pack("=I", 3),
        rtnetlink.RTA_MARK: struct.pack("=I", 9),
    }


def test_dump_addresses_bytes() -> None:
    message, payload = payload_of(rtnetlink.dump_addresses(nlmsg.AF_INET6, 6))
    assert (message.type, message.flags) == (22, nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP)
    assert payload == bytes([10, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"dst": bytes(5)}, "address of 5 bytes"),
        ({"dst": bytes(4), "src": bytes(16)}, "16-byte to a 4-byte"),
        ({"dst": bytes(4), "oif": -1}, "interface index -1"),
        ({"dst": bytes(4), "mark": 1 << 32}, "packet mark 4294967296"),
    ],
)
def test_look_ups_that_cannot_be_encoded_are_refused(
    arguments: dict[str, object], problem: str
) -> None:
    with pytest.raises(CodecError, match=problem):
        rtnetlink.get_route(seq=1, **arguments)  # type: ignore[arg-type]


def test_dump_of_another_family_is_refused() -> None:
    with pytest.raises(CodecError, match="family 17"):
        rtnetlink.dump_addresses(17, 1)


def route(family: int, body: bytes, table: int = 254) -> bytes:
    return struct.pack("=BBBBBBBBI", family, 0, 0, 0, table, 2, 0, 1, 0) + body


def test_ipv4_route_through_an_ipv6_gateway() -> None:
    via = struct.pack("=H16s", nlmsg.AF_INET6, b"\xfe" * 16)
    got = rtnetlink.parse_route(
        route(
            nlmsg.AF_INET,
            nlmsg.attribute(rtnetlink.RTA_VIA, via)
            + nlmsg.attribute(rtnetlink.RTA_TABLE, struct.pack("=I", 70000)),
            table=252,
        )
    )
    assert (got.gateway, got.table, got.dst, got.oif) == (b"\xfe" * 16, 70000, None, None)


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (route(7, b""), "address family 7"),
        (route(2, nlmsg.attribute(rtnetlink.RTA_GATEWAY, bytes(16))), "RTA_GATEWAY has 16 bytes"),
        (route(2, nlmsg.attribute(rtnetlink.RTA_OIF, bytes(2))), "RTA_OIF has 2 bytes"),
        (route(2, nlmsg.attribute(rtnetlink.RTA_VIA, b"\2")), "family of RTA_VIA has 1 bytes"),
    ],
)
def test_malformed_routes_are_refused(payload: bytes, problem: str) -> None:
    with pytest.raises(CodecError, match=problem):
        rtnetlink.parse_route(payload)


def test_own_address_of_a_point_to_point_link_goes_before_the_peers() -> None:
    payload = struct.pack("=BBBBI", nlmsg.AF_INET, 32, 0x80, 0, 4)
    payload += nlmsg.attribute(rtnetlink.IFA_ADDRESS, b"peer")
    payload += nlmsg.attribute(rtnetlink.IFA_LOCAL, b"mine")
    got = rtnetlink.parse_address(payload)
    assert (got.address, got.flags) == (b"mine", rtnetlink.IFA_F_PERMANENT)
    assert not got.is_secondary


def test_address_without_address_is_refused() -> None:
    with pytest.raises(CodecError, match="interface 4 has neither"):
        rtnetlink.parse_address(struct.pack("=BBBBI", nlmsg.AF_INET, 32, 0, 0, 4))


@given(st.binary(max_size=80))
def test_arbitrary_bytes_give_values_or_codec_error(payload: bytes) -> None:
    for parse in (rtnetlink.parse_route, rtnetlink.parse_address):
        try:
            parse(payload)
        except CodecError:
            pass
