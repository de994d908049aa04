"""The life of a worker process.

Order: read Configure, bind the queue (which lets everything pass for now), hand a duplicate of its
socket to the supervisor, take the first plans, then open the queue. The process ends by itself when the
supervisor stops it or disappears, and always leaves the queue without losing a packet.
"""

import asyncio
import gc
import logging
import os
import resource
import socket
import time
from random import Random

import uvloop

from nfqproxy.api import channel
from nfqproxy.core.dataplane import Dataplane
from nfqproxy.core.sources import SourceClasses
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.links import Links
from nfqproxy.kernel.routes import Routes
from nfqproxy.model import MarkMask, PodDetector
from nfqproxy.worker.conntrack import ConntrackSocket
from nfqproxy.worker.data_paths import CtnetlinkPath, DataPath, MarkPath
from nfqproxy.worker.engine import Engine
from nfqproxy.worker.readers import QueueReader, open_reader

log = logging.getLogger(__name__)

_TIDY_PINGS = 60
"""Affinity records and the interpreter's garbage are looked through after so many pings, about once a minute.
"""


def run(channel_fd: int) -> int:
    """Run a worker on its end of the channel; returns the process's exit status."""
    logging.basicConfig(level=logging.INFO, format=f"worker {os.getpid()}: %(message)s")
    return uvloop.run(_run(socket.socket(fileno=channel_fd)))


async def _run(link: socket.socket) -> int:
    link.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        configure = await _first_message(loop, link)
        if configure is None:
            return 0
        try:
            reader = open_reader(configure.reader, configure.queue)
        except NfqproxyError as error:
            await loop.sock_sendall(link, channel.encode(channel.Failed(str(error))))
            return 1
        link.setblocking(True)
        channel.send_bound(link, reader.fileno())
        link.setblocking(False)
    except ConnectionError:
        # The supervisor was interrupted while it started us. The queue, if it is bound already, lets
        # everything pass, so that it may just be closed.
        return 0
    # The packet path makes no reference cycles, and of the plans nothing goes again soon: the collector would
    # only look for what is not there.
    gc.disable()
    stream, writer = await asyncio.open_connection(sock=link)
    worker = Worker(configure, reader, writer)
    try:
        await worker.serve(stream)
    finally:
        worker.close()
    return 0


async def _first_message(
    loop: asyncio.AbstractEventLoop, link: socket.socket
) -> channel.Configure | None:
    """Read exactly the first frame, leaving the rest to the stream that takes the socket over."""
    frame = b""
    while len(frame) < 4 or len(frame) < 4 + int.from_bytes(frame[:4]):
        wanted = 4 - len(frame) if len(frame) < 4 else 4 + int.from_bytes(frame[:4]) - len(frame)
        data = await loop.sock_recv(link, wanted)
        if not data:
            return None
        frame += data
    message = channel.decode_to_worker(frame[4:])
    return message if isinstance(message, channel.Configure) else None


class Worker:
    """A bound queue, its engine, and the conversation with the supervisor."""

    def __init__(
        self, configure: channel.Configure, reader: QueueReader, writer: asyncio.StreamWriter
    ) -> None:
        self._configure = configure
        self._reader = reader
        self._writer = writer
        self._routes = Routes()
        self._links = Links(reader.arrived_by)
        self._pod_detector = PodDetector()
        self._conntrack = ConntrackSocket()
        mask = None if configure.mark_mask is None else MarkMask(configure.mark_mask)
        self._dataplane = Dataplane(
            rng=Random(configure.seed),
            classes=self._source_classes(),
            interfaces=self._links,
            masquerade_source=self._routes.masquerade_source,
            mask=mask,
            shared_seed=configure.shared_seed,
        )
        self._engine = Engine(reader, self._dataplane, self._conntrack, self._data_path(mask))
        self._is_open = False
        self._is_closed = False

    def _data_path(self, mask: MarkMask | None) -> DataPath:
        if mask is None:
            return CtnetlinkPath(self._dataplane, self._conntrack)
        return MarkPath(self._dataplane, self._conntrack, mask=mask, reader=self._reader)

    def _source_classes(self) -> SourceClasses:
        self._addresses = self._routes.addresses()
        return SourceClasses(self._pod_detector, (address.address for address in self._addresses))

    async def serve(self, stream: asyncio.StreamReader) -> None:
        """Serve until Stop, or until the supervisor has gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._routes.fileno(), self._on_routes)
        loop.add_reader(self._reader.fileno(), self._on_queue)
        while True:
            try:
                message = await channel.read_to_worker(stream)
            except (asyncio.IncompleteReadError, ConnectionError):
                # Before the first plans: it was interrupted while it started, and says so itself.
                if self._is_open:
                    log.warning(
                        "the supervisor has gone; leaving the queue to the kernel's fallback"
                    )
                return
            match message:
                case channel.Plans():
                    self._take_plans(message)
                case channel.Affinities():
                    self._dataplane.put_affinity(message.records)
                case channel.Ping():
                    if message.number % _TIDY_PINGS == 0:
                        self._dataplane.expire_affinity(time.clock_gettime(time.CLOCK_BOOTTIME))
                        gc.collect()
                    self._send(self._stats(message.number))
                case channel.Stop():
                    return
                case channel.Configure():
                    log.error("configured twice; the second time is ignored")

    def _on_queue(self) -> None:
        if self._engine.run_ready() and not self._is_closed:
            asyncio.get_running_loop().call_soon(self._on_queue)
        if self._dataplane.has_affinity:
            self._tell_affinity()

    def _tell_affinity(self) -> None:
        fresh = self._dataplane.take_affinity()
        if fresh:
            self._send(channel.Affinities(tuple(fresh)))

    def _on_routes(self) -> None:
        if self._routes.changed():
            self._dataplane.forget_masquerade_sources()
            if self._routes.addresses() is not self._addresses:
                self._dataplane.set_classes(self._source_classes())

    def _take_plans(self, message: channel.Plans) -> None:
        if message.pod_detector != self._pod_detector:
            self._pod_detector = message.pod_detector
            self._dataplane.set_classes(self._source_classes())
        if message.is_whole:
            self._dataplane.clear()
        self._dataplane.upsert(message.upserts)
        if not message.is_last:
            return
        self._dataplane.set_marks(message.marks)
        self._dataplane.remove(message.removes)
        self._dataplane.put_affinity(message.affinities)
        if not self._is_open:
            # A long-lived table: keep the collector from walking it again and again.
            gc.freeze()
            self._reader.queue_socket.set_length(self._configure.queue_length)
            self._is_open = True
        self._send(channel.Applied(message.revision))

    def _stats(self, ping: int) -> channel.Stats:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return channel.Stats(
            ping=ping,
            packets=self._engine.packets,
            batches=self._engine.batches,
            installed=self._engine.installed,
            counters=self._engine.counters(),
            cpu_s=usage.ru_utime + usage.ru_stime,
        )

    def _send(self, message: channel.ToSupervisor) -> None:
        self._writer.write(channel.encode(message))

    def close(self) -> None:
        """Leave the queue without losing a packet and close everything."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._reader.fileno())
        loop.remove_reader(self._routes.fileno())
        # What waits already is still decided here; what comes later passes.
        self._is_closed = True
        self._reader.queue_socket.set_length(0)
        while self._engine.run_ready():
            pass
        self._reader.queue_socket.release()
        self._conntrack.close()
        self._routes.close()
        self._links.close()
        self._writer.close()
