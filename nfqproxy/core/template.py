"""CT_NEW messages cut into constant and variable parts.

For one frontend and one backend only three things differ from connection to connection: the netlink
sequence number, the client's address and the client's port (the last two stand in both tuples). A
template is the finished message with these cut out, so that a connection costs one ``Struct.pack``.
The cuts are found by building the message with the real codec twice, so the template cannot disagree
with it.
"""

from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import NamedTuple

from nfqproxy.wire import ctnetlink

ENTRY_TIMEOUT_S = 10
"""Life of an entry until its own packet, a moment later, sets the protocol's time-out (KERNEL 2.2)."""


class Template(NamedTuple):
    """``pack(a, seq, b, src, c, sport, d, src, e, sport, f)`` is a CT_NEW message.

    ``seq`` are 4 bytes in host order, ``src`` a packed address, ``sport`` 2 bytes in network order.
    """

    pack: Callable[..., bytes]
    a: bytes
    b: bytes
    c: bytes
    d: bytes
    e: bytes
    f: bytes


@cache
def _packer(lengths: tuple[int, ...], address_length: int) -> Callable[..., bytes]:
    a, b, c, d, e, f = lengths
    layout = f"={a}s4s{b}s{address_length}s{c}s2s{d}s{address_length}s{e}s2s{f}s"
    return Struct(layout).pack


def _varying(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """The maximal runs in which two messages of one length differ."""
    runs: list[tuple[int, int]] = []
    start = None
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        if left != right:
            start = index if start is None else start
        elif start is not None:
            runs.append((start, index))
            start = None
    if start is not None:
        runs.append((start, len(one)))
    return runs


def build(
    *,
    protocol: int,
    frontend: tuple[bytes, int],
    backend: tuple[bytes, int],
    masquerade_source: bytes | None,
) -> Template:
    """The template of connections from any client to ``frontend``, sent to ``backend``.

    ``masquerade_source``: packed address the backend shall see, None to keep the client's. Ports in
    host order.
    """
    vip, vip_port = frontend
    address, port = backend

    def message(fill: int) -> bytes:
        return ctnetlink.new_entry(
            ctnetlink.Tuple(
                src=bytes([fill]) * len(vip),
                dst=vip,
                protocol=protocol,
                src_port=fill << 8 | fill,
                dst_port=vip_port,
            ),
            dnat=ctnetlink.Nat(address=address, port=port),
            snat=None
            if masquerade_source is None
            else ctnetlink.Nat(address=masquerade_source, port=None),
            timeout_s=ENTRY_TIMEOUT_S,
            seq=int.from_bytes(bytes([fill]) * 4),
        )

    one = message(0x55)
    runs = _varying(one, message(0xAA))
    sizes = [end - start for start, end in runs]
    if sizes != [4, len(vip), 2, len(vip), 2]:
        raise AssertionError(f"CT_NEW varies in runs of {sizes} bytes, not as the template needs")
    parts = []
    position = 0
    for start, end in runs:
        parts.append(one[position:start])
        position = end
    parts.append(one[position:])
    return Template(_packer(tuple(map(len, parts)), len(vip)), *parts)
