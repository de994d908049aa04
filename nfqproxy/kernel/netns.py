"""Network namespaces: made under a random prefix, used from this process, always removed.

Who uses it: the lab, ``doctor``'s self-test and the kernel tests. A cold path: namespaces and links
are made by ``ip -batch`` (one process for any number of them), everything else happens in a
short-lived thread that has entered the namespace (:meth:`Namespace.call`), so that sockets, sysctls
and child processes need no wrapper command and a child's pid is the program's own pid.

What is removed: the namespaces of a group and the processes started in them (processes.py says how
they are known), nothing else.
"""

import ctypes
import ipaddress
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from msgspec import Struct

from nfqproxy.errors import HostError, KernelError
from nfqproxy.kernel.processes import ProcessRef, stop_processes, uninterrupted

__all__ = [
    "NETNS_DIR",
    "Namespace",
    "NamespaceGroup",
    "Veth",
    "random_prefix",
    "remove_namespaces",
]

NETNS_DIR = Path("/run/netns")
"""Where iproute2 keeps the names of namespaces (ip-netns(8))."""

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def random_prefix() -> str:
    """A prefix that no other run has: ``nfqp-`` and six hexadecimal digits."""
    return f"nfqp-{secrets.token_hex(3)}-"


# --------------------------------------------------------------------------------- namespaces


class Veth(Struct, frozen=True, kw_only=True):
    """A pair of virtual Ethernet devices between two namespaces of a group (short names)."""

    left: str
    left_device: str
    right: str
    right_device: str
    right_mac: str = ""
    """Link address of the right end; empty: the kernel's choice."""


