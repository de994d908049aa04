"""The worker's ctnetlink socket: creates entries in batches, looks at and replaces single ones.

Netlink requests are carried out inside ``send``: when it returns, the entries exist and the answers for
those that do not are waiting to be read (KERNEL 3). Without NETLINK_CAP_ACK a failure repeats the whole
request, so that entries need no numbers to be told apart by.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence

from nfqproxy.errors import KernelError
from nfqproxy.wire import ctnetlink, nlmsg
from nfqproxy.worker.batch_receive import next_datagram

_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 4 << 20
_ANSWER_BYTES = 65536
# Sequence number of single requests; entries are made with another one, 0.
_SINGLE = 1


class ConntrackSocket:
    """See the module. ``overruns`` counts answers lost to a full socket buffer."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_NETFILTER
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        self._socket.setblocking(False)
        self._descriptor = self._socket.fileno()
        self._receive = self._socket.recv
        self._send = self._socket.send
        self.overruns = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def create(self, entries: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """Carry out CT_NEW messages without NLM_F_ACK; returns (message, errno) of those that failed."""
        self._send(b"".join(entries))
        return [(nlmsg.request(answer), code) for answer, code in self._failures()]

    def _answers(self) -> Iterator[nlmsg.Message]:
        """All messages that wait; answers lost to a full buffer are counted."""
        while (code := next_datagram(self._descriptor)) != errno.EAGAIN:
            if code == errno.ENOBUFS:
                self.overruns += 1
                continue
            if code:
                raise OSError(code, os.strerror(code))
            yield from nlmsg.messages(self._receive(_ANSWER_BYTES))

    def _failures(self) -> list[tuple[nlmsg.Message, int]]:
        answers = [
            (each, nlmsg.ack(each).errno)
            for each in self._answers()
            if each.type == nlmsg.NLMSG_ERROR
        ]
        return [(answer, code) for answer, code in answers if code]

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
        for _answer, code in self._failures():
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
        return next((code for answer, code in self._failures() if answer.seq != _SINGLE), 0)
