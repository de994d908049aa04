"""``nfqproxy reconcile``: connection tracking against the Services, now."""

import json
from pathlib import Path
from typing import Any

import click

from nfqproxy.api import admin
from nfqproxy.app import App
from nfqproxy.errors import InputError
from nfqproxy.sources import config as configuration

_FAILED = 1


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file."
)
@click.option(
    "--manifests",
    multiple=True,
    type=click.Path(),
    help="File or directory of manifests to compare with, no proxy asked; may be repeated.",
)
@click.option(
    "--iptables-save",
    multiple=True,
    metavar="FILE|live",
    help="In place of manifests: kube-proxy's rules, as for nfqproxy run; may be repeated.",
)
@click.option("--mode", type=click.Choice(configuration.MODES), help="Default: replace.")
@click.option("--node-name", "hostname_override", help="Name of this node. Default: the host's.")
@click.option(
    "--node-address", "node_addresses", multiple=True, help="Address of this node; repeatable."
)
@click.option("-o", "output", type=click.Choice(["text", "json"]), default="text")
def reconcile(config_file: Path | None, dry_run: bool, output: str, **flags: Any) -> int:
    """Delete UDP and SCTP entries that hold a client to a backend that is gone, or to none.

    Looks at the connection tracking table of this network namespace, once. The running proxy does it
    by its own Services, and does it by itself too; with --manifests or --config no proxy is asked. Entries
    of other traffic are never touched, neither are those of Services without any serving endpoint.

    Example: nfqproxy reconcile --dry-run
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    if config_file is None and not {"manifests", "iptables_save"} & given.keys():
        if given:
            name = next(iter(given))
            flag = {"hostname_override": "node-name", "node_addresses": "node-address"}
            raise InputError(
                f"--{flag.get(name, name)} goes with --manifests, --iptables-save or --config;"
                " without them the running proxy is asked, which knows it"
            )
        document = admin.ask("reconcile", dry_run=dry_run)
    else:
        config = configuration.from_file_and_flags(config_file, given)
        document = App(config).reconcile(dry_run=dry_run).document()
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)
    return _FAILED if document["failed"] else 0


def _show(document: dict[str, Any]) -> None:
    verb = "would delete" if document["dry_run"] else "stale"
    for entry in document["entries"]:
        port = f":{entry['port_name']}" if entry["port_name"] else ""
        backend = f" -> {entry['backend']}" if entry["backend"] else ", untranslated"
        click.echo(
            f"{verb} {entry['protocol']} {entry['client']} -> {entry['frontend']}{backend}"
            f" ({entry['namespace']}/{entry['service']}{port}: {entry['reason']})"
        )
    if document["entries_left_off"]:
        click.echo(f"... and {document['entries_left_off']} more")
    stale = sum(document["stale"].values())
    if document["dry_run"]:
        click.echo(f"{stale} of {document['examined']} entries would be deleted")
        return
    text = f"deleted {sum(document['deleted'].values())} of {document['examined']} entries"
    if document["vanished"]:
        text += f"; {document['vanished']} ended by themselves"
    if document["failed"]:
        text += f"; the kernel kept {document['failed']}"
    click.echo(text)