class Namespace:
    """One network namespace and the processes started in it."""

    __slots__ = ("_children", "name", "path")

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = NETNS_DIR / name
        self._children: list[subprocess.Popen[bytes]] = []

    def __repr__(self) -> str:
        return f"Namespace({self.name!r})"

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in a thread inside this namespace; its result or exception is ours.

        Sockets it makes and processes it starts stay in the namespace after it returns.
        """
        outcome: list[T] = []
        failure: list[BaseException] = []

        def enter_and_run() -> None:
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # setns(2) moves the calling thread alone; this one ends right after.
                    if _libc.setns(fd, _CLONE_NEWNET) != 0:
                        raise KernelError(
                            f"setns to {self.name}", ctypes.get_errno(), "run as root"
                        )
                finally:
                    os.close(fd)
                outcome.append(function())
            except BaseException as error:  # handed to the caller below
                failure.append(error)

        thread = threading.Thread(target=enter_and_run, name=f"in {self.name}")
        thread.start()
        try:
            thread.join()
        except BaseException:
            # Ctrl-C: what the thread is about to start must be known before anyone cleans up.
            with uninterrupted():
                thread.join()
            raise
        if failure:
            raise failure[0]
        return outcome[0]

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in this namespace, usable from any thread."""
        return self.call(lambda: socket.socket(family, kind, protocol))

    def run(
        self,
        *arguments: str,
        check: bool = True,
        stdin: str = "",
        timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with ``check`` a failure is a HostError with its stderr."""
        done = self.call(
            lambda: _run(arguments, stdin=stdin, timeout_s=timeout_s, env=env, where=self.name)
        )
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[:2000]
            raise HostError(
                f"`{' '.join(arguments)}` in namespace {self.name} exited {done.returncode}: {said}"
            )
        return done

    def popen(
        self,
        *arguments: str,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a long-lived command here, as leader of its own session; close() ends it."""

        def start() -> subprocess.Popen[bytes]:
            child = subprocess.Popen(
                arguments,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
            self._children.append(child)
            return child

        return self.call(lambda: _found(arguments, start))

    def processes(self) -> list[ProcessRef]:
        """The processes started here by :meth:`popen`, dead ones left out."""
        return [ProcessRef.of(c.pid) for c in self._children if c.poll() is None]

    def ip(self, *lines: str) -> None:
        """Carry out lines of ``ip -batch`` in this namespace; HostError at the first refusal."""
        if lines:
            _ip_batch(lines, namespace=self.name)

    def sysctl(self, settings: Mapping[str, str | int]) -> None:
        """Write sysctls, named with slashes below /proc/sys, e.g. ``net/ipv4/ip_forward``."""

        def write() -> None:
            for key, value in settings.items():
                try:
                    Path("/proc/sys", key).write_text(f"{value}\n")
                except OSError as error:
                    raise KernelError(
                        f"set sysctl {key}={value} in namespace {self.name}", error.errno or 0
                    ) from error

        self.call(write)

    def read_sysctl(self, key: str) -> str:
        """The value of one sysctl in this namespace, stripped."""
        return self.call(lambda: Path("/proc/sys", key).read_text().strip())

    def wait_for_port(
        self,
        address: str,
        port: int,
        *,
        timeout_s: float = 10.0,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        """Wait until a TCP connect from inside this namespace succeeds; HostError if it never does.

        With ``process`` the wait ends at once when that process has died.
        """
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET

        deadline = time.monotonic() + timeout_s
        while True:
            with self.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect((address, port))
                except OSError as error:
                    problem = str(error)
                else:
                    return
            if process is not None and process.poll() is not None:
                problem = f"the server exited with status {process.returncode}"
                break
            if time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        raise HostError(f"nothing answers at {address} port {port} in {self.name}: {problem}")

    def stop(self, child: "subprocess.Popen[bytes]", *, grace_s: float = 3.0) -> int:
        """End one process started here (SIGTERM, then SIGKILL); its return code."""
        _stop_children([child], grace_s=grace_s)
        if child in self._children:
            self._children.remove(child)
        return child.returncode

    def close(self) -> None:
        """End the processes started here. Idempotent; the namespace itself stays."""
        _stop_children(self._children)
        self._children.clear()


def _stop_children(children: Sequence["subprocess.Popen[bytes]"], *, grace_s: float = 3.0) -> None:
    # An unreaped child keeps its /proc entry, so its start time can still be read after it died.
    stop_processes([ProcessRef.of(child.pid) for child in children], grace_s=grace_s)
    for child in children:
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # unsent input of a dead child


class NamespaceGroup:
    """Namespaces that share a random prefix, are made together and die together."""

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = random_prefix() if prefix is None else prefix
        self._members: dict[str, Namespace] = {}

    def __enter__(self) -> "NamespaceGroup":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, short_name: str) -> Namespace:
        return self._members[short_name]

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._members.values())

    def declare(self, short_names: Sequence[str]) -> None:
        """Take namespaces ``prefix + short name`` into the group, whether they exist yet or not."""
        for short in short_names:
            self._members.setdefault(short, Namespace(self.prefix + short))

    def create(self, short_names: Sequence[str]) -> None:
        """Make namespaces ``prefix + short name``; their loopback device is down."""
        # Declared first: an interrupt half-way still leads to their removal.
        self.declare(short_names)
        _ip_batch([f"netns add {self.prefix}{short}" for short in short_names])

    def connect(self, pairs: Sequence[Veth]) -> None:
        """Make veth pairs, each end straight in its namespace, both down."""
        lines = []
        for veth in pairs:
            mac = f" address {veth.right_mac}" if veth.right_mac else ""
            lines.append(
                f"link add name {veth.left_device} netns {self[veth.left].name} type veth"
                f" peer name {veth.right_device} netns {self[veth.right].name}{mac}"
            )
        if lines:
            _ip_batch(lines)

    def stop_processes(self) -> None:
        """End every process started through this object; namespaces and other processes stay."""
        with uninterrupted():
            _stop_children([c for member in self for c in member._children])
            for member in self:
                member._children.clear()

    def close(self) -> None:
        """End every process started through this object and remove the namespaces. Idempotent."""
        with uninterrupted():
            self.stop_processes()
            remove_namespaces([member.name for member in self])
            self._members.clear()


def remove_namespaces(names: Iterable[str]) -> None:
    """Remove the names that exist; their devices go with the last process inside."""
    lines = [f"netns del {name}" for name in names if (NETNS_DIR / name).exists()]
    if lines:
        _ip_batch(lines, force=True)


# ------------------------------------------------------------------------------------- running


def _found(arguments: Sequence[str], start: Callable[[], T]) -> T:
    try:
        return start()
    except FileNotFoundError as error:
        raise HostError(
            f"the program {arguments[0]} is not installed; run ./task setup or install its package"
        ) from error


def _run(
    arguments: Sequence[str],
    *,
    stdin: str,
    timeout_s: float,
    where: str,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    try:
        return _found(
            arguments,
            lambda: subprocess.run(
                arguments,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                env=None if env is None else dict(env),
            ),
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"`{' '.join(arguments)}` in {where} did not end within {timeout_s:g} s"
        ) from error


def _ip_batch(lines: Sequence[str], *, namespace: str = "", force: bool = False) -> None:
    arguments = ["ip"]
    if namespace:
        arguments += ["-netns", namespace]
    if force:
        arguments.append("-force")
    arguments += ["-batch", "-"]
    where = f"namespace {namespace}" if namespace else "the root namespace"
    done = _run(arguments, stdin="\n".join(lines) + "\n", timeout_s=30.0, where=where)
    if done.returncode == 0:
        return
    said = done.stderr.strip()
    if os.geteuid() != 0:
        raise HostError(
            f"network namespaces need root: {said.splitlines()[0] if said else 'refused'}"
        )
    if force:
        return  # removal of what another process removed meanwhile
    raise HostError(f"`ip -batch` in {where} failed: {said}")
