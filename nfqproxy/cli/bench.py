"""``nfqproxy bench``: the bench's own command line, which lives beside the program and not in it.

In a clone it is the folder ``bench`` of the repository; a wheel carries it in ``nfqproxy/_tools``. It is
looked for when the verb is used, and nothing of the program imports it.
"""

import importlib
import sys
from pathlib import Path

import click

import nfqproxy
from nfqproxy.errors import HostError

__all__ = ["bench"]


def _folders() -> tuple[Path, ...]:
    """Where a folder ``bench`` may lie: in the wheel, in a clone."""
    package = Path(nfqproxy.__file__).parent
    return package / "_tools", package.parent


@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def bench(words: tuple[str, ...]) -> None:
    """Measure nfqproxy on this machine; the same as ``python -m bench`` in the repository.

    Example: nfqproxy bench run --profile short -o result.json
    """
    folder = next((each for each in _folders() if (each / "bench" / "cli.py").is_file()), None)
    if folder is None:
        raise HostError(
            "this installation has no bench: install nfqproxy from a clone of its repository"
        )
    # First, so that no other package that happens to be called bench comes before it.
    sys.path.insert(0, str(folder))
    importlib.import_module("bench.cli").main(list(words), program="nfqproxy bench")
