"""A report as Markdown (GitHub's tables), whole or put into marked places of a document."""

import re
from collections.abc import Sequence
from pathlib import Path

from bench.reports.content import Section, Table
from nfqproxy.errors import InputError

_PLACE = re.compile(
    r"(?P<head><!-- bench:(?P<name>[\w-]+) -->\n)(?P<old>.*?)(?P<tail><!-- /bench:(?P=name) -->)",
    re.DOTALL,
)
_MARK = re.compile(r"<!-- /?bench:([\w-]+) -->")


def render(sections: Sequence[Section]) -> str:
    """The whole report."""
    return "# Bench\n\n" + "\n".join(
        f"## {_plain(section.title)}\n\n{body(section)}" for section in sections
    )


def body(section: Section, plots: str = "") -> str:
    """A section without its title; ``plots``: the directory of its plots as the document sees it."""
    images = [f"![{name}]({plots}/{name}.svg)" for name, _ in section.plots] if plots else []
    parts = [*section.text, *images, *map(_table, section.tables)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def insert(sections: Sequence[Section], document: str, path: Path, plots: str = "") -> str:
    """The document with the text between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` anew.

    NAME is that of a section. ``plots`` is the directory of the plots, relative to the document; empty:
    they are not shown. :class:`InputError` if the document holds no such place, or one that this result
    cannot fill; ``path`` is named there.
    """
    by_name = {section.name: section for section in sections}
    places = [match["name"] for match in _PLACE.finditer(document)]
    if not places:
        raise InputError(
            f"{path} holds no place for a table: put <!-- bench:NAME --> and <!-- /bench:NAME --> "
            f"on lines of their own, NAME one of {', '.join(by_name)}"
        )
    marks = _MARK.findall(document)
    if len(marks) != 2 * len(places):
        odd = next(name for name in marks if marks.count(name) != 2 * places.count(name))
        raise InputError(f"{path}: the marks of bench:{odd} are not a pair; put both")
    for name in places:
        if name not in by_name:
            raise InputError(
                f"{path} asks for bench:{name}, which this result does not hold; it has "
                f"{', '.join(by_name)}"
            )
    return _PLACE.sub(
        lambda match: f"{match['head']}\n{body(by_name[match['name']], plots)}\n{match['tail']}",
        document,
    )


def _table(table: Table) -> str:
    lines = [f"**{_plain(table.title)}**", ""] if table.title else []
    lines.append(_row(table.head))
    lines.append(
        _row(
            ["---:" if index >= table.numbers_from else "---" for index in range(len(table.head))],
        )
    )
    lines += [_row([_plain(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown does not take for anything else."""
    return re.sub(r"([\\|<>*`])", r"\\\1", " ".join(text.split()))
