"""``nfqproxy lab``: the proxy on real traffic in network namespaces, for a first look."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click
import msgspec
from rich.console import Console

from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.lab import state as states
from nfqproxy.lab.standing import Lab
from nfqproxy.lab.manifest import manifest
from nfqproxy.lab.result import LabResult
from nfqproxy.lab.scenario import run_scenario
from nfqproxy.lab.view import Screen, show_commands, show_result

STANDING = "lab"
"""Name of a standing lab when none is given."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as Ctrl-C does: after everything made is removed."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    held = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise HostError(
            "the lab makes network namespaces, which needs root: run it as root (sudo nfqproxy lab)"
        )


def _parse_weights(
    _context: click.Context, _parameter: click.Parameter, value: str
) -> tuple[int, ...]:
    try:
        weights = tuple(int(part) for part in value.split(":"))
    except ValueError:
        weights = ()
    if not 2 <= len(weights) <= 9 or min(weights) < 0 or max(weights) > 1000 or sum(weights) == 0:
        raise click.BadParameter("give 2 to 9 weights from 0 to 1000, not all 0, like 5:3:2")
    return weights


F = TypeVar("F", bound=Callable[..., Any])


def _build_options(function: F) -> F:
    for option in (
        click.option(
            "--workers",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            help="Worker processes of the proxy.",
        ),
        click.option(
            "--reader",
            type=click.Choice(["netlink", "netfilterqueue"]),
            default="netlink",
            show_default=True,
            help="How workers read their queue.",
        ),
        click.option(
            "--weights",
            default="5:3:2",
            show_default=True,
            callback=_parse_weights,
            help="One per backend.",
        ),
    ):
        function = option(function)
    return function


def _traffic_options(function: F) -> F:
    for option in (
        click.option(
            "-o",
            "output",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Form of the result.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            help="Repeat a run's random choices. Default: a new one.",
        ),
        click.option(
            "--queries",
            type=click.IntRange(1, 20_000),
            default=3000,
            show_default=True,
            help="DNS queries.",
        ),
        click.option(
            "--connections",
            type=click.IntRange(1, 1_000_000),
            default=3000,
            show_default=True,
            help="TCP connections; a third as many over IPv6.",
        ),
    ):
        function = option(function)
    return function


def _name_option(function: F) -> F:
    return click.option(
        "--name", default=STANDING, show_default=True, help="Which lab; several may stand."
    )(function)


def _traffic(lab: Lab, screen: Screen, connections: int, queries: int, seed: int) -> LabResult:
    return run_scenario(lab, screen, connections=connections, queries=queries, seed=seed)


def _print(result: LabResult, output: str) -> int:
    if output == "json":
        document = msgspec.to_builtins(result) | {"ok": result.ok}
        click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
    else:
        show_result(result, Console(highlight=False))
    return 0 if result.ok else 1


@click.group(invoke_without_command=True)
@_build_options
@_traffic_options
@click.option("--keep", is_flag=True, help="Leave it standing, as `lab up` does.")
@click.option("--show-manifests", is_flag=True, help="Print the lab's manifests and exit.")
@click.pass_context
def lab(
    context: click.Context,
    weights: tuple[int, ...],
    reader: str,
    workers: int,
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
    """
    if context.invoked_subcommand is not None:
        return 0
    if show_manifests:
        plan = Lab.plan(STANDING, weights=weights, workers=workers, reader=reader)
        click.echo(manifest(plan.topology.node, plan.topology.pods, weights), nl=False)
        return 0
    _require_root()
    name = STANDING if keep else f"once-{secrets.token_hex(3)}"
    number = secrets.randbelow(2**31) if seed is None else seed
    built = Lab.plan(name, weights=weights, workers=workers, reader=reader)
    with _sigterm_interrupts(), Screen(quiet=output == "json") as screen, _removed(built) as kept:
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
def _removed(built: Lab) -> Iterator[list[Lab]]:
    """Remove the lab at the end, however it comes, unless it is put into the list."""
    kept: list[Lab] = []
    try:
        yield kept
    finally:
        if not kept and built.is_claimed:
            built.remove()


def _say_standing(built: Lab) -> None:
    console = Console(highlight=False)
    suffix = "" if built.state.name == STANDING else f" --name {built.state.name}"
    console.print(f"\nThe lab [bold]{built.state.name}[/bold] stands. Things to try:")
    show_commands(built.commands(), console)
    console.print(
        f"Traffic: nfqproxy lab run{suffix}    Remove it: nfqproxy lab down{suffix}",
        soft_wrap=True,
    )


@lab.command()
@_build_options
@_name_option
@click.option(
    "-o", "output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def up(weights: tuple[int, ...], reader: str, workers: int, name: str, output: str) -> None:
    """Build a lab and leave it standing; prints commands to play with.

    Example: nfqproxy lab up --weights 1:1:1
    """
    _require_root()
    built = Lab.plan(name, weights=weights, workers=workers, reader=reader)
    with _sigterm_interrupts(), Screen(quiet=output == "json") as screen, _removed(built) as kept:
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
        click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
    else:
        _say_standing(built)


@lab.command()
@_traffic_options
@_name_option
def run(connections: int, queries: int, seed: int | None, output: str, name: str) -> int:
    """Send the traffic to a standing lab and show what came of it.

    Example: nfqproxy lab run --connections 10000
    """
    _require_root()
    standing = Lab.attach(name)
    number = secrets.randbelow(2**31) if seed is None else seed
    with _sigterm_interrupts(), Screen(quiet=output == "json") as screen:
        standing.occupy()
        try:
            if not standing.is_serving():
                raise NfqproxyError(
                    f"the proxy of the lab {name} does not serve; see {standing.proxy_log},"
                    " or build it anew with nfqproxy lab down and nfqproxy lab up"
                )
            result = _traffic(standing, screen, connections, queries, number)
        finally:
            standing.stop_load()
            standing.hand_over()
    return _print(result, output)


@lab.command()
@_name_option
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
