"""``nfqproxy import``: kube-proxy's rules as manifests."""

import json
import socket
import sys
from typing import Any

import click
import yaml

from nfqproxy.app import kube_proxy_rules
from nfqproxy.control.address import canonical_ip
from nfqproxy.errors import InputError
from nfqproxy.kernel.rule_settings import IptablesBackend
from nfqproxy.sources import config as configuration
from nfqproxy.sources.iptables.source import (
    LIVE,
    LiveRules,
    Reading,
    dump,
    interpret,
    read_files,
    understood,
)

# The C writer (libyaml) where PyYAML was built with it; several times as fast.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@click.command("import")
@click.argument("dumps", nargs=-1, metavar="[FILE|live]...")
@click.option(
    "--node-name",
    help="Name of the node the rules are of. Default: that of this host, in lower case.",
)
@click.option(
    "--node-address",
    "node_addresses",
    multiple=True,
    help="Address of that node, primary ones first: prints a Node too; may be repeated.",
)
@click.option("--iptables", type=click.Choice(configuration.IPTABLES), default="auto")
@click.option("--strict", is_flag=True, help="Print nothing if any rule is not understood.")
@click.option("-o", "output", type=click.Choice(["yaml", "json", "config"]), default="yaml")
def import_(
    dumps: tuple[str, ...],
    node_name: str | None,
    node_addresses: tuple[str, ...],
    iptables: str,
    strict: bool,
    output: str,
) -> int:
    """Print the Services and endpoints behind kube-proxy's iptables rules as manifests.

    FILE is what iptables-save or ip6tables-save printed on a node (- is stdin), live (the default) this
    node as it is. What the rules hold beside is named by line on stderr. -o config prints a configuration
    file by which nfqproxy does as that kube-proxy does.

    Example: nfqproxy import kube-proxy-v4.save kube-proxy-v6.save -o yaml
    """
    names = dumps or (LIVE,)
    read = read_files(
        [name for name in names if name != "-"],
        LiveRules(kube_proxy_rules(IptablesBackend(iptables))),
    )
    if "-" in names:
        read.append(dump("stdin", sys.stdin.buffer.read()))
    reading = interpret(
        read,
        node_name=node_name or socket.gethostname().lower(),
        node_addresses=[_address(text) for text in node_addresses],
    )
    for loss in reading.losses:
        click.echo(f"nfqproxy: {loss}", err=True)
    if reading.losses and strict:
        raise InputError(
            f"{len(reading.losses)} rules are not understood, as named above; leave out --strict to have"
            " the rest"
        )
    _print(understood(reading), output)
    return 0


def _address(text: str) -> str:
    try:
        return canonical_ip(text)
    except ValueError as error:
        raise InputError(f"--node-address: {error}") from None


def _print(reading: Reading, output: str) -> None:
    if output == "json":
        items = {"apiVersion": "v1", "kind": "List", "items": list(reading.documents)}
        click.echo(json.dumps(items, indent=2))
        return
    if output == "config":
        yaml.dump(reading.configuration, sys.stdout, _Dumper, sort_keys=False)
        return
    click.echo("# Made by nfqproxy import from the rules of kube-proxy.")
    yaml.dump_all(reading.documents, sys.stdout, _Dumper, sort_keys=False, explicit_start=True)
