"""``nfqproxy lab``: the proxy on real traffic in network namespaces, for a first look."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec
from rich.console import Console

from nfqproxy.cli import lab_options as options
from nfqproxy.cli.groups import HelpfulGroup, refuse_options_before
from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel.processes import interrupts
from nfqproxy.lab import state as states
from nfqproxy.lab.cluster import Cluster
from nfqproxy.lab.manifest import manifest
from nfqproxy.lab.result import LabResult
from nfqproxy.lab.scenario import run_scenario
from nfqproxy.lab.services import STEPS, run_services
from nfqproxy.lab.services_view import Narrator, show_run
from nfqproxy.lab.standing import Lab
from nfqproxy.lab.two_nodes import TwoNodes
from nfqproxy.lab.view import Screen, show_commands, show_result
from nfqproxy.model import DataPath


def _require_root() -> None:
    if os.geteuid() != 0:
        raise HostError(
            "the lab makes network namespaces, which needs root: run it as root (sudo nfqproxy lab)"
        )


def _traffic(lab: Lab, screen: Screen, connections: int, queries: int, seed: int) -> LabResult:
    return run_scenario(lab, screen, connections=connections, queries=queries, seed=seed)


def _passing_name() -> str:
    """A name for a lab that does not outlive its run."""
    return f"once-{secrets.token_hex(3)}"


def _print_json(document: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


def _print(result: LabResult, output: str) -> int:
    if output == "json":
        _print_json(msgspec.to_builtins(result) | {"ok": result.ok})
    else:
        show_result(result, Console(highlight=False))
    return 0 if result.ok else 1


@click.group(cls=HelpfulGroup, invoke_without_command=True)
@options.build_options
@options.traffic_options
@click.option("--keep", is_flag=True, help="Leave it standing, as `lab up` does.")
@click.option("--show-manifests", is_flag=True, help="Print the lab's manifests and exit.")
@click.pass_context
def lab(
    context: click.Context,
    weights: tuple[int, ...],
    reader: str,
    workers: int,
    data_path: DataPath | None,
    connections: int,
    queries: int,
    seed: int | None,
    output: str,
    keep: bool,
    show_manifests: bool,
) -> int:
    """Try nfqproxy on real traffic, in network namespaces that are removed afterwards.

    Builds a client, a node that runs the proxy, and backends with nginx and dnsmasq; sends TCP
    connections and DNS queries to a Service with weights; shows where they went, how long connect()
    took beside a direct connection and beside plain kernel DNAT, how many packets userspace has
    seen; then kills the worker in mid-traffic. Needs root. Exit status 1 when an expectation fails.

    \b
    Example: nfqproxy lab
             nfqproxy lab --weights 8:1:1 --connections 10000 -o json
             nfqproxy lab up, then play, then nfqproxy lab down
             nfqproxy lab run services
    """
    if context.invoked_subcommand is not None:
        refuse_options_before(context)
        return 0
    if show_manifests:
        plan = Lab.plan(
            options.STANDING, weights=weights, workers=workers, reader=reader, data_path=data_path
        )
        click.echo(manifest(plan.topology.node, plan.topology.pods, weights), nl=False)
        return 0
    _require_root()
    name = options.STANDING if keep else _passing_name()
    number = secrets.randbelow(2**31) if seed is None else seed
    built = Lab.plan(name, weights=weights, workers=workers, reader=reader, data_path=data_path)
    with interrupts(), Screen(quiet=output == "json") as screen, _removed(built) as kept:
        built.build(screen.step, proxy_seed=seed)
        result = _traffic(built, screen, connections, queries, number)
        if keep:
            built.hand_over()
            kept.append(built)
        else:
            screen.step("removing everything")
    status = _print(result, output)
    if keep and output == "text":
        _say_standing(built)
    return status


@contextmanager
def _removed(built: Cluster) -> Iterator[list[Cluster]]:
    """Remove the lab at the end, however it comes, unless it is put into the list."""
    kept: list[Cluster] = []
    try:
        yield kept
    finally:
        if not kept and built.is_claimed:
            built.remove()


def _say_standing(built: Lab) -> None:
    console = Console(highlight=False)
    suffix = "" if built.state.name == options.STANDING else f" --name {built.state.name}"
    console.print(f"\nThe lab [bold]{built.state.name}[/bold] stands. Things to try:")
    show_commands(built.commands(), console)
    console.print(
        f"Traffic: nfqproxy lab run{suffix}    Remove it: nfqproxy lab down{suffix}",
        soft_wrap=True,
    )


@lab.command()
@options.build_options
@options.name
@options.output
def up(
    weights: tuple[int, ...],
    reader: str,
    workers: int,
    data_path: DataPath | None,
    name: str,
    output: str,
) -> None:
    """Build a lab and leave it standing; prints commands to play with.

    Example: nfqproxy lab up --weights 1:1:1
    """
    _require_root()
    built = Lab.plan(name, weights=weights, workers=workers, reader=reader, data_path=data_path)
    with interrupts(), Screen(quiet=output == "json") as screen, _removed(built) as kept:
        built.build(screen.step)
        built.hand_over()
        kept.append(built)
    if output == "json":
        document = {
            "name": name,
            "client": built.client.name,
            "node": built.node.name,
            "pods": [pod.namespace.name for pod in built.topology.pods],
            "manifests": str(built.manifest_file),
            "commands": dict(built.commands()),
        }
        _print_json(document)
    else:
        _say_standing(built)


class _Scenarios(HelpfulGroup):
    noun = "scenario"

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Scenarios"):
            listed = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
            formatter.write_dl(
                [(name, one.get_short_help_str(80)) for name, one in listed if one is not None]
            )


@lab.group(cls=_Scenarios, invoke_without_command=True, subcommand_metavar="[SCENARIO [OPTIONS]]")
@options.traffic_options
@options.data_path
@options.name
@click.pass_context
def run(context: click.Context, /, **arguments: Any) -> int:
    """Play a scenario; without a name `spread`.

    \b
    Example: nfqproxy lab run --connections 10000
             nfqproxy lab run services
    """
    if context.invoked_subcommand is not None:
        refuse_options_before(context)
        return 0
    return _run_spread(**arguments)


@run.command()
@options.traffic_options
@options.data_path
@options.name
def spread(**arguments: Any) -> int:
    """Weights, latency and a killed worker, in the standing lab.

    With --data-path the proxy of the lab is replaced by one of this data path, and stays so.

    \b
    Example: nfqproxy lab run spread --connections 10000
             nfqproxy lab run spread --data-path mark
    """
    return _run_spread(**arguments)


def _run_spread(
    connections: int,
    queries: int,
    seed: int | None,
    output: str,
    data_path: DataPath | None,
    name: str,
) -> int:
    _require_root()
    standing = Lab.attach(name)
    number = secrets.randbelow(2**31) if seed is None else seed
    with interrupts(), Screen(quiet=output == "json") as screen:
        standing.occupy()
        try:
            if not standing.is_serving():
                raise NfqproxyError(
                    f"the proxy of the lab {name} does not serve; see {standing.proxy_log},"
                    " or build it anew with nfqproxy lab down and nfqproxy lab up"
                )
            if data_path is not None:
                screen.step(f"data path: {data_path}")
                standing.use_data_path(data_path)
            result = _traffic(standing, screen, connections, queries, number)
        finally:
            standing.stop_load()
            standing.hand_over()
    return _print(result, output)


@run.command(
    epilog="\b\nSteps:\n" + "\n".join(f"{n:>4}  {step.title}" for n, step in enumerate(STEPS, 1))
)
@options.step
@options.proxy_options
@options.output
@click.option("--pause", is_flag=True, help="Wait for Enter after each step, to look around.")
def services(
    numbers: tuple[int, ...],
    reader: str,
    workers: int,
    data_path: DataPath | None,
    output: str,
    pause: bool,
) -> int:
    """Node ports, policies, affinity, refusals and more, step by step.

    Builds a lab of its own with two nodes and removes it: a standing lab is not touched. Each step says
    what was sent, who answered, which source address the backend saw, and why. Exit status 1 when
    an expectation fails.

    \b
    Example: nfqproxy lab run services
             nfqproxy lab run services --step 3 --step 6 -o json
             nfqproxy lab run services --data-path mark --workers 2
    """
    if pause and output == "json":
        raise click.UsageError("--pause waits for a reader of the text; leave out -o json")
    _require_root()
    built = TwoNodes.plan(_passing_name(), workers=workers, reader=reader, data_path=data_path)
    console = Console(highlight=False, quiet=output == "json")
    with interrupts(), Screen(quiet=output == "json") as screen, _removed(built):
        built.build(screen.step)
        narrator = Narrator(
            console,
            # Where the steps themselves are not on the terminal, their names are.
            announce=(lambda _: None) if sys.stdout.isatty() else screen.step,
            pause=(lambda: _wait_for_enter(built)) if pause else (lambda: None),
        )
        narrator.opening(built)
        result = run_services(built, narrator, sorted(set(numbers)) or range(1, len(STEPS) + 1))
        screen.step("removing everything")
    if output == "json":
        _print_json(result.document())
    else:
        show_run(result, console)
    return 0 if result.ok else 1


def _wait_for_enter(built: TwoNodes) -> None:
    click.echo(
        f"\n    look around: ip netns exec {built.node.name} conntrack -L; Enter goes on",
        err=True,
        nl=False,
    )
    sys.stdin.readline()


@lab.command()
@options.name
@click.option("--all", "everything", is_flag=True, help="All standing labs.")
def down(name: str, everything: bool) -> None:
    """Remove a standing lab, and what a killed run may have left; fine when there is none.

    Example: nfqproxy lab down --all
    """
    _require_root()
    removed = []
    for one in states.names():
        state = states.load(one)
        if state is not None and state.has_owner:
            if one == name:
                assert state.owner is not None
                raise NfqproxyError(
                    f"process {state.owner.pid} is at work on the lab {one}; end it first"
                )
            continue
        # A lab without an owner stands on purpose, unless its owner has died over it.
        is_left_over = state is None or state.owner is not None
        if (everything or one == name or is_left_over) and states.remove(one):
            removed.append(one)
    if removed:
        click.echo(f"removed: {', '.join(removed)}")
    else:
        click.echo(f"nothing to remove: no lab named {name} stands")
