"""``python -m nfqproxy.lab.load``: a load generator for the inside of a client namespace.

Reads one job from stdin, writes JSON lines to stdout (nfqproxy/lab/jobs.py). One process, bounded
concurrency, uvloop; non-blocking sockets without asyncio's streams, so that the cost per connection
stays far below what is measured. A latency job uses no event loop at all: one blocking connect()
at a time measures the path, not the loop.

Open loop (``rate``): connections start on a schedule whatever the answers do, so a stall shows as
latency or failures and not as a lower rate.
"""

import asyncio
import errno
import random
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from nfqproxy.errors import CodecError, InputError
from nfqproxy.lab.dns import decode_txt_answer, encode_txt_query
from nfqproxy.lab.jobs import (
    DnsJob,
    HeldJob,
    Job,
    LatencyJob,
    Progress,
    Report,
    Tally,
    Target,
    TcpJob,
    decode_job,
    encode,
)

IP_LOCAL_PORT_RANGE = 51  # include/uapi/linux/in.h, Linux 6.3; lower 16 bits low, upper high
_LINGER_RESET = struct.pack("ii", 1, 0)
_PROGRESS_EVERY_S = 0.05

_GET = b"GET / HTTP/1.1\r\nHost: lab\r\n"


def _error_name(error: OSError) -> str:
    if error.errno is None:  # the generator's own time-out; the kernel's is ETIMEDOUT
        return "TIMEOUT"
    return errno.errorcode.get(error.errno, str(error.errno))


