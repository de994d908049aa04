"""Certificates for a test: an authority, a server, a client; made by the openssl tool.

Elliptic keys of one day's life: made in some ten milliseconds each.
"""

import ipaddress
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from nfqproxy.errors import HostError

__all__ = ["Certificates", "make_certificates"]

_DAYS = "1"


class Certificates(Struct, frozen=True, kw_only=True):
    """Files in PEM."""

    authority: Path
    """What clients trust."""
    server: Path
    server_key: Path
    client: Path
    """A client's, whose common name is its user."""
    client_key: Path

    def server_context(self) -> ssl.SSLContext:
        """For listening; a client may show a certificate, and need not."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.authority))
        context.load_cert_chain(self.server, self.server_key)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def client_context(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        """For a client that trusts this server, and shows its certificate if so wanted."""
        context = ssl.create_default_context(cafile=str(self.authority))
        if with_certificate:
            context.load_cert_chain(self.client, self.client_key)
        return context


def make_certificates(
    directory: Path,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "::1", "localhost"),
    user: str = "proxy",
) -> Certificates:
    """Write them into a directory: the server's for these addresses or names, the client's for this user.

    Raises HostError when openssl is missing or fails.
    """
    made = Certificates(
        authority=directory / "ca.crt",
        server=directory / "server.crt",
        server_key=directory / "server.key",
        client=directory / "client.crt",
        client_key=directory / "client.key",
    )
    authority_key = directory / "ca.key"
    _make(
        made.authority, authority_key, "/CN=nfqproxy.testing", ["basicConstraints=critical,CA:TRUE"]
    )
    signer = ("-CA", str(made.authority), "-CAkey", str(authority_key))
    names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
    leaf = "basicConstraints=critical,CA:FALSE"
    _make(
        made.server,
        made.server_key,
        f"/CN={hosts[0]}",
        [leaf, f"subjectAltName={names}", "extendedKeyUsage=serverAuth"],
        signer,
    )
    _make(
        made.client, made.client_key, f"/CN={user}", [leaf, "extendedKeyUsage=clientAuth"], signer
    )
    return made


def _make(
    certificate: Path, key: Path, subject: str, extensions: list[str], signer: Sequence[str] = ()
) -> None:
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
    ]
    command += [
        "-noenc",
        "-days",
        _DAYS,
        "-subj",
        subject,
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    for extension in extensions:
        command += ["-addext", extension]
    try:
        subprocess.run([*command, *signer], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise HostError("openssl not found; install with: apt-get install openssl") from None
    except subprocess.CalledProcessError as error:
        raise HostError(
            f"openssl makes no certificate: {error.stderr.strip()[-300:]}; version 3 is needed"
        ) from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
