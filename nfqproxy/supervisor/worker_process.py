"""One worker seen from the supervisor: start, feed, watch, restart, stop.

A worker that dies is replaced after a short pause that grows while it keeps dying. In between its queue
is released without losing a packet (kernel.queue_socket) and the kernel's fallback serves.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable

from nfqproxy.api import channel
from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel.queue_socket import QueueSocket

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_PING_INTERVAL_S = 1.0
_MAX_SILENCE = 5
"""Pings in a row without any message in between, after which a worker counts as hanging. Counted, not
timed: when it is the supervisor that was held up, it must not blame its workers."""
_MAX_START_SILENCE = 20
"""The same before the first Applied: compiling a large snapshot keeps a worker from answering."""
_RESTART_PAUSE_S = (0.05, 10.0)
_STEADY_S = 30.0
"""A worker that lived this long starts over with the shortest pause."""


class WorkerProcess:
    """A worker slot: one queue, and the process that serves it at the moment, if any.

    ``snapshot`` gives the whole present plans for a worker that starts; ``on_affinities`` is called with
    every message of new affinity records.
    """

    def __init__(
        self,
        configure: channel.Configure,
        snapshot: Callable[[], Iterable[channel.Plans]],
        on_affinities: Callable[["WorkerProcess", channel.Affinities], None] = lambda *_: None,
    ) -> None:
        self._on_affinities = on_affinities
        self._configure = configure
        self._snapshot = snapshot
        self._process: asyncio.subprocess.Process | None = None
        # Our end of the channel: until the queue is bound, and from then on.
        self._link: socket.socket | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._queue: QueueSocket | None = None
        self._conversation: asyncio.Task[None] | None = None
        self._applied = asyncio.Condition()
        self.applied_revision = 0
        """Newest revision the present process decides by, 0: none yet."""
        self.restarts = 0
        self.last_error = ""
        self._pings = 0
        self._answered = asyncio.Condition()
        self.stats: channel.Stats | None = None
        self._is_heard = False

    @property
    def queue_number(self) -> int:
        """The NFQUEUE this slot serves."""
        return self._configure.queue

    @property
    def reader(self) -> str:
        """Name of the queue reader."""
        return self._configure.reader

    @property
    def pid(self) -> int | None:
        """Process id, None while there is none."""
        return self._process.pid if self._process else None

    @property
    def is_ready(self) -> bool:
        """True while a process decides packets."""
        return self.applied_revision > 0

    def follows(self, revision: int) -> bool:
        """True when no process decides, or may begin to decide, by something older than ``revision``."""
        return self._process is None or self.applied_revision >= revision

    async def start(self) -> None:
        """Start the process, wait until its queue is bound, give it the snapshot.

        Raises what keeps it from starting.
        """
        await self.launch()
        await self.bind()
        self.feed()

    async def launch(self) -> None:
        """The first step of ``start``: the process loads its modules and binds its queue by itself."""
        async with self._ended_on_failure():
            self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "nfqproxy.worker",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C in a terminal reaches the process group: workers stop when told.
                    start_new_session=True,
                )
            self._link.settimeout(_START_TIMEOUT_S)
            self._link.sendall(channel.encode(self._configure))

    async def bind(self) -> None:
        """The second step of ``start``: wait until the queue is bound."""
        assert self._link is not None
        async with self._ended_on_failure():
            first = await asyncio.to_thread(self._receive_first, self._link)
            if isinstance(first, channel.Failed):
                raise NfqproxyError(first.reason)
            self._link.setblocking(False)
            self._reader, self._writer = await asyncio.open_connection(sock=self._link)
            self._link = None

    def feed(self) -> None:
        """The last step of ``start``: give the process the snapshot, and listen to it.

        No await between: a change is in the snapshot or sent after it.
        """
        assert self._reader is not None
        self._is_heard = True
        for part in self._snapshot():
            self.send(part)
        self._conversation = asyncio.create_task(
            self._listen(self._reader), name=f"worker-{self.queue_number}-listen"
        )

    @contextlib.asynccontextmanager
    async def _ended_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except OSError as error:
            await self._end_process()
            raise HostError(
                f"worker for queue {self.queue_number} did not start ({error}); see its log above"
            ) from None
        except BaseException:
            await self._end_process()
            raise

    def _receive_first(self, link: socket.socket) -> channel.Bound | channel.Failed:
        first, queue_fd = channel.receive_bound(link)
        if queue_fd is not None:
            self._queue = QueueSocket(socket.socket(fileno=queue_fd), self.queue_number)
        return first

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await channel.read_to_supervisor(reader)
                self._is_heard = True
                match message:
                    case channel.Applied():
                        async with self._applied:
                            self.applied_revision = message.revision
                            self._applied.notify_all()
                    case channel.Affinities():
                        self._on_affinities(self, message)
                    case channel.Stats():
                        async with self._answered:
                            self.stats = message
                            self._answered.notify_all()
                    case channel.Failed():
                        self.last_error = message.reason
                    case channel.Bound():
                        log.error("worker %s bound its queue twice", self.pid)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    async def fresh_stats(self, timeout_s: float) -> None:
        """Ask for Stats and wait for them; without an answer in time the last ones stay."""
        number = self._ping()
        async with self._answered:
            try:
                # asyncio.timeout throughout: wait_for of Python 3.11 may forget a cancellation.
                async with asyncio.timeout(timeout_s):
                    await self._answered.wait_for(
                        lambda: self.stats is not None and self.stats.ping >= number
                    )
            except TimeoutError:
                pass

    def _ping(self) -> int:
        self._pings += 1
        self.send(channel.Ping(self._pings))
        return self._pings

    def send(self, message: channel.ToWorker) -> None:
        """Send a message; without a process it is dropped (a new one gets the whole snapshot)."""
        if self._writer is None or self._writer.is_closing():
            return
        self._writer.write(channel.encode(message))

    async def wait_applied(self, revision: int, timeout_s: float) -> bool:
        """Wait until the process decides by ``revision`` or later; False when it does not in time.

        Ends early when the process does: the next one starts with everything.
        """
        process = self._process
        async with self._applied:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._applied.wait_for(
                        lambda: self.applied_revision >= revision or self._process is not process
                    )
            except TimeoutError:
                return False
        return self.applied_revision >= revision

    async def keep_alive(self) -> None:
        """Watch the process and replace it when it dies or hangs, until cancelled.

        Raises only what no further try would mend.
        """
        pause_s = _RESTART_PAUSE_S[0]
        while True:
            started = time.monotonic()
            if self._process is not None:
                await self._watch()
                await self._end_process()
            if time.monotonic() - started > _STEADY_S:
                pause_s = _RESTART_PAUSE_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RESTART_PAUSE_S[1])
            self.restarts += 1
            try:
                await self.start()
            except NfqproxyError as error:
                self.last_error = str(error)
                log.error("%s; trying again in %.1f s", error, pause_s)

    async def _watch(self) -> None:
        """Return when the process has ended; kill it when it does not answer any more."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait(), name=f"worker-{self.queue_number}-wait")
        silence = 0
        try:
            while True:
                done, _ = await asyncio.wait([ended], timeout=_PING_INTERVAL_S)
                if done:
                    code = ended.result()
                    how = f"signal {-code}" if code < 0 else f"status {code}"
                    self.last_error = f"process {self.pid} ended with {how}"
                    log.error(
                        "worker %s (queue %d) ended with %s; the kernel's fallback serves until"
                        " a new one is ready",
                        self.pid,
                        self.queue_number,
                        how,
                    )
                    return
                silence = 0 if self._is_heard else silence + 1
                self._is_heard = False
                if silence == (_MAX_SILENCE if self.is_ready else _MAX_START_SILENCE):
                    log.error("worker %s does not answer; it is replaced", self.pid)
                    self._process.kill()
                self._ping()
        finally:
            ended.cancel()

    async def _end_process(self) -> None:
        """Release the queue, forget the process, make sure that it has ended."""
        self._hang_up()
        if self._conversation is not None:
            # What the dead process still said must not be taken for the next one's word.
            self._conversation.cancel()
            await asyncio.gather(self._conversation, return_exceptions=True)
            self._conversation = None
        self.applied_revision = 0
        self.stats = None
        queue, self._queue = self._queue, None
        if queue is not None:
            try:
                queue.release()
            except (OSError, NfqproxyError) as error:
                log.error("queue %d was left in a hurry: %s", self.queue_number, error)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        process, self._process = self._process, None
        async with self._applied:
            self._applied.notify_all()
        if process is not None and process.returncode is None:
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def _hang_up(self) -> None:
        """Make a process that has not been fed yet end, and wake a thread that waits for its word."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    async def stop(self) -> None:
        """Stop the process; its queue passes everything on before it is unbound.

        ``keep_alive`` must have ended, or it starts another.
        """
        self.send(channel.Stop())
        self._hang_up()
        process = self._process
        if process is not None:
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                log.warning("worker %s did not stop in time; killing it", process.pid)
                process.kill()
        await self._end_process()
