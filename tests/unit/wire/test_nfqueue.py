"""Requests to packet queues, byte by byte, and packets beyond those captured."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfqueue, nlmsg


def request(type_: int, flags: int, seq: int, queue: int, body: bytes) -> bytes:
    payload = struct.pack("!BBH", 0, 0, queue) + body
    return struct.pack("=IHHII", 16 + len(payload), type_, flags, seq, 0) + payload


def tlv(type_: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), type_) + value + bytes(-len(value) % 4)


REQUEST, ACK = 1, 4


def test_bind_and_unbind() -> None:
    assert nfqueue.bind(258, 1) == request(0x0302, REQUEST | ACK, 1, 258, tlv(1, b"\1\0\0\0"))
    assert nfqueue.unbind(3, 2, ack=False) == request(0x0302, REQUEST, 2, 3, tlv(1, b"\2\0\0\0"))


def test_configuration() -> None:
    assert nfqueue.config_params(1, 3, 128) == request(
        0x0302, REQUEST | ACK, 3, 1, tlv(2, struct.pack("!IB", 128, 2))
    )
    assert nfqueue.config_maxlen(1, 4, 65536, ack=False) == request(
        0x0302, REQUEST, 4, 1, tlv(3, struct.pack("!I", 65536))
    )
    fail_open, gso = nfqueue.NFQA_CFG_F_FAIL_OPEN, nfqueue.NFQA_CFG_F_GSO
    assert nfqueue.config_flags(1, 5, fail_open, fail_open | gso) == request(
        0x0302, REQUEST | ACK, 5, 1, tlv(5, struct.pack("!I", 1)) + tlv(4, struct.pack("!I", 5))
    )


def test_verdicts() -> None:
    header = tlv(2, struct.pack("!II", nfqueue.NF_ACCEPT, 0x01020304))
    assert nfqueue.verdict(7, 0x01020304, nfqueue.NF_ACCEPT) == request(
        0x0301, REQUEST, 0, 7, header
    )
    assert nfqueue.verdict(7, 0x01020304, nfqueue.NF_ACCEPT, 0x99, seq=5) == request(
        0x0301, REQUEST, 5, 7, header + tlv(3, b"\0\0\0\x99")
    )
    dropped = tlv(2, struct.pack("!II", nfqueue.NF_DROP, 0x01020304))
    assert nfqueue.verdict_batch(7, 0x01020304, nfqueue.NF_DROP) == request(
        0x0303, REQUEST, 0, 7, dropped
    )


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_numbers_beyond_32_bits_are_refused(value: int) -> None:
    with pytest.raises(CodecError, match=f"packet id {value} does not fit"):
        nfqueue.verdict(1, value, nfqueue.NF_ACCEPT)
    with pytest.raises(CodecError, match=f"packet mark {value} does not fit"):
        nfqueue.verdict(1, 1, nfqueue.NF_ACCEPT, value)
    with pytest.raises(CodecError, match=f"queue length {value} does not fit"):
        nfqueue.config_maxlen(1, 1, value)


@pytest.mark.parametrize("queue", [-1, 65536])
def test_queue_numbers_beyond_16_bits_are_refused(queue: int) -> None:
    with pytest.raises(CodecError, match=f"resource {queue}"):
        nfqueue.bind(queue, 1)


@given(
    queue=st.integers(0, 0xFFFF),
    packet_id=st.integers(0, 0xFFFFFFFF),
    mark=st.integers(0, 0xFFFFFFFF),
    hw_address=st.binary(max_size=8),
    payload=st.binary(max_size=200),
    missing=st.integers(0, 3),
)
def test_packet_with_every_attribute(
    queue: int, packet_id: int, mark: int, hw_address: bytes, payload: bytes, missing: int
) -> None:
    u32 = struct.Struct("!I").pack
    body = (
        tlv(nfqueue.NFQA_PACKET_HDR, struct.pack("!IHB", packet_id, 0x86DD, 3))
        + tlv(nfqueue.NFQA_IFINDEX_INDEV, u32(2))
        + tlv(nfqueue.NFQA_IFINDEX_OUTDEV, u32(3))
        + tlv(nfqueue.NFQA_MARK, u32(mark))
        + tlv(nfqueue.NFQA_PRIORITY, u32(6))
        + tlv(nfqueue.NFQA_HWADDR, struct.pack("!H2x8s", len(hw_address), hw_address))
        + tlv(nfqueue.NFQA_TIMESTAMP, bytes(16))
        + tlv(nfqueue.NFQA_UID, u32(1000))
        + tlv(nfqueue.NFQA_GID, u32(0))
        + tlv(nfqueue.NFQA_CAP_LEN, u32(len(payload) + missing))
        + tlv(nfqueue.NFQA_SKB_INFO, u32(nfqueue.NFQA_SKB_GSO))
        + tlv(nfqueue.NFQA_SECCTX, b"context")
        + tlv(nfqueue.NFQA_PAYLOAD, payload)
    )
    got = nfqueue.parse_packet(struct.pack("!BBH", nlmsg.AF_INET6, 0, queue) + body)
    assert got == nfqueue.QueuedPacket(
        queue=queue,
        family=nlmsg.AF_INET6,
        packet_id=packet_id,
        hw_protocol=0x86DD,
        hook=nfqueue.NF_INET_LOCAL_OUT,
        indev=2,
        outdev=3,
        mark=mark,
        priority=6,
        hw_address=hw_address,
        skb_info=nfqueue.NFQA_SKB_GSO,
        uid=1000,
        gid=0,
        cap_len=len(payload) + missing,
        payload=payload,
    )
    assert got.is_truncated == bool(missing)


def test_packet_without_its_header_is_refused() -> None:
    with pytest.raises(CodecError, match="no NFQA_PACKET_HDR"):
        nfqueue.parse_packet(bytes(4))
    with pytest.raises(CodecError, match="a 3-byte NFQA_PACKET_HDR"):
        nfqueue.parse_packet(bytes(4) + tlv(nfqueue.NFQA_PACKET_HDR, bytes(3)))


def test_hardware_address_longer_than_its_field_is_refused() -> None:
    body = tlv(nfqueue.NFQA_PACKET_HDR, bytes(7)) + tlv(nfqueue.NFQA_HWADDR, b"\0\x09" + bytes(10))
    with pytest.raises(CodecError, match="claims an address of 9"):
        nfqueue.parse_packet(bytes(4) + body)


@given(st.binary(max_size=120))
def test_arbitrary_bytes_give_a_packet_or_codec_error(payload: bytes) -> None:
    try:
        nfqueue.parse_packet(payload)
    except CodecError:
        pass
