"""Command groups that help with a wrong name and refuse misplaced options."""

import difflib
from collections.abc import Sequence

import click
from click.core import ParameterSource

__all__ = ["HelpfulGroup", "refuse_options_before", "unknown_name"]


def unknown_name(noun: str, name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(known)}."
    return f"No such {noun} '{name}'. {hint}"


class HelpfulGroup(click.Group):
    """A group that answers an unknown name with the nearest one. ``noun``: what its members are."""

    noun = "command"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but for the hint (click's own looks at loaded commands only)."""
        name, known = args[0], self.list_commands(ctx)
        if name in known or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        raise click.UsageError(unknown_name(self.noun, name, known), ctx)


def refuse_options_before(context: click.Context) -> None:
    """Raise UsageError for options in front of a subcommand, where they would not count."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is ParameterSource.COMMANDLINE:
            path = context.command_path
            raise click.UsageError(
                f"{parameter.opts[0]} does not count in front of {context.invoked_subcommand};"
                f" give it after {path} {context.invoked_subcommand}, if it is an option of that",
                context,
            )
