"""Sockets of NETLINK_ROUTE: for requests, and for the kernel's events on links, addresses and routes."""

import errno
import socket
from collections.abc import Iterator
from sys import byteorder

from nfqproxy.wire import nlmsg

ANSWER_BYTES = 65536
"""Room for one datagram."""
_SO_RCVBUFFORCE = 33
_EVENT_BUFFER_BYTES = 4 << 20
_ANSWER_TIMEOUT_S = 1.0


def open_requests() -> socket.socket:
    """A socket for requests; an answer that does not come within a second is a TimeoutError."""
    handle = _open(0)
    handle.settimeout(_ANSWER_TIMEOUT_S)
    return handle


def open_events(groups: int) -> socket.socket:
    """A socket that does not block and gets the events of ``groups`` (RTMGRP_* bits) from now on."""
    handle = _open(groups)
    handle.setblocking(False)
    return handle


def waiting_events(events: socket.socket) -> Iterator[int]:
    """Take all waiting events: the message type (RTM_*) of each, 0 where some were lost.

    Lost events are all the more reason to ask the kernel again.
    """
    while True:
        try:
            data = events.recv(ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield 0
            continue
        # One message a datagram; its type is the second field of nlmsghdr.
        yield int.from_bytes(data[4:6], byteorder)


def _open(groups: int) -> socket.socket:
    handle = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_ROUTE
    )
    handle.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
    handle.bind((0, groups))
    return handle
