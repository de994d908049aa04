"""The file in which the supervisor keeps affinity records: where it is, and its removal."""

import socket
import sys
from pathlib import Path

__all__ = ["remove_stored", "store_path"]

_SO_NETNS_COOKIE = 71


def store_path() -> Path:
    """The file of this network namespace, named by its cookie: unlike its inode number the kernel never
    gives that to another one (socket(7), SO_NETNS_COOKIE, Linux 5.14).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        try:
            cookie = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            name = str(int.from_bytes(cookie, sys.byteorder))
        except OSError:
            name = f"inode-{Path('/proc/thread-self/ns/net').stat().st_ino}"
    return Path("/run/nfqproxy", f"affinity-{name}")


def remove_stored(path: Path) -> list[str]:
    """Remove the file, of a proxy that has ended; returns what was removed."""
    removed = []
    for file in (path, path.with_suffix(".next")):
        try:
            file.unlink()
        except FileNotFoundError:
            continue
        removed.append(f"file {file}")
    try:
        path.parent.rmdir()
    except OSError:
        pass  # it never was, or holds the files of other namespaces
    return removed
