"""The channel between the supervisor and a worker: a Unix stream socket pair with framed msgpack.

A frame is a 4 byte big-endian length and that many bytes of msgpack. Both ends are the same program
and the same user; the types below are the protocol, there is no version to negotiate.
"""

import asyncio
import socket
from sys import byteorder

import msgspec

from nfqproxy.core.affinity import AffinityRecord
from nfqproxy.core.marks import FrontendMarks
from nfqproxy.model import FrontendKey, FrontendPlan, PodDetector

_LENGTH_BYTES = 4
_FD_BYTES = 4


class Configure(msgspec.Struct, tag="configure", frozen=True, kw_only=True):
    """First message to a worker: what it is."""

    queue: int
    """NFQUEUE number."""
    reader: str
    """netlink or netfilterqueue."""
    queue_length: int
    """Packets that may wait in the kernel's queue; further ones pass to what stands behind it."""
    seed: int | None
    """Seed of the worker's random numbers, None: from the system."""
    shared_seed: int
    """The same for all workers: of draws on which they agree."""
    mark_mask: int | None = None
    """Data path ``mark``: the bits of the packet mark that are ours; None: data path ``ctnetlink``."""


class Plans(msgspec.Struct, tag="plans", frozen=True, kw_only=True):
    """A new snapshot, whole or as the difference to the one before."""

    revision: int
    is_whole: bool
    """The beginning of a whole snapshot."""
    is_last: bool = True
    """False: more of the same revision follows. What is in parts need not be held as a whole."""
    pod_detector: PodDetector
    """What tells pods from other clients, from this revision on."""
    upserts: tuple[FrontendPlan, ...] = ()
    removes: tuple[FrontendKey, ...] = ()
    marks: tuple[FrontendMarks, ...] = ()
    """Marks that stand for backends, of frontends whose marks have changed; the kernel knows them."""
    affinities: tuple[AffinityRecord, ...] = ()
    """With the end of a whole snapshot: the records that must be known before the first packet is decided."""


class Affinities(msgspec.Struct, tag="affinities", frozen=True):
    """ClientIP affinity records: to a worker those of others, from a worker its own new ones."""

    records: tuple[AffinityRecord, ...]


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Asks for Stats; an unanswered one means that the worker hangs."""

    number: int
    """Comes back in the Stats that answer."""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Stop serving without losing a packet, then exit."""


class Bound(msgspec.Struct, tag="bound", frozen=True):
    """The worker has bound its queue; the queue socket itself comes along as ancillary data."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The worker cannot start; the text says why and what to do."""

    reason: str


class Applied(msgspec.Struct, tag="applied", frozen=True):
    """The worker decides by this revision now; the first one opens its queue."""

    revision: int


class Stats(msgspec.Struct, tag="stats", frozen=True, kw_only=True):
    """Counters of a worker since its start."""

    ping: int
    """Number of the Ping this answers."""
    packets: int
    """Packets read from the queue."""
    batches: int
    installed: int
    """Connections translated by this worker: entries created, or packets marked."""
    counters: dict[str, int]
    """Everything out of the ordinary by name, zero ones left out."""
    cpu_s: float
    """CPU time of the process."""


ToWorker = Configure | Plans | Affinities | Ping | Stop
ToSupervisor = Bound | Failed | Applied | Affinities | Stats

_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_supervisor: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToWorker | ToSupervisor) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES) + body


def decode_to_worker(body: bytes) -> ToWorker:
    """The message of a frame's body."""
    return _to_worker.decode(body)


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker:
    """The next message of the supervisor; IncompleteReadError when it has gone."""
    return _to_worker.decode(await _body(reader))


async def read_to_supervisor(reader: asyncio.StreamReader) -> ToSupervisor:
    """The next message of a worker; IncompleteReadError when it has gone."""
    return _to_supervisor.decode(await _body(reader))


async def _body(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
    return await reader.readexactly(length)


def send_bound(channel: socket.socket, queue_fd: int) -> None:
    """Send Bound with the queue's socket, so that the supervisor can drain the queue of a dead worker.

    Must be the first thing a worker sends, before the channel is given to the event loop.
    """
    socket.send_fds(channel, [encode(Bound())], [queue_fd])


def receive_bound(channel: socket.socket) -> tuple[Bound | Failed, int | None]:
    """The first message of a worker and the queue socket it may carry.

    Blocks until one whole frame is there; ConnectionError when the worker has gone before.
    """
    # Close-on-exec: a worker started later would else hold this queue bound when its own worker is gone.
    # (socket.recv_fds of Python 3.11 takes the flag and ignores it.)
    data, ancillary, _flags, _address = channel.recvmsg(
        _LENGTH_BYTES, socket.CMSG_LEN(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    fds = [
        int.from_bytes(content, byteorder)
        for level, kind, content in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(content) == _FD_BYTES
    ]
    while len(data) < _LENGTH_BYTES or len(data) < _LENGTH_BYTES + int.from_bytes(
        data[:_LENGTH_BYTES]
    ):
        wanted = (
            _LENGTH_BYTES - len(data)
            if len(data) < _LENGTH_BYTES
            else _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES]) - len(data)
        )
        more = channel.recv(wanted)
        if not more:
            raise ConnectionError("the worker ended before it had bound its queue")
        data += more
    message = _to_supervisor.decode(data[_LENGTH_BYTES:])
    if not isinstance(message, Bound | Failed):
        raise ConnectionError(f"the worker began with {type(message).__name__}")
    return message, fds[0] if fds else None
