"""Running the host's tools: text in, text out, failures in the project's errors.

The one place where messages of other programs are read. A tool inherits the calling thread's
network namespace, so a thread that has entered a namespace programs that namespace.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Sequence

from nfqproxy.errors import HostError, KernelError
from nfqproxy.kernel.capabilities import Capability, lacking

__all__ = ["PACKAGES", "CommandError", "complete_path", "find", "run"]

PACKAGES = {
    "conntrack": "conntrack",
    "ip6tables": "iptables",
    "ipset": "ipset",
    "iptables": "iptables",
    "nft": "nftables",
}
"""Debian package of each tool, by the first word of its name."""

_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BIN = ("/usr/local/bin", "/usr/bin", "/bin")
_TIMEOUT_S = 60.0
"""A tool that waits longer (for the lock of iptables, say) is stopped and reported."""

_ERRNOS = {
    os.strerror(code): code
    for code in (
        errno.EPERM,
        errno.ENOENT,
        errno.EEXIST,
        errno.EBUSY,
        errno.EINVAL,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EOPNOTSUPP,
        errno.EACCES,
        errno.ELOOP,
        errno.ENOBUFS,
        errno.EMSGSIZE,
        errno.EAGAIN,
    )
} | {
    "it is in use by a kernel component": errno.EBUSY,
    "same name already exists": errno.EEXIST,
    "set with the given name does not exist": errno.ENOENT,
    "Another app is currently holding the xtables lock": errno.EAGAIN,
}


class CommandError(KernelError):
    """A tool failed; carries its complete error text beside operation and errno."""

    def __init__(self, operation: str, code: int, stderr: str, hint: str) -> None:
        self.stderr = stderr
        super().__init__(operation, code, hint)


def complete_path(path: str | None) -> str:
    """``path`` with the sbin beside each bin in it, at its end; the ordinary one when it is empty.

    The tools live in the sbin directories, which su, cron and service managers often leave out. A
    directory that is not called bin brings nothing along, so a PATH can still be made that hides a tool.
    """
    if not path:
        return _SEARCH_PATH
    parts = path.split(os.pathsep)
    prefixes = [part.removesuffix("/bin") for part in parts if part in _BIN]
    sbin = [f"{prefix}/sbin" for prefix in prefixes]
    return os.pathsep.join(dict.fromkeys([*parts, *sbin]))


def find(name: str) -> str | None:
    """Return the path of a tool, None when it is not installed."""
    return shutil.which(name, path=os.environ.get("PATH") or _SEARCH_PATH)


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a tool with ``stdin`` and return what it printed.

    Raises HostError when it is not installed or refuses for lack of privilege, CommandError when
    it fails; both carry its first line of complaint.
    """
    tool = argv[0]
    path = find(tool)
    if path is None:
        package = PACKAGES.get(tool.split("-")[0], tool)
        raise HostError(f"{tool} is not installed; apt-get install {package}")
    try:
        done = subprocess.run(
            [path, *argv[1:]],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
            # Ctrl-C in a terminal goes to its whole process group: a change is finished, not torn.
            process_group=0,
        )
    except OSError as error:
        raise CommandError(
            " ".join(argv), error.errno or errno.EIO, "", "the tool could not be started"
        ) from None
    except subprocess.TimeoutExpired:
        hint = f"no answer within {_TIMEOUT_S:.0f} s; look for another program holding its lock"
        raise CommandError(" ".join(argv), errno.ETIMEDOUT, "", hint) from None
    if done.returncode == 0:
        return done.stdout
    stderr = done.stderr.strip()
    complaint = _first_complaint(stderr) or f"exit status {done.returncode}"
    code = next((c for text, c in _ERRNOS.items() if text in stderr), errno.EINVAL)
    # EPERM is also how ipset and nft report a lack of CAP_NET_ADMIN.
    if code in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
        raise HostError(f"{tool} needs root (CAP_NET_ADMIN): {complaint}; run as root")
    # Without CAP_NET_RAW iptables fails with words of its own ("Can't open socket to ipset").
    missing = lacking(Capability.NET_ADMIN) if code in (errno.EPERM, errno.EACCES) else []
    if tool.startswith(("iptables", "ip6tables")):
        missing += lacking(Capability.NET_RAW)
    if missing:
        raise HostError(
            f"{tool} failed without {' and '.join(missing)}: {complaint}; add it to the capabilities of the"
            " container (securityContext.capabilities) or systemd unit (CapabilityBoundingSet)"
        )
    raise CommandError(" ".join(argv), code, stderr, complaint)


def _first_complaint(stderr: str) -> str:
    for line in stderr.splitlines():
        if line.strip() and not line.lower().startswith("warning"):
            return line.strip()
    return ""
