"""The worker's ctnetlink socket: creates entries in batches, looks at and replaces single ones.

Netlink requests are carried out inside ``send``: when it returns, the entries exist and the answers for
those that do not are waiting to be read (KERNEL 3).
"""

import errno
import socket
from collections.abc import Iterator, Sequence

from nfqproxy.errors import KernelError
from nfqproxy.wire import ctnetlink, nlmsg

_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 4 << 20
_ANSWER_BYTES = 65536
# Sequence numbers of single requests; those of batches stay below (core.dataplane.BATCH_LIMIT).
_SINGLE = 1 << 16


class ConntrackSocket:
    """See the module. ``overruns`` counts answers lost to a full socket buffer."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_NETFILTER
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_CAP_ACK, 1)
        self._socket.setblocking(False)
        self._receive = self._socket.recv
        self._send = self._socket.send
        self.overruns = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def create(self, entries: Sequence[bytes]) -> list[tuple[int, int]]:
        """Carry out CT_NEW messages without NLM_F_ACK; returns (sequence number, errno) of failures."""
        self._send(b"".join(entries))
        return self._failures()

    def _answers(self) -> Iterator[nlmsg.Message]:
        """All messages that wait; answers lost to a full buffer are counted."""
        while True:
            try:
                data = self._receive(_ANSWER_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1
                continue
            yield from nlmsg.messages(data)

    def _failures(self) -> list[tuple[int, int]]:
        acks = [nlmsg.ack(each) for each in self._answers() if each.type == nlmsg.NLMSG_ERROR]
        return [(ack.seq, ack.errno) for ack in acks if ack.errno]

    def find(self, original: ctnetlink.Tuple) -> ctnetlink.Entry | None:
        """The entry of an original tuple, None when there is none. KernelError for anything else."""
        self._send(ctnetlink.get_entry(original, _SINGLE))
        found: ctnetlink.Entry | None = None
        for message in self._answers():
            if message.seq != _SINGLE:
                continue
            if message.type == nlmsg.NLMSG_ERROR:
                code = nlmsg.ack(message).errno
                if code not in (0, errno.ENOENT):
                    raise KernelError("look a conntrack entry up", code)
            else:
                found = ctnetlink.parse_entry(message.payload)
        return found

    def delete(self, existing: ctnetlink.Entry) -> None:
        """Delete ``existing``, that one and not one that took its place; fine if it has gone."""
        self._send(self._deletion(existing))
        for _sequence, code in self._failures():
            if code != errno.ENOENT:
                raise KernelError("delete a conntrack entry", code)

    @staticmethod
    def _deletion(existing: ctnetlink.Entry) -> bytes:
        return ctnetlink.delete_entry(
            existing.original, _SINGLE, id=existing.id, ack=False, zone=existing.zone or None
        )

    def replace(self, existing: ctnetlink.Entry, entry: bytes) -> int:
        """Delete ``existing`` (that one, not one that took its place) and carry out a CT_NEW message.

        Returns the errno of the creation, 0 when the new entry stands.
        """
        self._send(self._deletion(existing) + entry)
        return next((code for seq, code in self._failures() if seq != _SINGLE), 0)
