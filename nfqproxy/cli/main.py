"""``nfqproxy``: the command group, its error handling and its exit codes.

Exit codes: 0 ok, 1 failed, 2 wrong usage or bad input, 3 the host lacks something, 130 interrupted.
"""

import importlib
import io
import logging
import os
import sys

import click

from nfqproxy import __version__
from nfqproxy.cli.groups import HelpfulGroup
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.commands import complete_path

_INTERRUPTED = 130

# Verb -> (module, attribute, one line of help). Modules are imported when their verb is used, so that
# ``status`` does not pay for the lab.
_COMMANDS = {
    "run": ("nfqproxy.cli.run", "run", "Run the proxy."),
    "lab": ("nfqproxy.cli.lab", "lab", "Try it in network namespaces, with real traffic."),
    "rules": ("nfqproxy.cli.rules", "rules", "Print or apply the bootstrap rules."),
    "cleanup": ("nfqproxy.cli.rules", "cleanup", "Remove all that nfqproxy made on this node."),
    "doctor": ("nfqproxy.cli.doctor", "doctor", "Probe what the host can do and say what to mend."),
    "explain": ("nfqproxy.cli.explain", "explain", "Say what happens to a packet, and why."),
    "import": (
        "nfqproxy.cli.import_",
        "import_",
        "Print kube-proxy's rules as manifests.",
    ),
    "status": ("nfqproxy.cli.status", "status", "Show the running proxy."),
    "reconcile": (
        "nfqproxy.cli.reconcile",
        "reconcile",
        "Delete stale connection tracking entries.",
    ),
    "bench": ("nfqproxy.cli.bench", "bench", "Measure it on this machine, beside yardsticks."),
}


class _Group(HelpfulGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _help = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.command(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nfqproxy")
def cli() -> None:
    """A Kubernetes node proxy: the choice of a backend is Python, the data path is the kernel.

    Example: nfqproxy lab
    """


def main() -> None:
    """Entry point of the console script and of ``python -m nfqproxy``."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="nfqproxy: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 shows "?" for what it lacks (a bar, a Greek letter), and the rest.
        sys.stdout.reconfigure(errors="replace")
    os.environ["PATH"] = complete_path(os.environ.get("PATH"))
    try:
        status = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except NfqproxyError as error:
        click.echo(f"nfqproxy: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
