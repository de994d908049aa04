"""Receiving as Python's socket module does not offer it: many datagrams by one recvmmsg(2), and a look without
an exception.

Each queued packet is a netlink datagram of its own, so that a plain ``recv`` costs one system call and
one memory allocation a packet. Here one call fills up to N slots of one preallocated buffer.
"""

import ctypes
import errno
import os
from struct import Struct

# linux/socket.h
_MSG_PEEK = 0x02
_MSG_DONTWAIT = 0x40


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct msghdr of the C library
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vector", ctypes.POINTER(_IoVector)),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _CountedMessage(ctypes.Structure):  # struct mmsghdr
    _fields_ = (("message", _Message), ("length", ctypes.c_uint))


# PyDLL: the call never blocks (MSG_DONTWAIT), giving the interpreter lock away would only cost.
_recvmmsg = ctypes.PyDLL(None, use_errno=True).recvmmsg
_recvmmsg.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.c_void_p,
)
_recvmmsg.restype = ctypes.c_int


_recv = ctypes.PyDLL(None, use_errno=True).recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t


def next_datagram(descriptor: int) -> int:
    """0 when a datagram waits, else the errno of looking for one; EAGAIN when none does.

    An exception, as Python's recv makes of "none", costs more than all else of a lone connection's answer.
    A pending error of the socket is cleared by being told.
    """
    found = _recv(descriptor, None, 0, _MSG_DONTWAIT | _MSG_PEEK)
    return 0 if found >= 0 else ctypes.get_errno()


class BatchReceiver:
    """Receives up to ``slots`` datagrams of at most ``slot_bytes`` each from a descriptor at once."""

    def __init__(self, descriptor: int, *, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots = bytearray(slots * slot_bytes)
        """One datagram each, from the start of a slot on; what follows it is of older ones."""
        self._descriptor = descriptor
        self._count = slots
        base = ctypes.addressof((ctypes.c_char * len(self.slots)).from_buffer(self.slots))
        self._vectors = (_IoVector * slots)()
        self._messages = (_CountedMessage * slots)()
        for index in range(slots):
            self._vectors[index].base = base + index * slot_bytes
            self._vectors[index].length = slot_bytes
            header = self._messages[index].message
            header.vector = ctypes.pointer(self._vectors[index])
            header.vector_length = 1
        self._address = ctypes.addressof(self._messages)
        size, offset = ctypes.sizeof(_CountedMessage), _CountedMessage.length.offset
        self._length = Struct(f"={offset}xI{size - offset - 4}x")
        self._headers = memoryview(self._messages).cast("B")

    def receive(self) -> int:
        """Number of datagrams that now stand in ``slots``, from the first on; 0 when none waits.

        OSError with ENOBUFS when datagrams were lost since the last call.
        """
        count: int = _recvmmsg(self._descriptor, self._address, self._count, _MSG_DONTWAIT, None)
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EINTR):
            return 0
        raise OSError(code, os.strerror(code))

    def length(self, index: int) -> int:
        """Length in bytes of the datagram in a slot of the last ``receive``."""
        length: int = self._length.unpack_from(self._headers, index * self._length.size)[0]
        return length
