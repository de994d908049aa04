"""``nfqproxy run``: the proxy."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import click
import uvloop

from nfqproxy.app import App, Interrupted
from nfqproxy.cli.data_path_options import data_path_options
from nfqproxy.sources import config as configuration

_INTERRUPTED = 130


@click.command()
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file."
)
@click.option(
    "--manifests",
    multiple=True,
    type=click.Path(),
    help="File or directory of Service and EndpointSlice manifests, followed; may be repeated.",
)
@click.option(
    "--iptables-save",
    multiple=True,
    metavar="FILE|live",
    help="In place of manifests: what iptables-save printed on this node under kube-proxy, or its rules as"
    " they are now; may be repeated (ip6tables-save).",
)
@click.option(
    "--kubeconfig",
    type=click.Path(),
    help="In place of manifests: the Kubernetes API that this kubeconfig file names, followed.",
)
@click.option(
    "--in-cluster",
    is_flag=True,
    default=None,
    help="In place of manifests: the Kubernetes API, by the service account of this pod.",
)
@click.option("--mode", type=click.Choice(configuration.MODES), help="Default: replace.")
@data_path_options
@click.option("--workers", type=int, help="Worker processes, one queue each. Default: 1.")
@click.option("--reader", type=click.Choice(configuration.READERS), help="Default: netlink.")
@click.option("--queue", "first_queue", type=int, help="Number of the first queue. Default: 100.")
@click.option("--queue-length", type=int, help="Packets that may wait per queue. Default: 4096.")
@click.option(
    "--node-name",
    "hostname_override",
    envvar="NODE_NAME",
    help="Name of this node in the cluster. Default: $NODE_NAME, else the host's name.",
)
@click.option(
    "--node-address", "node_addresses", multiple=True, help="Address of this node; repeatable."
)
@click.option("--cluster-cidr", help="Pod networks, comma separated.")
@click.option("--masquerade-all/--no-masquerade-all", default=None, help="Masquerade everybody.")
@click.option(
    "--steer-all/--no-steer-all",
    default=None,
    help='Overlay mode: steer all Services, not only those with nfqproxy.io/steer: "true".',
)
@click.option("--iptables", type=click.Choice(configuration.IPTABLES), help="Default: auto.")
@click.option("--seed", type=int, help="Seed of the balancers' random numbers.")
@click.option("--once", is_flag=True, help="Program the kernel, let its fallback serve, and exit.")
def run(config_file: Path | None, once: bool, **flags: Any) -> int:
    """Run the proxy in this network namespace, as root, until SIGTERM or Ctrl-C.

    Flags win over the configuration file. SIGHUP reads manifests or dumps again and puts back what others
    have taken from the kernel's rules and sets. When the proxy stops, the kernel's fallback goes on
    serving; nfqproxy cleanup removes everything.

    Example: nfqproxy run --manifests services.yaml --node-name n1 --cluster-cidr 10.244.0.0/16

    Example: nfqproxy run --kubeconfig /etc/nfqproxy/kubeconfig --cluster-cidr 10.244.0.0/16
    """
    config = configuration.from_file_and_flags(config_file, flags)
    try:
        uvloop.run(_run(config, once=once))
    except Interrupted:
        return _INTERRUPTED
    return 0


async def _run(config: configuration.ProxyConfig, *, once: bool) -> None:
    try:
        await App(config).run(once=once)
    finally:
        # All is done but leaving: a signal that comes again must not turn a clean end into a failure.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
