"""``nfqproxy rules`` and ``nfqproxy cleanup``: the bootstrap rules by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nfqproxy.api import admin
from nfqproxy.app import rule_settings
from nfqproxy.cli.data_path_options import data_path_options
from nfqproxy.cli.groups import HelpfulGroup
from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel import commands, host_check, node_rules
from nfqproxy.kernel.affinity_file import remove_stored, store_path
from nfqproxy.kernel.processes import uninterrupted
from nfqproxy.kernel.rule_settings import RuleSettings
from nfqproxy.kernel.rule_text import render as render_rules
from nfqproxy.sources import config as configuration

F = TypeVar("F", bound=Callable[..., Any])

_output = click.option("-o", "output", type=click.Choice(["text", "json"]), default="text")


def _settings_options(function: F) -> F:
    for option in (
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            help="The proxy's configuration file; flags win over it.",
        ),
        click.option("--mode", type=click.Choice(configuration.MODES), help="Default: replace."),
        click.option("--workers", type=int, help="Queues to spread connections over. Default: 1."),
        click.option("--queue", "first_queue", type=int, help="The first queue. Default: 100."),
        click.option(
            "--iptables", type=click.Choice(configuration.IPTABLES), help="Default: auto."
        ),
    ):
        function = option(function)
    return data_path_options(function)


def _settings(config_file: Path | None, **flags: Any) -> RuleSettings:
    return rule_settings(configuration.from_file_and_flags(config_file, flags))


@click.group(cls=HelpfulGroup)
def rules() -> None:
    """Print or apply the bootstrap rules: a fixed number, whatever the number of Services.

    Example: nfqproxy rules render --mode overlay
    """


@rules.command()
@_settings_options
@_output
def render(output: str, **flags: Any) -> None:
    """Print the rules as iptables-restore, ipset-restore and nft texts; changes nothing.

    Example: nfqproxy rules render --workers 2
    """
    sections = render_rules(_settings(**flags)).sections()
    if output == "json":
        click.echo(json.dumps(sections, indent=2))
        return
    for name, text in sections.items():
        click.echo(f"# --- {name}")
        click.echo(text.rstrip("\n"))


@rules.command()
@_settings_options
@_output
def apply(output: str, **flags: Any) -> None:
    """Put the rules on this node; the sets stay as they are, empty on a new node.

    Give the configuration file of the proxy that runs here, if it has one: node ports on 127.0.0.1 and
    interfaces of pods have rules of their own.

    Example: nfqproxy rules apply --config nfqproxy.yaml
    """
    settings = _settings(**flags)
    host_check.check_host(settings)
    with uninterrupted():
        backend = node_rules.apply(settings)
    if output == "json":
        click.echo(json.dumps({"applied": True, "iptables": str(backend)}))
    else:
        click.echo(f"applied for mode {settings.mode} (iptables back end {backend})")


@click.command()
@_output
def cleanup(output: str) -> None:
    """Remove all that any version of nfqproxy made on this node, and nothing else.

    Established connections go on: their conntrack entries stay. Running it twice is fine. Stop the
    proxy first: one that goes on running without its rules serves nobody.

    Example: nfqproxy cleanup
    """
    with uninterrupted():
        removed = node_rules.cleanup() + remove_stored(store_path())
    if output == "json":
        click.echo(json.dumps({"removed": removed}))
    elif removed:
        for line in removed:
            click.echo(f"removed {line}")
    else:
        click.echo("nothing to remove")
    pid = _running_proxy()
    if pid is not None:
        click.echo(
            f"nfqproxy: process {pid} still runs here, now without rules: stop it, or start it again",
            err=True,
        )
    missing = [tool for tool in ("iptables", "ipset", "nft") if commands.find(tool) is None]
    if missing:
        packages = " ".join(commands.PACKAGES[tool] for tool in missing)
        raise HostError(
            f"without {', '.join(missing)} it is unknown whether more is left;"
            f" apt-get install {packages} and run cleanup again"
        )


def _running_proxy() -> int | None:
    """Process id of the proxy of this network namespace, None when none answers."""
    try:
        return int(admin.ask("status")["pid"])
    except NfqproxyError:
        return None
