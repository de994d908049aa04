"""The state of the queues, as the kernel tells it. By itself, for workers need it and no other tool."""

from pathlib import Path

from msgspec import Struct

from nfqproxy.errors import CodecError, HostError

__all__ = ["QueueStatistics", "parse_queue_statistics", "queue_statistics"]

_PROC_QUEUES = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")


class QueueStatistics(Struct, frozen=True, kw_only=True):
    """One line of /proc/net/netfilter/nfnetlink_queue (written by seq_show there)."""

    queue: int
    """NFQUEUE number."""
    port_id: int
    """netlink port of the reader."""
    waiting: int
    """Packets without a verdict so far."""
    copy_mode: int
    """0 none, 1 metadata, 2 packet (NFQNL_COPY_*)."""
    copy_range: int
    """Bytes of a packet that are copied."""
    queue_dropped: int
    """Packets lost because the queue was full."""
    user_dropped: int
    """Packets lost because the reader's socket was full."""
    sequence: int
    """Id of the newest packet: how many were queued."""


def queue_statistics() -> dict[int, QueueStatistics]:
    """Return the queues that have a reader, by number; empty also when the kernel has none."""
    try:
        text = _PROC_QUEUES.read_text(encoding="ascii")
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise HostError(f"{_PROC_QUEUES} may be read by root alone; run as root") from None
    return parse_queue_statistics(text)


def parse_queue_statistics(text: str) -> dict[int, QueueStatistics]:
    """Parse the text of the proc file; raises CodecError on a line of another shape."""
    found = {}
    for line in text.splitlines():
        try:
            numbers = [int(word) for word in line.split()]
        except ValueError:
            numbers = []
        # The ninth column is the constant 1.
        if len(numbers) < 8:
            raise CodecError(f"nfnetlink_queue: line {line!r} is not eight numbers or more")
        found[numbers[0]] = QueueStatistics(
            queue=numbers[0],
            port_id=numbers[1],
            waiting=numbers[2],
            copy_mode=numbers[3],
            copy_range=numbers[4],
            queue_dropped=numbers[5],
            user_dropped=numbers[6],
            sequence=numbers[7],
        )
    return found
