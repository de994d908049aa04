"""The flags ``--data-path`` and ``--mark-mask`` of every command that needs them."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nfqproxy.errors import InputError
from nfqproxy.model import DEFAULT_MARK_MASK
from nfqproxy.sources.config import DATA_PATHS

F = TypeVar("F", bound=Callable[..., Any])


def _bits(text: str) -> int:
    """A number as people write bits."""
    try:
        return int(text, 0)
    except ValueError:
        raise InputError(
            f'--mark-mask: "{text}" is no number; write it like {DEFAULT_MARK_MASK:#x}'
        ) from None


def data_path_options(function: F) -> F:
    """Add both flags; a flag that is not given is None."""
    for option in (
        click.option(
            "--mark-mask",
            type=_bits,
            metavar="BITS",
            help=f"Data path mark: the bits of packet marks to use. Default: {DEFAULT_MARK_MASK:#x}.",
        ),
        click.option(
            "--data-path",
            type=click.Choice(DATA_PATHS),
            help="How decisions reach the kernel. Default: ctnetlink.",
        ),
    ):
        function = option(function)
    return function
