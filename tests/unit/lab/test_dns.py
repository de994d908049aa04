"""The load generator's DNS bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.errors import CodecError
from nfqproxy.lab.dns import decode_txt_answer, encode_txt_query

QUERY = bytes.fromhex("1234010000010000000000000677686f616d69036c61620000100001")
# The answer of dnsmasq 2.90 to this query, TXT "backend-2", TTL 0.
ANSWER = bytes.fromhex(
    "123485800001000100000000"
    "0677686f616d69036c616200"
    "00100001"
    "c00c00100001000000000"
    "00a096261636b656e642d32"
)


def test_query_bytes() -> None:
    assert encode_txt_query(0x1234, "whoami.lab.") == QUERY
    assert encode_txt_query(0x1234, "whoami.lab") == QUERY


def test_answer() -> None:
    assert decode_txt_answer(ANSWER, 0x1234) == "backend-2"


def test_every_truncation_is_refused() -> None:
    for length in range(len(ANSWER)):
        with pytest.raises(CodecError):
            decode_txt_answer(ANSWER[:length], 0x1234)


def test_other_answers_are_refused() -> None:
    with pytest.raises(CodecError, match="not the answer"):
        decode_txt_answer(ANSWER, 0x1235)
    with pytest.raises(CodecError, match="not the answer"):
        decode_txt_answer(QUERY, 0x1234)
    with pytest.raises(CodecError, match="RCODE 3"):
        decode_txt_answer(ANSWER[:3] + b"\x83" + ANSWER[4:], 0x1234)
    with pytest.raises(CodecError, match="no TXT"):
        decode_txt_answer(ANSWER[:6] + b"\0\0" + ANSWER[8:], 0x1234)


@given(st.binary(max_size=100))
def test_any_bytes_end_in_text_or_error(data: bytes) -> None:
    packet = b"\x12\x34" + data
    try:
        assert isinstance(decode_txt_answer(packet, 0x1234), str)
    except CodecError:
        pass
