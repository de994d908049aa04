"""``nfqproxy status``: the state of the running proxy, over its admin socket."""

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nfqproxy.api import admin


@click.command()
@click.option("-o", "output", type=click.Choice(["text", "json"]), default="text")
def status(output: str) -> None:
    """Show the proxy that runs in this network namespace: mode, revision, workers, queues.

    Example: nfqproxy status -o json
    """
    document = admin.ask("status")
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"nfqproxy {document['version']}, pid {document['pid']}, mode {document['mode']},"
        f" node {document['node']}: revision {document['revision']},"
        f" {document['services']} services, {document['frontends']} frontends"
    )
    if document["source_error"]:
        console.print(f"[red]the last good manifests serve:[/red] {document['source_error']}")
    table = Table("queue", "worker", "reader", "ready", "packets", "installed", "waiting", "dropped")
    table.add_column("us/packet", justify="right")
    table.add_column("out of the ordinary")
    for worker in document["workers"]:
        packets = worker["packets"]
        counters = ", ".join(f"{name} {count}" for name, count in worker["counters"].items())
        if worker["restarts"]:
            counters = f"{worker['restarts']} restarts {counters}"
        table.add_row(
            str(worker["queue"]),
            str(worker["pid"]),
            worker["reader"],
            "yes" if worker["ready"] else "[red]no[/red]",
            str(packets),
            str(worker["installed"]),
            str(worker.get("waiting", "-")),
            str(worker.get("queue_dropped", "-")),
            f"{worker['cpu_s'] / packets * 1e6:.1f}" if packets else "-",
            counters,
        )
    console.print(table)
