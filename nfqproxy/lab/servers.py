"""Real servers in pod namespaces: nginx, dnsmasq, and a small echo server that tells the peer.

Every server is a child of the namespace it runs in (:meth:`Namespace.popen`), keeps its files in a
directory of its own and never forks into the background, so closing the namespace ends it.

nginx answers ``GET /`` on every port with its backend name, as body and as ``X-Backend``, and with
the client's address and port as it sees them (``X-Client``): that is how a test asserts the source
address. ``GET /bulk`` is 256 MiB of zeros from a sparse file.

dnsmasq answers ``whoami.lab``: TXT the backend name, A and AAAA the pod's own addresses.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nfqproxy.errors import HostError
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Pod

__all__ = [
    "BULK_BYTES",
    "DEBIAN_PACKAGES",
    "WHOAMI",
    "require_programs",
    "server_directory",
    "start_dns",
    "start_echo",
    "start_web",
]

WHOAMI = "whoami.lab"
BULK_BYTES = 256 * 1024 * 1024
WEB_PORTS = (80, 8080)

DEBIAN_PACKAGES = {
    "conntrack": "conntrack",
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "dnsmasq": "dnsmasq-base",
    "ip": "iproute2",
    "ip6tables": "iptables",
    "ipset": "ipset",
    "iptables": "iptables",
    "nft": "nftables",
    "nginx": "nginx-light",
}
"""The Debian package of each program the lab calls."""


def require_programs(names: Iterable[str]) -> None:
    """Raise HostError that names the missing programs and their Debian packages."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        packages = " ".join(sorted({DEBIAN_PACKAGES[name] for name in missing}))
        raise HostError(f"{', '.join(missing)} not found; install with: apt-get install {packages}")


@contextmanager
def server_directory() -> Iterator[Path]:
    """A private temporary directory for the servers of one lab, removed afterwards.

    Readable by others because nginx's workers serve from it as the user nobody.
    """
    with tempfile.TemporaryDirectory(prefix="nfqproxy-lab-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


_NGINX = """\
user nobody nogroup;
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    default_type text/plain;
    server_tokens off;
    sendfile on;
    keepalive_timeout 600s;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
{listens}
        add_header X-Backend {name} always;
        add_header X-Client "$remote_addr" always;
        add_header X-Client-Port "$remote_port" always;
        location = /bulk {{ root {directory}; }}
        location / {{ return 200 "{name}\\n"; }}
    }}
}}
"""


def start_web(
    pod: Pod, directory: Path, *, name: str = "", ports: Sequence[int] = WEB_PORTS
) -> "subprocess.Popen[bytes]":
    """Start nginx in a pod on both families and wait until it answers; HostError if it does not.

    ``name`` is the backend name it answers, the pod's name by default.
    """
    name = name or pod.name
    for port in ports:
        _require_free(pod, port)
    home = directory / f"nginx-{name}"
    home.mkdir()
    with (home / "bulk").open("wb") as bulk:
        bulk.truncate(BULK_BYTES)
    # nginx serves it as the user nobody, whatever root's umask is.
    home.chmod(0o755)
    (home / "bulk").chmod(0o644)
    # A long accept queue: the load opens connections faster than one worker may accept them.
    listens = "\n".join(
        f"        listen {port} backlog=4096;\n        listen [::]:{port} ipv6only=on backlog=4096;"
        for port in ports
    )
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(directory=home, listens=listens, name=name))
    log = home / "error.log"
    # -e: without it nginx opens its compiled-in log before it reads the configuration.
    child = pod.namespace.popen("nginx", "-p", str(home), "-e", str(log), "-c", str(config))
    for port in ports:
        _wait(pod, port, child, log)
    return child


def start_dns(pod: Pod, directory: Path, *, name: str = "") -> "subprocess.Popen[bytes]":
    """Start dnsmasq in a pod on UDP and TCP port 53 and wait until it answers."""
    name = name or pod.name
    _require_free(pod, 53)
    log = directory / f"dnsmasq-{name}.log"
    with log.open("wb") as output:
        child = pod.namespace.popen(
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
            "--user=nobody",
            "--log-facility=-",
            "--cache-size=0",
            f"--host-record={WHOAMI},{pod.address4},{pod.address6}",
            f"--txt-record={WHOAMI},{name}",
            stderr=output,
        )
    _wait(pod, 53, child, log)
    return child


def start_echo(namespace: Namespace, port: int, *, name: str = "echo") -> "subprocess.Popen[bytes]":
    """Start ``python -m nfqproxy.lab.echo`` (TCP and UDP, both families) and wait for it."""
    child = namespace.popen(sys.executable, "-m", "nfqproxy.lab.echo", name, str(port))
    namespace.wait_for_port("127.0.0.1", port, process=child)
    return child


def _require_free(pod: Pod, port: int) -> None:
    """Raise HostError when something listens already: the wait would take it for the new server."""

    def is_taken() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            return probe.connect_ex((pod.address4, port)) == 0

    if pod.namespace.call(is_taken):
        raise HostError(f"port {port} of {pod.name} is taken; stop the server that listens there")


def _wait(pod: Pod, port: int, child: "subprocess.Popen[bytes]", log: Path) -> None:
    try:
        pod.namespace.wait_for_port(pod.address4, port, process=child)
    except HostError as error:
        said = log.read_text(errors="replace").strip() if log.exists() else ""
        raise HostError(f"{error}; its log says: {said[-500:] or 'nothing'}") from error
