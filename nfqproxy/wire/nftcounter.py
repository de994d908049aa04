"""Named counters of nf_tables: the one thing the program reads from that subsystem by itself.

The tool ``nft`` (1.0.6) reads every element of every map before it lists a counter. Layouts and numbers
are those of linux/netfilter/nf_tables.h.
"""

from dataclasses import dataclass

from nfqproxy.errors import CodecError
from nfqproxy.wire import nfnetlink, nlmsg

NFT_MSG_NEWOBJ = 18
NFT_MSG_GETOBJ = 19
NFT_OBJECT_COUNTER = 1
NFTA_OBJ_TABLE = 1
NFTA_OBJ_NAME = 2
NFTA_OBJ_TYPE = 3
NFTA_OBJ_DATA = 4
NFTA_COUNTER_BYTES = 1
NFTA_COUNTER_PACKETS = 2

_NEW_OBJECT = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWOBJ)
_GET_OBJECT = nfnetlink.message_type(nfnetlink.NFNL_SUBSYS_NFTABLES, NFT_MSG_GETOBJ)


@dataclass(frozen=True, slots=True)
class Counter:
    """One named counter."""

    table: str
    name: str
    packets: int
    octets: int


def dump_counters(table: str, *, family: int, seq: int) -> bytes:
    """Ask for all counters of a table; ``family`` is AF_INET or AF_INET6."""
    body = nlmsg.attribute(NFTA_OBJ_TABLE, table.encode() + b"\0") + nlmsg.attribute(
        NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER.to_bytes(4)
    )
    flags = nlmsg.NLM_F_REQUEST | nlmsg.NLM_F_DUMP
    return nfnetlink.message(_GET_OBJECT, flags, seq, body, family=family)


def counter(message: nlmsg.Message) -> Counter | None:
    """The counter that a message of the dump tells of, None for an object of another kind."""
    if message.type != _NEW_OBJECT:
        return None
    _, body = nfnetlink.split(message.payload, "nf_tables object")
    found = nlmsg.attributes(body)
    try:
        kind = nlmsg.integer(found[NFTA_OBJ_TYPE], 4, "NFTA_OBJ_TYPE")
        if kind != NFT_OBJECT_COUNTER:
            return None
        data = nlmsg.attributes(found[NFTA_OBJ_DATA])
        return Counter(
            table=_text(found[NFTA_OBJ_TABLE]),
            name=_text(found[NFTA_OBJ_NAME]),
            packets=nlmsg.integer(data[NFTA_COUNTER_PACKETS], 8, "NFTA_COUNTER_PACKETS"),
            octets=nlmsg.integer(data[NFTA_COUNTER_BYTES], 8, "NFTA_COUNTER_BYTES"),
        )
    except KeyError as missing:
        raise CodecError(
            f"nf_tables counter lacks attribute {missing}; the message is truncated"
        ) from None


def _text(payload: bytes) -> str:
    return payload.split(b"\0", 1)[0].decode("utf-8", "replace")
