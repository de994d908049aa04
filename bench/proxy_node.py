"""A node that runs nfqproxy as a user starts it, a client, and two pods that take connections.

Nothing is pinned to a CPU here: what is timed is what an operator sees, not the cost of a packet.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from bench.api_server import ApiServerProcess, api_server
from bench.service_files import ServiceFiles, Source
from bench.services import BACKEND_PORT, PORT
from bench.world import NODE_NAME
from nfqproxy.api import admin
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.affinity_file import remove_stored, store_path
from nfqproxy.kernel.netns import Namespace, NamespaceGroup
from nfqproxy.lab.addresses import PODS4
from nfqproxy.lab.topology import Topology, topology

_GRACE_S = 20.0
_LOAD_LIMIT_S = 120.0
_SOCKETS_AT_ONCE = 128
# l_onoff, l_linger: close() sends RST, so that no TIME_WAIT piles up.
_RESET = struct.pack("ii", 1, 0)
_FOLLOWED = "nfqproxy: revision "


class WrongConnectionError(NfqproxyError):
    """A connection failed or came to the wrong pod, so there is no time to report."""


class ProxyNode:
    """The network, and the proxy while it runs. Use :func:`proxy_node`."""

    def __init__(self, built: Topology, log: IO[bytes]) -> None:
        self._client = built.client.namespace
        self._node = built.node.namespace
        self._router = built.router
        self._log = log
        self._unused: list[socket.socket] = []
        self._listeners = [_listener(pod.namespace, pod.address4) for pod in built.pods]
        self.pods = [pod.address4 for pod in built.pods]
        """Addresses of the pods; :meth:`connect` tells them by their place here."""
        self.last_failure = ""
        """Why the last :meth:`connect` that failed did."""

    @contextlib.contextmanager
    def served(self, files: ServiceFiles) -> Iterator[ApiServerProcess | None]:
        """The API server that serves the files, if their source is one."""
        if files.source is not Source.KUBERNETES:
            yield None
            return
        with api_server(self._router, files.path) as server:
            yield server

    @contextlib.contextmanager
    def proxy(self, manifests: Path, server: ApiServerProcess | None = None) -> Iterator["Running"]:
        """Starts ``nfqproxy run``; at the end it is stopped and all it made is removed.

        With ``server`` it follows that in place of the manifests.
        """
        source = ["--manifests", str(manifests)]
        if server is not None:
            source = ["--kubeconfig", str(server.kubeconfig)]
        words = [*source, "--node-name", NODE_NAME, "--workers", "1"]
        command = [sys.executable, "-m", "nfqproxy", "run", *words, "--cluster-cidr", PODS4]
        self._log.truncate(0)
        started_s = time.monotonic()
        # Appending: what is truncated for the next proxy must not come back as a hole.
        with Path(self._log.name).open("ab") as log:
            process = self._node.popen(*command, stderr=log)
        running = Running(self, process.pid, started_s)
        try:
            yield running
        finally:
            status = self._node.stop(process, grace_s=_GRACE_S)
            self.cleanup()
        running.raise_unless(status == 0, f"nfqproxy run ended with status {status} after SIGTERM")

    def cleanup(self) -> None:
        """Rules, sets and entries go, as before the first start."""
        self._node.run(sys.executable, "-m", "nfqproxy", "cleanup")
        self._node.run("conntrack", "-F")
        self._node.call(lambda: remove_stored(store_path()))

    def connect(self, address: str, timeout_s: float) -> int | None:
        """Connects to a Service and hangs up: the pod that got it, None if it was not connected."""
        if not self._unused:
            self._unused = self._client.call(
                lambda: [socket.socket() for _ in range(_SOCKETS_AT_ONCE)]
            )
        with self._unused.pop() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.settimeout(timeout_s)
            try:
                client.connect((address, PORT))
            except OSError as error:
                self.last_failure = str(error)
                return None
            self.last_failure = "no pod got it"
            port = client.getsockname()[1]
            return self._accepted(port)

    def touch(self, address: str) -> None:
        """Sends a SYN to a Service and does not wait for an answer."""
        with contextlib.suppress(BlockingIOError, OSError):
            self.connect(address, 0.0)

    def _accepted(self, port: int) -> int | None:
        """The pod at which the connection from ``port`` is; waits for it a moment."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            ready, _, _ = select.select(self._listeners, [], [], 1.0)
            for index, listener in enumerate(self._listeners):
                if listener in ready:
                    server, peer = listener.accept()
                    server.close()
                    # Others are late: of connects that were given up.
                    if peer[1] == port:
                        return index
        return None

    def status(self) -> dict[str, object] | None:
        """What ``nfqproxy status`` tells; None while no proxy answers."""
        try:
            return self._node.call(lambda: admin.ask("status"))
        except NfqproxyError:
            return None

    def said(self) -> str:
        """The proxy's log."""
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        """Closes the sockets."""
        for each in (*self._unused, *self._listeners):
            each.close()


