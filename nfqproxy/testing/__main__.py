"""``python -m nfqproxy.testing``: a test API server as a process, for any client.

It prints a kubeconfig, then serves until Ctrl-C or SIGTERM. Faults and refusals are switched while it runs by the
paths of :mod:`nfqproxy.testing.control`.
"""

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
import tempfile
from pathlib import Path

import click
import yaml

from nfqproxy.errors import HostError, InputError, NfqproxyError
from nfqproxy.testing import ApiServer, Settings, kubeconfig, write_kubeconfig
from nfqproxy.testing.access import Access
from nfqproxy.testing.certificates import make_certificates
from nfqproxy.testing.faults import Fault
from nfqproxy.testing.manifests import ManifestFollower

logger = logging.getLogger("nfqproxy.testing")

_INTERRUPTED = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--manifests",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File or directory of manifests to serve, followed; may be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option(
    "--kubeconfig",
    "config_file",
    type=click.Path(path_type=Path),
    help="File to write the kubeconfig to. Default: standard output.",
)
@click.option("--tls/--no-tls", default=True, help="Default: TLS, with certificates of its own.")
@click.option("--token", help="The bearer token of user proxy. Default: a random one.")
@click.option("--seed", type=int, default=0, help="Seed of faults and generated names.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND=RATE",
    help=f"A fault and its probability, 0 to 1; may be repeated. Kinds: {', '.join(Fault)}.",
)
@click.option("--history", type=click.IntRange(1), default=10_000, help="Writes to remember.")
@click.option(
    "--watch-list/--no-watch-list", default=True, help="Whether sendInitialEvents is understood."
)
def main(
    paths: tuple[Path, ...],
    host: str,
    port: int,
    config_file: Path | None,
    tls: bool,
    token: str | None,
    seed: int,
    faults: tuple[str, ...],
    history: int,
    watch_list: bool,
) -> None:
    """Serve Kubernetes objects from manifests to any client, with faults if so wanted.

    Services, EndpointSlices, Nodes, Namespaces, Events and ServiceCIDRs can be listed, watched and written.

    Example: python -m nfqproxy.testing --manifests services.yaml --kubeconfig /tmp/kubeconfig --fault cut=0.1
    """
    with contextlib.ExitStack() as stack:
        certificates = None
        if tls:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="nfqproxy-tls-"))
            )
            hosts = dict.fromkeys([host, "127.0.0.1", "::1", "localhost"])
            certificates = make_certificates(directory, hosts=tuple(hosts))
        server = ApiServer(
            seed=seed,
            settings=Settings(history=history, has_watch_list=watch_list),
            access=Access({token or secrets.token_urlsafe(24): "proxy"}),
            certificates=certificates,
            host=host,
            port=port,
        )
        for text in faults:
            name, _, rate = text.partition("=")
            try:
                server.faults.set(name, float(rate))
            except ValueError:
                raise InputError(f"--fault {text}: give KIND=RATE, such as cut=0.1") from None
        asyncio.run(_serve(server, paths, config_file))


async def _serve(server: ApiServer, paths: tuple[Path, ...], config_file: Path | None) -> None:
    follower = ManifestFollower(server, paths)
    count = follower.load() if paths else 0
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        await server.start()
    except OSError as error:
        raise HostError(
            f"cannot listen on {server.host} port {server.port}: {error.strerror}; give another --host or --port"
        ) from None
    try:
        if config_file is None:
            click.echo(yaml.safe_dump(kubeconfig(server)), nl=False)
            sys.stdout.flush()
        else:
            try:
                write_kubeconfig(config_file, server)
            except OSError as error:
                raise InputError(
                    f"--kubeconfig {config_file}: cannot be written: {error.strerror}; give another file"
                ) from None
        logger.info("%d objects at %s", count, server.url)
        if paths:
            await follower.follow(stop)
        await stop.wait()
    finally:
        await server.stop()


def _run() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="nfqproxy: %(message)s")
    try:
        main(prog_name="python -m nfqproxy.testing")
    except NfqproxyError as error:
        click.echo(f"nfqproxy: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    _run()
