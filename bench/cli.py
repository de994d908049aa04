"""The command line of the bench: ``python -m bench COMMAND``, which is ``nfqproxy bench COMMAND``.

Exit status as the proxy's own command: 0 done, 1 failed (connections went wrong), 2 wrong usage,
3 the host lacks something, 130 interrupted. Data goes to stdout, progress to stderr.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import click
from rich.console import Console
from rich.status import Status

from bench import api_source, commands, contenders, cpu, cpu_report
from bench.contenders import CONTENDERS, Placement
from bench.provenance import provenance
from nfqproxy.errors import HostError, InputError, NfqproxyError

_DEFAULT = "netlink,mark,netfilterqueue,c,dnat"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def cli(context: click.Context) -> None:
    """Measure nfqproxy on this machine's kernel, beside yardsticks, in network namespaces.

    \b
    Example (as root):
      python -m bench run --profile short -o result.json --report report
      python -m bench cpu --connections 20000 --rounds 5
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (
    commands.run_command,
    commands.report_command,
    commands.compare_command,
    commands.baseline_command,
    commands.check_command,
    commands.micro_command,
    api_source.source_command,
):
    cli.add_command(_command)


@cli.command("cpu")
@click.option(
    "--connections",
    type=click.IntRange(min=100),
    default=20_000,
    show_default=True,
    help="New connections per contender and round.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds; each loads every contender once, in random order.",
)
@click.option(
    "--contenders",
    "names",
    default=_DEFAULT,
    show_default=True,
    help=f"What to compare, of: {', '.join(CONTENDERS)}.",
)
@click.option(
    "--weights", "weights_text", default="5,3,2", show_default=True, help="Weights of the backends."
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1, max=2048),
    default=1024,
    show_default=True,
    help="Send only while at most this many packets wait in the queue.",
)
@click.option(
    "--rate",
    type=click.IntRange(min=0),
    default=0,
    help="SYNs per second at most.  [default: as fast as they are taken]",
)
@click.option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    help="Of the order of contenders within each round.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="A table, or JSON with the raw samples.",
)
def cpu_command(
    connections: int,
    rounds: int,
    names: str,
    weights_text: str,
    in_flight: int,
    rate: int,
    seed: int,
    output: str,
) -> None:
    """CPU time per new TCP connection under a bounded SYN load.

    The contenders take turns in one run. The worker has a CPU of its own, the load generator
    another. Figures are printed only if every connection was translated right.

    \b
    Example:
      python -m bench cpu --contenders netlink,c --rounds 9 -o json > result.json
    """
    chosen = [contenders.named(name.strip()) for name in dict.fromkeys(names.split(","))]
    cpus = sorted(os.sched_getaffinity(0))
    config = cpu.Config(
        connections=connections,
        rounds=rounds,
        seed=seed,
        in_flight=in_flight,
        rate=rate,
        weights=_weights(weights_text),
        placement=Placement(sender=cpus[0], worker=cpus[-1]),
    )
    if os.geteuid() != 0:
        raise HostError("the bench makes network namespaces and rules in them: run it as root")
    with _status() as status:
        samples = cpu.run(chosen, config, status.update)
    if output == "json":
        result = cpu_report.as_data(samples, config, dict(provenance()))
        click.echo(json.dumps(result, indent=1))
    else:
        # Without a terminal rich would assume 80 columns and break the figures.
        console = Console(width=None if sys.stdout.isatty() else 112)
        console.print(cpu_report.as_table(samples, config))


def _weights(text: str) -> tuple[int, ...]:
    try:
        weights = tuple(int(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if not 1 <= len(weights) <= 64 or min(weights) < 1:
        raise InputError(
            f"--weights {text!r}: give 1 to 64 whole numbers of at least 1, as in 5,3,2"
        )
    return weights


@contextlib.contextmanager
def _status() -> Iterator[Status]:
    """A line of progress on stderr, a moving one on a terminal."""
    with Console(stderr=True).status("") as status:
        yield status


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Unwinds, so that what was made is removed; a second signal does not disturb the removal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m bench") -> None:
    """Runs the command line (by default that of the process) and exits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        cli.main(arguments, prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; everything that was made is removed", err=True)
        sys.exit(130)
    except NfqproxyError as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(error.exit_code)
