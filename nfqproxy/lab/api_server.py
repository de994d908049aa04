"""A Kubernetes API server in a namespace of the lab: ``python -m nfqproxy.testing`` as a process there."""

import base64
import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel.netns import Namespace

__all__ = ["ApiServerProcess", "start_api_server"]

_START_TIMEOUT_S = 20.0
_ASK_TIMEOUT_S = 20.0


class ApiServerProcess(Struct, frozen=True, kw_only=True):
    """A running server; it ends with its namespace."""

    namespace: Namespace
    child: "subprocess.Popen[bytes]"
    kubeconfig: Path
    """For clients on any host of the lab that reaches its address."""
    manifests: Path
    """A directory whose manifests it serves and follows."""
    log: Path

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One request from its own namespace, API or :mod:`nfqproxy.testing.control`: the JSON of the answer.

        Raises NfqproxyError with what the server says when it refuses.
        """
        config = yaml.safe_load(self.kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        trust = ssl.create_default_context(
            cadata=base64.b64decode(cluster["certificate-authority-data"]).decode()
        )
        request = urllib.request.Request(
            cluster["server"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {user['token']}",
                "Content-Type": "application/json",
            },
            method=method,
        )

        def fetch() -> bytes:
            with urllib.request.urlopen(request, timeout=_ASK_TIMEOUT_S, context=trust) as answer:
                content: bytes = answer.read()
                return content

        try:
            return json.loads(self.namespace.call(fetch))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise NfqproxyError(f"{method} {path}: {error.code}: {said.strip()[:500]}") from None


def start_api_server(
    namespace: Namespace,
    directory: Path,
    *,
    address: str,
    port: int = 6443,
    flags: Sequence[str] = (),
) -> ApiServerProcess:
    """Start it on an address of this namespace and wait until it serves; HostError if it does not.

    In ``directory`` are its kubeconfig, its log and the directory ``manifests``, which may hold some already.
    ``flags``: further ones of ``python -m nfqproxy.testing``.
    """
    manifests = directory / "manifests"
    manifests.mkdir(exist_ok=True)
    if not any(manifests.iterdir()):
        # A directory without manifests is a mistake, for whoever names one; here it is to be filled later.
        (manifests / "namespace.yaml").write_text(
            "{apiVersion: v1, kind: Namespace, metadata: {name: lab}}\n"
        )
    kubeconfig, log = directory / "kubeconfig", directory / "api-server.log"
    with log.open("wb") as output:
        child = namespace.popen(
            sys.executable,
            "-m",
            "nfqproxy.testing",
            f"--manifests={manifests}",
            f"--host={address}",
            f"--port={port}",
            f"--kubeconfig={kubeconfig}",
            *flags,
            stderr=output,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    # It writes the file when it serves.
    while not kubeconfig.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip()[-500:]
            raise HostError(f"the API server does not start; its log says: {said or 'nothing'}")
        time.sleep(0.005)
    return ApiServerProcess(
        namespace=namespace, child=child, kubeconfig=kubeconfig, manifests=manifests, log=log
    )
