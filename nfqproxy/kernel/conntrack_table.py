"""The connection tracking table as a whole: listing it, deleting entries from it.

For the cold paths; the worker has a socket of its own for single entries. Calls block. The table is
that of the network namespace in which the socket was opened.
"""

import errno
import socket
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from msgspec import Struct

from nfqproxy.errors import HostError, KernelError
from nfqproxy.model import Family
from nfqproxy.wire import ctnetlink, nlmsg

__all__ = ["ConntrackTable", "DeleteResult"]

_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 4 << 20
_ANSWER_BYTES = 65536
"""The kernel fills at most 32 KiB per datagram of a dump (net/netlink/af_netlink.c, netlink_dump)."""
_TIMEOUT_S = 10.0
"""A dump answers without a pause; this only keeps a thread from waiting for ever."""
_BATCH = 256
"""Deletions in one ``send``: about 30 kB, well below the default send buffer."""


class DeleteResult(Struct, frozen=True, kw_only=True):
    """What became of the entries that were to be deleted."""

    deleted: tuple[ctnetlink.Entry, ...] = ()
    vanished: tuple[ctnetlink.Entry, ...] = ()
    """They had ended, or others have taken their place."""
    failed: tuple[tuple[ctnetlink.Entry, int], ...] = ()
    """With the errno; EBUSY: hardware handles the flow."""


class ConntrackTable:
    """A socket to the table; a context manager."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_NETFILTER
            )
        except OSError as error:
            raise HostError(
                f"the kernel has no netfilter netlink ({error.strerror}); load the module nfnetlink"
            ) from None
        self._socket.bind((0, 0))
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        except PermissionError:
            self._socket.close()
            raise HostError(
                "reading connection tracking needs root (CAP_NET_ADMIN); run as root"
            ) from None
        self._socket.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_CAP_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def entries(self, family: Family, protocol: int) -> Iterator[ctnetlink.Entry]:
        """The entries of one family and protocol, in all zones, each as it was at some moment of the dump.

        An entry may come twice, or be missed, when the table is resized meanwhile. To be read to the
        end. KernelError when the kernel refuses.
        """
        self._sequence += 1
        number = nlmsg.AF_INET if family is Family.IPV4 else nlmsg.AF_INET6
        self._send(ctnetlink.dump(number, self._sequence, protocol=protocol))
        while True:
            for message in self._answers():
                if message.seq != self._sequence:
                    continue
                if message.type in (nlmsg.NLMSG_DONE, nlmsg.NLMSG_ERROR):
                    code = nlmsg.ack(message).errno
                    if code == errno.EPERM:
                        raise HostError(
                            "reading connection tracking needs root (CAP_NET_ADMIN); run as root"
                        )
                    if code:
                        raise KernelError(
                            "list the connection tracking table",
                            code,
                            "load the module nf_conntrack_netlink",
                        )
                    return
                if message.type == ctnetlink.MSG_NEW:
                    entry = ctnetlink.parse_entry(message.payload)
                    # Kernels before 5.8 ignore the filter.
                    if entry.original.protocol == protocol:
                        yield entry

    def delete(self, entries: Iterable[ctnetlink.Entry]) -> DeleteResult:
        """Delete these very entries: never one that has the same tuple but was made since."""
        waiting = list(entries)
        deleted: list[ctnetlink.Entry] = []
        vanished: list[ctnetlink.Entry] = []
        failed: list[tuple[ctnetlink.Entry, int]] = []
        for start in range(0, len(waiting), _BATCH):
            batch = waiting[start : start + _BATCH]
            for entry, code in zip(batch, self._delete(batch), strict=True):
                if code == 0:
                    deleted.append(entry)
                elif code == errno.ENOENT:
                    vanished.append(entry)
                else:
                    failed.append((entry, code))
        return DeleteResult(deleted=tuple(deleted), vanished=tuple(vanished), failed=tuple(failed))

    def _delete(self, batch: Sequence[ctnetlink.Entry]) -> list[int]:
        """One errno per entry, 0 for success."""
        first = self._sequence + 1
        self._sequence += len(batch)
        self._send(
            b"".join(
                ctnetlink.delete_entry(
                    entry.original, first + index, id=entry.id, zone=entry.zone or None
                )
                for index, entry in enumerate(batch)
            )
        )
        # Every request asks for its answer, so none is missed and none is waited for in vain.
        codes: dict[int, int] = {}
        while len(codes) < len(batch):
            for message in self._answers():
                if message.type == nlmsg.NLMSG_ERROR and message.seq >= first:
                    codes[message.seq] = nlmsg.ack(message).errno
        return [codes[first + index] for index in range(len(batch))]

    def _send(self, request: bytes) -> None:
        try:
            self._socket.send(request)
        except OSError as error:
            raise KernelError("ask connection tracking", error.errno or errno.EIO) from None

    def _answers(self) -> Iterator[nlmsg.Message]:
        try:
            data = self._socket.recv(_ANSWER_BYTES)
        except TimeoutError:
            raise KernelError("ask connection tracking", errno.ETIMEDOUT) from None
        except OSError as error:
            raise KernelError("ask connection tracking", error.errno or errno.EIO) from None
        return nlmsg.messages(data)
