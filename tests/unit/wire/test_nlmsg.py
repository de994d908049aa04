"""Netlink framing: exact bytes, round trips, refusals."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfnetlink, nlmsg

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)


def test_message_bytes() -> None:
    got = nlmsg.message(0x0302, nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_ACK, 9, b"abcde", pid=7)
    assert got == struct.pack("=IHHII", 21, 0x0302, 5, 9, 7) + b"abcde\0\0\0"


def test_nested_attribute_bytes() -> None:
    got = nlmsg.nested(1, nlmsg.attribute(2, b"xyz"), nlmsg.attribute(3, b""))
    inner = struct.pack("=HH", 7, 2) + b"xyz\0" + struct.pack("=HH", 4, 3)
    assert got == struct.pack("=HH", 16, 0x8001) + inner


@given(st.lists(st.tuples(U16, U16, U32, U32, st.binary(max_size=40)), max_size=5))
def test_messages_round_trip(
    parts: list[tuple[int, int, int, int, bytes]],
) -> None:
    buffer = b"".join(nlmsg.message(t, f, s, payload, pid) for t, f, s, pid, payload in parts)
    assert list(nlmsg.messages(buffer)) == [
        nlmsg.Message(t, f, s, pid, payload) for t, f, s, pid, payload in parts
    ]


@given(st.lists(st.tuples(st.integers(0, nlmsg.NLA_TYPE_MASK), st.binary(max_size=40)), max_size=6))
def test_attributes_round_trip(parts: list[tuple[int, bytes]]) -> None:
    buffer = b"".join(nlmsg.attribute(t, payload) for t, payload in parts)
    assert list(nlmsg.attribute_list(buffer)) == parts
    assert nlmsg.attributes(memoryview(buffer)) == dict(parts)


def test_last_of_repeated_attributes_wins_and_flags_are_masked() -> None:
    buffer = nlmsg.attribute(5, b"old") + nlmsg.attribute(5 | nlmsg.NLA_F_NET_BYTEORDER, b"new")
    assert nlmsg.attributes(buffer) == {5: b"new"}


@given(st.binary(max_size=80))
def test_arbitrary_bytes_give_values_or_codec_error(buffer: bytes) -> None:
    for read in (nlmsg.messages, nlmsg.attribute_list):
        try:
            for _ in read(buffer):
                pass
        except CodecError:
            pass


@pytest.mark.parametrize("length", [0, 15, 17, 0xFFFFFFFF])
def test_message_length_that_lies_is_refused(length: int) -> None:
    buffer = struct.pack("=IHHII", length, 2, 0, 0, 0)
    with pytest.raises(CodecError, match=f"claims {length} bytes, 16 are there"):
        list(nlmsg.messages(buffer))


@pytest.mark.parametrize("length", [0, 3, 9])
def test_attribute_length_that_lies_is_refused(length: int) -> None:
    buffer = struct.pack("=HH", length, 3) + bytes(4)
    with pytest.raises(CodecError, match=f"attribute 3 at offset 0 claims {length} bytes"):
        nlmsg.attributes(buffer)


def test_messages_before_a_broken_one_are_yielded() -> None:
    reader = nlmsg.messages(nlmsg.message(3, 0, 1, b"") + b"\x10")
    assert next(reader).type == nlmsg.NLMSG_DONE
    with pytest.raises(CodecError, match="stray"):
        next(reader)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CodecError, match="exceeds 65531"):
        nlmsg.attribute(1, bytes(65532))
    with pytest.raises(CodecError, match="type 65536"):
        nlmsg.attribute(65536, b"")
    with pytest.raises(CodecError, match="type 70000"):
        nlmsg.message(70000, 0, 0, b"")
    with pytest.raises(CodecError, match="resource 65536"):
        nfnetlink.message(0, 0, 0, b"", resource=65536)


def test_sequence_numbers_wrap() -> None:
    (message,) = nlmsg.messages(nlmsg.message(1, 0, 1 << 32, b""))
    assert message.seq == 0


def test_acknowledgement_of_something_else_is_refused() -> None:
    with pytest.raises(CodecError, match="type 256 is no acknowledgement"):
        nlmsg.ack(nlmsg.Message(256, 0, 0, 0, bytes(20)))


def test_dump_that_failed() -> None:
    text = nlmsg.attribute(nlmsg.NLMSGERR_ATTR_MSG, b"no such table\0")
    payload = struct.pack("=i", -2) + text
    done = nlmsg.Message(nlmsg.NLMSG_DONE, nlmsg.NLM_F_ACK_TLVS, 4, 0, payload)
    assert nlmsg.ack(done) == nlmsg.Ack(2, 4, 0, "no such table")


def test_dump_end_without_status_is_success() -> None:
    assert nlmsg.ack(nlmsg.Message(nlmsg.NLMSG_DONE, 0, 4, 0, b"")) == nlmsg.Ack(0, 4, 0, "")


def test_acknowledgement_whose_request_is_cut_is_refused() -> None:
    payload = struct.pack("=i", -17) + struct.pack("=IHHII", 100, 256, 0, 8, 0)
    message = nlmsg.Message(nlmsg.NLMSG_ERROR, nlmsg.NLM_F_ACK_TLVS, 8, 0, payload)
    with pytest.raises(CodecError, match="100 bytes but repeats only 16"):
        nlmsg.ack(message)


def test_message_types_split() -> None:
    type_ = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_QUEUE, 2)
    assert type_ == 0x0302
    assert nfnetlink.subsystem(type_) == nfnetlink.NFNL_SUBSYS_QUEUE
    assert nfnetlink.message_number(type_) == 2
