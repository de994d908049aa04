"""The netlink socket an NFQUEUE is bound to, and how to leave a queue without losing a packet.

When the last descriptor of that socket closes, the kernel unbinds the queue and *drops* what waits in
it. So the supervisor holds a duplicate of each worker's socket: when a worker dies, the queue stays
bound, and the supervisor first lets everything pass (a queue of length 0 that fails open accepts each
packet at once), then accepts what waited, and only then closes. The packets go on to what stands behind
the queue. (net/netfilter/nfnetlink_queue.c: __nfqnl_enqueue_packet, nfqnl_rcv_nl_event)
"""

import errno
import socket

from nfqproxy.errors import HostError, KernelError, NfqproxyError
from nfqproxy.kernel.queue_statistics import queue_statistics
from nfqproxy.wire import nfqueue, nlmsg

QUEUE_TABLE = "/proc/net/netfilter/nfnetlink_queue"
"""Where the kernel lists bound queues, for messages to people."""
_RECEIVE_BUFFER_BYTES = 32 << 20
_SO_RCVBUFFORCE = 33


class QueueSocket:
    """One queue, bound. ``handle`` may be shared with other processes."""

    def __init__(self, handle: socket.socket, queue: int) -> None:
        self.handle = handle
        self.queue = queue

    @classmethod
    def bind(cls, queue: int, copy_range: int) -> "QueueSocket":
        """Bind ``queue`` with length 0 and fail-open: nothing is held up before ``set_length``.

        Raises HostError when the kernel has no NFQUEUE, NfqproxyError when the number is taken.
        """
        try:
            handle = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nlmsg.NETLINK_NETFILTER
            )
        except OSError as error:
            raise HostError(
                f"the kernel has no netfilter netlink ({error.strerror}); load the module nfnetlink"
            ) from None
        try:
            handle.bind((0, 0))
            handle.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
            # CAP_ACK: an error repeats the header of the failed message only.
            handle.setsockopt(nlmsg.SOL_NETLINK, nlmsg.NETLINK_CAP_ACK, 1)
            flags = nfqueue.NFQA_CFG_F_FAIL_OPEN | nfqueue.NFQA_CFG_F_GSO
            handle.send(nfqueue.bind_configured(queue, 1, copy_range, maxlen=0, flags=flags))
            for answer in nlmsg.messages(handle.recv(65536)):
                ack = nlmsg.ack(answer)
                if ack.errno:
                    raise _bind_error(queue, ack.errno)
            handle.setblocking(False)
        except PermissionError:
            handle.close()
            raise _bind_error(queue, errno.EPERM) from None
        except BaseException:
            handle.close()
            raise
        return cls(handle, queue)

    def set_length(self, length: int) -> None:
        """How many packets may wait for a verdict; further ones pass. 0: every packet passes."""
        self.handle.send(nfqueue.config_maxlen(self.queue, 2, length, ack=False))

    def set_flags(self, flags: int) -> None:
        """Set NFQA_CFG_F_* flags."""
        self.handle.send(nfqueue.config_flags(self.queue, 3, flags, flags, ack=False))

    def release(self) -> None:
        """Let everything pass, accept what waits, close. Loses no packet; safe to call twice."""
        if self.handle.fileno() < 0:
            return
        self.handle.setblocking(True)
        try:
            self.set_length(0)
            state = queue_statistics().get(self.queue)
            if state is not None:
                # Answered with ENOENT when nothing waits, which nobody reads.
                self.handle.send(
                    nfqueue.verdict_batch(self.queue, state.sequence, nfqueue.NF_ACCEPT)
                )
        finally:
            self.handle.close()


def _bind_error(queue: int, code: int) -> NfqproxyError:
    # EPERM is the answer both to a queue that another socket holds and to a lack of CAP_NET_ADMIN.
    if code in (errno.EPERM, errno.EBUSY):
        if queue in queue_statistics():
            return NfqproxyError(
                f"queue {queue} is taken by another program (port id in {QUEUE_TABLE});"
                " stop it or choose another number with --queue"
            )
        return HostError(
            "binding a queue needs root or CAP_NET_ADMIN; run as root (sudo nfqproxy run)"
        )
    if code in (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP):
        return HostError(
            "the kernel has no NFQUEUE with fail-open (Linux 3.6 and later have it);"
            " load the module nfnetlink_queue (modprobe nfnetlink_queue)"
        )
    return KernelError(f"bind queue {queue}", code)