class Running:
    """A proxy at work."""

    def __init__(self, node: ProxyNode, pid: int, started_s: float) -> None:
        self._node = node
        self.pid = pid
        """Of the supervisor."""
        self.started_s = started_s
        """When its command was started, on the monotonic clock."""

    def workers(self) -> list[dict[str, object]]:
        """The ``workers`` of its status; empty while it does not answer."""
        status = self._node.status()
        found = status["workers"] if status else []
        assert isinstance(found, list)
        return found

    def is_alive(self) -> bool:
        """Whether the supervisor still runs."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z"
        return False

    def wait_connected(self, address: str, pod: int, *, within_s: float) -> float:
        """Seconds since the start until a connection to a Service reaches ``pod``."""
        deadline = self.started_s + within_s
        while True:
            found = self._node.connect(address, 0.02)
            now = time.monotonic()
            if found == pod:
                return now - self.started_s
            self.raise_unless(
                found is None, f"a connection to {address} came to pod {found}, not {pod}"
            )
            self.raise_unless(self.is_alive(), "nfqproxy run ended")
            self.raise_unless(
                now < deadline, f"no connection to {address} came through within {within_s:g} s"
            )
            # The more there is to do, the less it is disturbed: a step of one percent.
            time.sleep(max(0.0005, (now - self.started_s) / 100))

    def wait_moved(self, address: str, old: int, new: int, *, within_s: float) -> float:
        """Seconds until a connection reaches pod ``new``; none may fail or go anywhere else."""
        start = time.monotonic()
        while True:
            # A lost SYN comes again after a second; that would be seen as a slow change, not as a loss.
            found = self._node.connect(address, 3.0)
            elapsed = time.monotonic() - start
            if found == new:
                return elapsed
            self.raise_unless(
                found == old,
                f"a connection to {address} failed during the change ({self._node.last_failure})",
            )
            self.raise_unless(
                elapsed < within_s,
                f"connections to {address} still go to the old endpoint after {within_s:g} s",
            )
            time.sleep(max(0.0001, elapsed / 100))

    def changes(self) -> int:
        """Changes of the manifests that workers and kernel have followed so far."""
        return self._node.said().count(_FOLLOWED)

    def wait_changes(self, count: int, *, within_s: float) -> None:
        """Waits until so many changes have been followed."""
        deadline = time.monotonic() + within_s
        while self.changes() < count:
            self.raise_unless(time.monotonic() < deadline, "a change is not followed")
            time.sleep(0.01)

    def raise_unless(self, is_right: bool, problem: str) -> None:
        """:class:`WrongConnectionError` with the end of the proxy's log."""
        if not is_right:
            log = "\n".join(self._node.said().splitlines()[-10:])
            raise WrongConnectionError(f"{problem}; its log ends: {log or 'empty'}")


def _listener(place: Namespace, address: str) -> socket.socket:
    listener = place.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, BACKEND_PORT))
    listener.listen(256)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def proxy_node() -> Iterator[ProxyNode]:
    """Builds it, and removes every trace at the end."""
    prefix = f"nfqb-{os.getpid()}-{secrets.token_hex(2)}-"
    with (
        tempfile.NamedTemporaryFile(prefix="nfqb-err-") as log,
        topology(clients=1, pods=(2,), prefix=prefix) as built,
    ):
        node = ProxyNode(built, log)
        try:
            yield node
        finally:
            node.close()


def load_rules(command: Sequence[str], rules: str) -> float:
    """Seconds that a command takes to load rules into a namespace of its own."""
    with NamespaceGroup(f"nfqb-{os.getpid()}-{secrets.token_hex(2)}-") as group:
        group.create(["rules"])
        start = time.monotonic()
        group["rules"].run(*command, stdin=rules, timeout_s=_LOAD_LIMIT_S)
        return time.monotonic() - start
