"""The options of ``nfqproxy lab`` and its verbs, each written once."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nfqproxy.lab.services import STEPS
from nfqproxy.model import DataPath
from nfqproxy.sources.config import DATA_PATHS

__all__ = [
    "STANDING",
    "build_options",
    "data_path",
    "name",
    "output",
    "proxy_options",
    "step",
    "traffic_options",
]

STANDING = "lab"
"""Name of a standing lab when none is given."""

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def _together(*options: Decorator[Any]) -> Decorator[Any]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


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


output = click.option(
    "-o",
    "output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the result.",
)

name = click.option(
    "--name", default=STANDING, show_default=True, help="Which lab; several may stand."
)

step = click.option(
    "--step",
    "numbers",
    type=click.IntRange(1, len(STEPS)),
    multiple=True,
    help="Only this step; may be repeated.",
)

data_path = click.option(
    "--data-path",
    type=click.Choice(DATA_PATHS),
    callback=lambda _context, _parameter, value: None if value is None else DataPath(value),
    help="How decisions reach the kernel. Default: ctnetlink, or what a standing lab has.",
)

proxy_options = _together(
    click.option(
        "--reader",
        type=click.Choice(["netlink", "netfilterqueue"]),
        default="netlink",
        show_default=True,
        help="How workers read their queue.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, 16),
        default=1,
        show_default=True,
        help="Worker processes of the proxy.",
    ),
    data_path,
)

build_options = _together(
    click.option(
        "--weights",
        default="5:3:2",
        show_default=True,
        callback=_parse_weights,
        help="One per backend.",
    ),
    proxy_options,
)

traffic_options = _together(
    click.option(
        "--connections",
        type=click.IntRange(1, 1_000_000),
        default=3000,
        show_default=True,
        help="TCP connections; a third as many over IPv6.",
    ),
    click.option(
        "--queries",
        type=click.IntRange(1, 20_000),
        default=3000,
        show_default=True,
        help="DNS queries.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Repeat a run's random choices. Default: a new one.",
    ),
    output,
)
