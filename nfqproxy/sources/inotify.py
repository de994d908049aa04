"""inotify(7): what happens in some directories, told by the kernel without polling.

Written here because what there is polls: watchfiles asks its queue every few milliseconds, which is both
the delay of a change and a processor that never rests.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

_EVENT = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name

# linux/inotify.h. Not IN_MODIFY: a file that is being written is looked at when it is closed.
_ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO = 0x4, 0x8, 0x40, 0x80
_CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_ONLYDIR = 0x01000000
_MASK = (
    _ATTRIB
    | _CLOSE_WRITE
    | _MOVED_FROM
    | _MOVED_TO
    | _CREATE
    | _DELETE
    | _DELETE_SELF
    | _MOVE_SELF
    | _ONLYDIR
)

_BUFFER_BYTES = 64 * 1024


class Inotify:
    """Watches on directories. Raises OSError for one that is not there, or where the limits are reached."""

    def __init__(self, directories: Iterable[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        # One watch for all names of a directory: it belongs to the inode.
        self._names: dict[int, list[str]] = {}
        try:
            for directory in directories:
                watch = libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK)
                self._names.setdefault(_checked(watch, directory), []).append(directory)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when something has happened."""
        return self._fd

    def read(self) -> set[str]:
        """Paths of files that were written, came or went since the last call.

        Of a directory that is itself concerned, and of all when the kernel's queue ran over, the own path.
        """
        found: set[str] = set()
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return found
            offset = 0
            while offset < len(data):
                watch, _mask, _cookie, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
                offset += length
                if watch == -1:  # IN_Q_OVERFLOW
                    found.update(each for names in self._names.values() for each in names)
                for directory in self._names.get(watch, ()):
                    found.add(f"{directory.rstrip('/')}/{name}" if name else directory)

    def close(self) -> None:
        """Give the watches back."""
        os.close(self._fd)


def _checked(result: int, path: str | None = None) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result
