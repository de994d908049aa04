"""What the kernel counts: packets queued, packets refused, and the state of the queues."""

import errno
import re
import socket
from collections.abc import Iterator

from nfqproxy.errors import KernelError
from nfqproxy.kernel import commands, iptables, nft
from nfqproxy.kernel.queue_statistics import (
    QueueStatistics,
    parse_queue_statistics,
    queue_statistics,
)
from nfqproxy.kernel.rule_settings import IptablesBackend
from nfqproxy.kernel.rule_text import NFT_TABLE
from nfqproxy.model import Family, Protocol
from nfqproxy.wire import nftcounter, nlmsg

__all__ = [
    "QueueStatistics",
    "parse_queue_statistics",
    "queue_statistics",
    "refusal_counters",
    "rule_counters",
]

_QUEUE_RULE = re.compile(
    r"^\[(?P<packets>\d+):\d+\] -A NFQPROXY-QUEUE -p (?P<protocol>\S+) .*-j NFQUEUE"
)

QUEUE_TABLES = frozenset({"raw", "mangle"})
"""Where the queue rules stand, by the data path."""

_ANSWER_BYTES = 65536


def rule_counters() -> dict[tuple[Family, Protocol], int]:
    """Return how many packets the queue rules sent to NFQUEUE since they were put in.

    Packets that found no reader and passed (``--queue-bypass``) are counted as well. Empty when the
    rules are not there.
    """
    found: dict[tuple[Family, Protocol], int] = {}
    listing = nft.list_chains()
    for backend in (IptablesBackend.NFT, IptablesBackend.LEGACY):
        for family in Family:
            save = iptables.command(family, backend, "save")
            if save is None:
                continue
            for table in QUEUE_TABLES & set(iptables.tables(family, backend, listing)):
                for line in commands.run([save, "-c", "-t", table]).splitlines():
                    match = _QUEUE_RULE.match(line)
                    if match:
                        protocol = Protocol[match["protocol"].upper()]
                        place = (family, protocol)
                        found[place] = found.get(place, 0) + int(match["packets"])
    return found


def refusal_counters() -> dict[tuple[Family, str], int]:
    """Return the packets that each named counter of our nft tables has seen, by family and name.

    The names say what became of a packet and why (``rules/README.md``). They count on over a repeated
    apply. Empty when the rules are not there or the mode is ``overlay``. Raises KernelError.
    """
    found: dict[tuple[Family, str], int] = {}
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_NETFILTER
    ) as handle:
        handle.bind((0, 0))
        for family, number in ((Family.IPV4, socket.AF_INET), (Family.IPV6, socket.AF_INET6)):
            request = nftcounter.dump_counters(NFT_TABLE, family=number, seq=int(family))
            try:
                handle.send(request)
                for message in _dump(handle):
                    counter = nftcounter.counter(message)
                    if counter is not None:
                        found[family, counter.name] = counter.packets
            except OSError as error:
                code = error.errno or errno.EIO
                raise KernelError("reading the counters of refusals", code) from error
    return found


def _dump(handle: socket.socket) -> Iterator[nlmsg.Message]:
    """The messages that answer a dump; EINTR (the table changed meanwhile) spoils no counter."""
    while True:
        for message in nlmsg.messages(handle.recv(_ANSWER_BYTES)):
            if message.type in (nlmsg.NLMSG_DONE, nlmsg.NLMSG_ERROR):
                code = nlmsg.ack(message).errno
                if code not in (0, errno.ENOENT):
                    raise KernelError("reading the counters of refusals", code)
                return
            yield message
