"""The few bytes of DNS the load generator speaks (RFC 1035): one TXT question, its answer."""

import struct

from nfqproxy.errors import CodecError

__all__ = ["decode_txt_answer", "encode_txt_query"]

_TXT, _IN = 16, 1


def encode_txt_query(identity: int, name: str) -> bytes:
    """A query for the TXT records of ``name``, recursion desired; ``identity`` is 0..65535."""
    labels = b"".join(
        bytes([len(label)]) + label.encode("ascii") for label in name.rstrip(".").split(".")
    )
    return (
        struct.pack("!6H", identity, 0x0100, 1, 0, 0, 0)
        + labels
        + struct.pack("!BHH", 0, _TXT, _IN)
    )


def decode_txt_answer(packet: bytes, identity: int) -> str:
    """The first string of the first TXT record of an answer; CodecError when there is none."""
    try:
        got, flags, questions, answers, _, _ = struct.unpack_from("!6H", packet)
        if got != identity or not flags & 0x8000:
            raise CodecError("DNS message is not the answer to the query")
        if flags & 0x000F:
            raise CodecError(f"DNS answer has RCODE {flags & 0x000F}")
        offset = 12
        for _ in range(questions):
            offset = _skip_name(packet, offset) + 4
        for _ in range(answers):
            offset = _skip_name(packet, offset)
            kind, _, _, length = struct.unpack_from("!HHIH", packet, offset)
            offset += 10
            if kind == _TXT:
                size = packet[offset]
                text = packet[offset + 1 : offset + 1 + size]
                if size >= length or len(text) != size:
                    raise CodecError("DNS TXT record is truncated")
                return text.decode("ascii", "replace")
            offset += length
    except (struct.error, IndexError) as error:
        raise CodecError("DNS answer is truncated") from error
    raise CodecError("DNS answer holds no TXT record")


def _skip_name(packet: bytes, offset: int) -> int:
    """The offset after a name; a compression pointer ends it (RFC 1035 section 4.1.4)."""
    while True:
        length = packet[offset]
        if length & 0xC0 == 0xC0:
            return offset + 2
        if length == 0:
            return offset + 1
        offset += 1 + length
