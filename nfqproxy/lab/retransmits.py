"""SYNs that clients have sent again, each of them one more packet of its connection for the queue."""

from pathlib import Path

from nfqproxy.kernel.netns import Namespace

__all__ = ["syn_retransmits"]


def syn_retransmits(namespace: Namespace) -> int:
    """How many there were in a namespace since it was made (TcpExt TCPSynRetrans).

    A new connection may meet a TIME_WAIT of the same tuple at the backend, whose stale answer makes the
    client send its SYN again within milliseconds: an extra packet that is queued, and none that was lost.
    """

    def read() -> int:
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
        return int(values[names.index("TCPSynRetrans")])

    return namespace.call(read)