def _new_socket(target: Target, kind: int, port_range: tuple[int, int] | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    if port_range is not None:
        low, high = port_range
        sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", high << 16 | low))
    return sock


def check_port_range(wanted: tuple[int, int] | None) -> None:
    """Raise InputError unless the kernel will honour it: it ignores what its own range lacks."""
    if wanted is None:
        return
    key = "net/ipv4/ip_local_port_range"
    low, high = (int(part) for part in Path("/proc/sys", key).read_text().split())
    if not low <= wanted[0] <= wanted[1] <= high:
        raise InputError(
            f"source ports {wanted[0]}-{wanted[1]} are not within {key} {low}-{high}:"
            " ask for others or set the sysctl"
        )


class Output:
    """Writes messages to stdout, progress at most every 50 ms."""

    def __init__(self, tallies: list[Tally]) -> None:
        self._tallies = tallies
        self._next = 0.0
        self._start = time.monotonic()

    def progress(self) -> None:
        """Say how far the load is, if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_S
            ok = sum(tally.ok for tally in self._tallies)
            failed = sum(tally.failed for tally in self._tallies)
            self._write(encode(Progress(ok + failed, failed)))

    def report(self) -> None:
        """Say the end."""
        elapsed = round(time.monotonic() - self._start, 3)
        parts = tuple(tally.report() for tally in self._tallies)
        self._write(encode(Report(elapsed_s=elapsed, targets=parts)))

    @staticmethod
    def _write(line: bytes) -> None:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


# ------------------------------------------------------------------------------- one exchange


def _read_http(data: bytes) -> tuple[str, str, int] | None:
    """Backend, client and total length of one answer; None while it is incomplete."""
    head, separator, _ = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    fields = {}
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        fields[key.strip().lower()] = value.strip().decode("latin-1")
    length = len(head) + 4 + int(fields.get(b"content-length", "0"))
    if len(data) < length:
        return None
    return fields.get(b"x-backend", "?"), fields.get(b"x-client", "?"), length


async def _exchange(sock: socket.socket, request: bytes) -> tuple[str, str, int] | None:
    """One HTTP request and its answer on a connected socket; None: closed without an answer."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request)
    data = b""
    while True:
        piece = await loop.sock_recv(sock, 65536)
        data += piece
        answer = _read_http(data)
        if answer is not None or not piece:
            return answer


async def _tcp_connection(job: TcpJob, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    tally.attempts += 1
    target = tally.target
    try:
        with _new_socket(target, socket.SOCK_STREAM, job.port_range) as sock:
            if job.reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            async with asyncio.timeout(job.timeout_s):
                start = time.perf_counter_ns()
                await loop.sock_connect(sock, (target.address, target.port))
                tally.connect_us.append((time.perf_counter_ns() - start) / 1000)
                tally.ports.add(sock.getsockname()[1])
                if job.http:
                    answer = await _exchange(sock, _GET + b"Connection: close\r\n\r\n")
                    if answer is None:
                        tally.fail("EMPTY")
                        return
                    tally.backends[answer[0]] += 1
                    tally.clients[answer[1]] += 1
                    # The server closes first and keeps the TIME_WAIT: our port is free at once.
                    await loop.sock_recv(sock, 1)
            tally.ok += 1
    except OSError as error:
        tally.fail(_error_name(error))
    except ValueError:
        tally.fail("BAD")


async def _dns_query(job: DnsJob, tally: Tally, number: int, chance: random.Random) -> None:
    loop = asyncio.get_running_loop()
    tally.attempts += 1
    identity = chance.randrange(65536)
    query = encode_txt_query(identity, job.name)
    target = tally.target
    try:
        with _new_socket(target, socket.SOCK_DGRAM, None) as sock:
            if job.first_port:
                sock.bind(("", job.first_port + number))
            sock.connect((target.address, target.port))
            tally.ports.add(sock.getsockname()[1])
            start = time.perf_counter_ns()
            for attempt in range(job.retries + 1):
                if attempt:
                    tally.retries += 1
                sock.send(query)
                try:
                    async with asyncio.timeout(job.timeout_s):
                        packet = await loop.sock_recv(sock, 4096)
                except TimeoutError:
                    continue
                name = decode_txt_answer(packet, identity)
                tally.connect_us.append((time.perf_counter_ns() - start) / 1000)
                tally.backends[name] += 1
                tally.ok += 1
                return
            tally.fail("TIMEOUT")
    except OSError as error:
        tally.fail(_error_name(error))
    except CodecError:
        tally.fail("BAD")


async def _held_connection(job: HeldJob, tally: Tally, deadline: float) -> None:
    """One connection that lives until the deadline; ok or failed counts connections."""
    loop = asyncio.get_running_loop()
    tally.attempts += 1
    target = tally.target
    try:
        with _new_socket(target, socket.SOCK_STREAM, None) as sock:
            start = time.perf_counter_ns()
            async with asyncio.timeout(job.timeout_s):
                await loop.sock_connect(sock, (target.address, target.port))
            tally.connect_us.append((time.perf_counter_ns() - start) / 1000)
            tally.ports.add(sock.getsockname()[1])
            first = ""
            while True:
                async with asyncio.timeout(job.timeout_s):
                    answer = await _exchange(sock, _GET + b"\r\n")
                if answer is None:
                    return tally.fail("EMPTY")
                if first and answer[0] != first:
                    return tally.fail("BAD")  # another backend in mid-connection
                if first:
                    tally.retries += 1
                first = answer[0]
                if time.monotonic() >= deadline:
                    break
                await asyncio.sleep(job.interval_s)
            tally.backends[first] += 1
            tally.clients[answer[1]] += 1
            tally.ok += 1
    except OSError as error:
        tally.fail(_error_name(error))


# ------------------------------------------------------------------------------------ the load


async def _bounded(
    start_one: Callable[[int], Awaitable[None]],
    total: int,
    *,
    concurrency: int,
    rate: float,
    output: Output,
) -> None:
    """Run ``start_one(0 .. total-1)``, at most ``concurrency`` at once, on schedule with a rate."""
    numbers = iter(range(total))
    begin = time.monotonic()

    async def lane() -> None:
        for number in numbers:
            if rate > 0:
                await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
            await start_one(number)
            output.progress()

    async with asyncio.TaskGroup() as group:
        for number in range(min(concurrency, total)):
            group.create_task(lane(), name=f"load lane {number}")


async def _run_async(job: TcpJob | DnsJob | HeldJob, tallies: list[Tally], output: Output) -> None:
    if isinstance(job, TcpJob):
        await _bounded(
            lambda number: _tcp_connection(job, tallies[number % len(tallies)]),
            job.connections,
            concurrency=job.concurrency,
            rate=job.rate,
            output=output,
        )
    elif isinstance(job, DnsJob):
        chance = random.Random(job.seed)
        await _bounded(
            lambda number: _dns_query(job, tallies[number % len(tallies)], number, chance),
            job.queries,
            concurrency=job.concurrency,
            rate=job.rate,
            output=output,
        )
    else:
        deadline = time.monotonic() + job.duration_s
        await _bounded(
            lambda number: _held_connection(job, tallies[number % len(tallies)], deadline),
            job.connections,
            concurrency=job.connections,
            rate=0.0,
            output=output,
        )


def _run_latency(job: LatencyJob, tallies: list[Tally], output: Output) -> None:
    chance = random.Random(job.seed)
    order = list(tallies)
    for number in range(job.warm_up + job.rounds):
        chance.shuffle(order)
        for tally in order:
            target = tally.target
            tally.attempts += 1
            with _new_socket(target, socket.SOCK_STREAM, None) as sock:
                sock.settimeout(job.timeout_s)
                start = time.perf_counter_ns()
                try:
                    sock.connect((target.address, target.port))
                except OSError as error:
                    tally.fail(_error_name(error))
                    continue
                if number >= job.warm_up:
                    tally.connect_us.append((time.perf_counter_ns() - start) / 1000)
                tally.ports.add(sock.getsockname()[1])
                tally.ok += 1
        output.progress()


def run_job(job: Job) -> None:
    """Run a job to its end, reporting on stdout."""
    if isinstance(job, TcpJob):
        check_port_range(job.port_range)
    tallies = [Tally(target) for target in job.targets]
    output = Output(tallies)
    if isinstance(job, LatencyJob):
        _run_latency(job, tallies, output)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(_run_async(job, tallies, output))
            except* Exception as group:
                # Of a bug in many lanes the first says enough.
                raise group.exceptions[0] from None
    output.report()


if __name__ == "__main__":
    run_job(decode_job(sys.stdin.buffer.read()))
