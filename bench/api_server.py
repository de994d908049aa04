"""A test API server on the gateway of the bench's network, for a proxy that follows it over that network.

It runs on the same machine: what it does for a list or a change is in the times that are measured.
"""

import contextlib
import http.client
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.world import NODE_NAME
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.addresses import ROUTER4

_PORT, _TOKEN = 6443, "of-the-bench"
_START_LIMIT_S = 60.0


class ApiServerProcess:
    """The running server. Use :func:`api_server`."""

    def __init__(self, kubeconfig: Path, connection: http.client.HTTPConnection) -> None:
        self.kubeconfig = kubeconfig
        self._connection = connection

    def prepare_move(self, service: str, pod: str) -> "Move":
        """The only endpoint of a Service of the bench becomes ``pod``."""
        endpoint = {"addresses": [pod], "conditions": {"ready": True}, "nodeName": NODE_NAME}
        return Move(self._connection, f"{service}-1", json.dumps({"endpoints": [endpoint]}))


class Move:
    """A write that is ready to be sent."""

    def __init__(self, connection: http.client.HTTPConnection, name: str, patch: str) -> None:
        self._connection = connection
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/{name}"
        self._patch = patch

    def apply(self) -> None:
        """Send it; what the server says to it is looked at by :meth:`finish`."""
        headers = {
            "Authorization": f"Bearer {_TOKEN}",
            "Content-Type": "application/merge-patch+json",
        }
        self._connection.request("PATCH", self._path, self._patch, headers)

    def finish(self) -> None:
        """Raises NfqproxyError unless the server has taken it."""
        answer = self._connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise NfqproxyError(f"the test API server answers {answer.status}: {said[:200]!r}")


@contextlib.contextmanager
def api_server(place: Namespace, manifests: Path) -> Iterator[ApiServerProcess]:
    """Starts it with these manifests and waits until it listens."""
    with tempfile.TemporaryDirectory(prefix="nfqb-api-") as directory:
        kubeconfig = Path(directory, "kubeconfig")
        process = place.popen(
            *[sys.executable, "-m", "nfqproxy.testing", "--manifests", str(manifests)],
            *["--host", ROUTER4, "--port", str(_PORT), "--no-tls", "--token", _TOKEN],
            *["--kubeconfig", str(kubeconfig)],
        )
        connection = http.client.HTTPConnection(ROUTER4, _PORT)
        try:
            deadline = time.monotonic() + _START_LIMIT_S
            while not kubeconfig.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NfqproxyError("the test API server does not start")
                time.sleep(0.01)
            connection.sock = place.socket(socket.AF_INET, socket.SOCK_STREAM)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.connect((ROUTER4, _PORT))
            yield ApiServerProcess(kubeconfig, connection)
        finally:
            connection.close()
            place.stop(process)
