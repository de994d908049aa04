"""The sysctl net.ipv4.conf.all.route_localnet: may packets of 127.0.0.0/8 leave the node?

Node ports on 127.0.0.1 need it. Who changed it must be known when the rules are taken off again, by
another process and perhaps after a reboot of this one; the rules' own table keeps that note, as a chain
without rules whose name says it. Both vanish together with the network namespace.
"""

import errno
from pathlib import Path

from nfqproxy.errors import HostError, KernelError

__all__ = ["MARK_CHAIN", "NAME", "check_writable", "is_on", "turn"]

NAME = "net.ipv4.conf.all.route_localnet"

MARK_CHAIN = "route-localnet-was-off"
"""Chain of the nft table ``ip nfqproxy`` that stands there while we are the ones who turned it on."""

# Files below /proc/sys/net show the network namespace of the thread that opens them.
_FILE = Path("/proc/sys/net/ipv4/conf/all/route_localnet")


def is_on() -> bool:
    """Return the sysctl's value; False where the kernel has no IPv4."""
    try:
        return _FILE.read_text(encoding="ascii").strip() != "0"
    except FileNotFoundError:
        return False


def check_writable() -> None:
    """Raise HostError when ``turn`` could not do its work; changes nothing."""
    turn(on=is_on())


def turn(*, on: bool) -> None:
    """Set the sysctl. Raises HostError where /proc/sys is read-only, KernelError otherwise."""
    try:
        _FILE.write_text("1\n" if on else "0\n", encoding="ascii")
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
            raise HostError(
                f"{NAME} cannot be set, which node ports on 127.0.0.1 need; run with a writable"
                f" /proc/sys, set it to 1 beforehand, or turn localhostNodePorts off"
            ) from None
        raise KernelError(f"writing {NAME}", error.errno or errno.EIO) from error
