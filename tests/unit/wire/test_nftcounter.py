"""The codec of nf_tables counters."""

import pytest

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfnetlink, nftcounter, nlmsg


def test_the_request_names_table_and_kind() -> None:
    (message,) = nlmsg.messages(nftcounter.dump_counters("nfqproxy", family=10, seq=7))
    assert message.type == 10 << 8 | 19  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETOBJ
    assert message.flags == nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP
    assert message.seq == 7
    header, body = nfnetlink.split(message.payload, "request")
    assert header.family == 10
    assert nlmsg.attributes(body) == {1: b"nfqproxy\0", 3: b"\0\0\0\1"}


def answer(kind: int = 1, *, with_data: bool = True) -> nlmsg.Message:
    body = (
        nlmsg.attribute(1, b"nfqproxy\0")
        + nlmsg.attribute(2, b"no-port-rejected\0")
        + nlmsg.attribute(3, kind.to_bytes(4))
    )
    if with_data:
        body += nlmsg.nested(
            4, nlmsg.attribute(1, (600).to_bytes(8)), nlmsg.attribute(2, (1 << 40).to_bytes(8))
        )
    type_ = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_NFTABLES, 18)
    (message,) = nlmsg.messages(nfnetlink.message(type_, nlmsg.NLM_F_MULTI, 1, body, family=2))
    return message


def test_an_answer_is_a_counter() -> None:
    assert nftcounter.counter(answer()) == nftcounter.Counter(
        table="nfqproxy", name="no-port-rejected", packets=1 << 40, octets=600
    )


def test_other_objects_are_none() -> None:
    assert nftcounter.counter(answer(kind=2)) is None
    (other,) = nlmsg.messages(nlmsg.message(3, 0, 1, b"\0" * 4))
    assert nftcounter.counter(other) is None


def test_a_truncated_answer_is_an_error() -> None:
    with pytest.raises(CodecError, match="lacks attribute 4"):
        nftcounter.counter(answer(with_data=False))
    whole = answer().payload
    for length in range(4, len(whole)):
        cut = nlmsg.Message(answer().type, 0, 1, 0, whole[:length])
        with pytest.raises(CodecError):
            nftcounter.counter(cut)
