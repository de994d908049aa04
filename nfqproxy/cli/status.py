"""``nfqproxy status``: the state of the running proxy, over its admin socket."""

import json
from typing import Any

import click
from rich.console import Console

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
        f" data path {document['data_path']}, node {document['node']}: revision {document['revision']},"
        f" {document['services']} services, {document['frontends']} frontends",
        soft_wrap=True,
    )
    marks = document["marks"]
    done = "entries installed" if marks is None else "packets marked"
    if marks is not None and marks["backends_without_mark"]:
        console.print(
            f"[red]{marks['backends_without_mark']} backends have no mark[/red] and are left to what stands"
            f" behind the queue: give markMask, now {marks['mask']}, more bits",
            soft_wrap=True,
        )
    if document["source_error"]:
        console.print(f"[red]the last good state serves:[/red] {document['source_error']}")
    for port in document.get("health_check_ports", ()):
        if port["error"]:
            console.print(
                f"[red]health-check node port {port['port']} on {port['address']} of"
                f" {port['namespace']}/{port['service']}:[/red] {port['error']}",
                soft_wrap=True,
            )
    for worker in document["workers"]:
        packets = worker["packets"]
        cost = f", {worker['cpu_s'] / packets * 1e6:.0f} us of CPU each" if packets else ""
        console.print(
            f"  queue {worker['queue']}: worker {worker['pid']} ({worker['reader']}),"
            f" {'[green]ready[/green]' if worker['ready'] else '[red]not ready[/red]'},"
            f" {packets} packets{cost}, {worker['installed']} {done},"
            f" {worker.get('waiting', 0)} waiting, {worker.get('queue_dropped', 0)} +"
            f" {worker.get('user_dropped', 0)} dropped by the kernel",
            soft_wrap=True,
        )
        if worker["counters"]:
            console.print(
                "    out of the ordinary: "
                + ", ".join(f"{name} {count}" for name, count in worker["counters"].items()),
                soft_wrap=True,
            )
        if worker["restarts"]:
            console.print(
                f"    {worker['restarts']} restarts, the last because {worker['last_error']}",
                soft_wrap=True,
            )
