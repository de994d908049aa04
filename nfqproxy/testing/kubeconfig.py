"""A kubeconfig for a test server: any client can be pointed at it."""

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from nfqproxy.testing.server import ApiServer

__all__ = ["kubeconfig", "write_kubeconfig"]


def kubeconfig(
    server: ApiServer, *, token: str = "", with_certificate: bool = False
) -> dict[str, Any]:
    """For this server as it listens now; with a bearer token or the client certificate, or neither.

    ``token``: by default the first the server knows, if any.
    """
    cluster: dict[str, Any] = {"server": server.url}
    user: dict[str, Any] = {}
    if server.certificates:
        cluster["certificate-authority-data"] = _data(server.certificates.authority)
        if with_certificate:
            user["client-certificate-data"] = _data(server.certificates.client)
            user["client-key-data"] = _data(server.certificates.client_key)
    token = token or next(iter(server.access.tokens), "")
    if token and not with_certificate:
        user["token"] = token
    name = "nfqproxy-testing"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }


def write_kubeconfig(
    path: Path, server: ApiServer, *, token: str = "", with_certificate: bool = False
) -> None:
    """The same as a file that only its owner reads; it is there whole or not at all."""
    text = yaml.safe_dump(kubeconfig(server, token=token, with_certificate=with_certificate))
    # mkstemp's mode is 0600; a rename replaces what was there at once.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)  # noqa: PTH105 - mkstemp gives a string
    except BaseException:
        os.unlink(name)  # noqa: PTH108
        raise


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
