"""From a parsed document to an API type, with errors a person can act on.

msgspec does the typed conversion. Two things are added: unknown fields are refused by name with
the nearest known one (only where the caller is strict: files are, the API server may be newer
than us), and msgspec's texts are turned into plain sentences.
"""

import difflib
import functools
import re
import types
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from nfqproxy.sources.manifest import Shape

ShapeT = TypeVar("ShapeT", bound=Shape)


class FieldError(Exception):
    """One field is wrong; ``path`` is like ``spec.ports[0].port``, ``problem`` a clause."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


def convert(document: dict[str, object], shape: type[ShapeT], *, strict: bool) -> ShapeT:
    """The document as this type; raises FieldError."""
    if strict:
        refuse_unknown(document, _tree(shape), "")
    try:
        return msgspec.convert(document, shape)
    except msgspec.ValidationError as error:
        raise plain(error) from None


def nearest(name: str, known: tuple[str, ...] | frozenset[str]) -> str:
    """A hint after an unknown name: the nearest known one, else all of them."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{by_lower[close[0]]}"?'
    return f"known are {', '.join(sorted(known))}"


def one_of(path: str, value: str | None, known: tuple[str, ...]) -> str:
    """The value if it is one of the known ones; absent or empty gives the first (the default)."""
    if not value:
        return known[0]
    if value not in known:
        raise FieldError(path, f'"{value}" is not a value of this field: {nearest(value, known)}')
    return value


class _Tree(NamedTuple):
    names: frozenset[str]
    children: tuple[tuple[str, bool, "_Tree"], ...]
    """Fields of a type of their own: name, whether a list of it, its tree."""


@functools.cache
def _tree(shape: type[Shape]) -> _Tree:
    names: list[str] = []
    children: list[tuple[str, bool, _Tree]] = []
    for info in msgspec.structs.fields(shape):
        names.append(info.encode_name)
        for part in get_args(info.type) if isinstance(info.type, types.UnionType) else ():
            many = get_origin(part) is list
            inner = get_args(part)[0] if many else part
            if isinstance(inner, type) and issubclass(inner, Shape):
                children.append((info.encode_name, many, _tree(inner)))
    return _Tree(frozenset(names), tuple(children))


def refuse_unknown(value: Any, tree: _Tree, path: str) -> None:
    """Raise FieldError at the first field that the type does not have; wrong types are let pass."""
    if not isinstance(value, dict):
        return
    if not value.keys() <= tree.names:
        unknown = next(key for key in value if key not in tree.names)
        if not isinstance(unknown, str):
            raise FieldError(path, f"the key {unknown!r} must be a string")
        raise FieldError(_join(path, unknown), f"unknown field, {nearest(unknown, tree.names)}")
    for name, many, child in tree.children:
        inner = value.get(name)
        if not inner:
            continue
        if not many:
            refuse_unknown(inner, child, _join(path, name))
        elif isinstance(inner, list):
            # The path is made only for an item that needs it: this runs for every endpoint.
            for index, item in enumerate(inner):
                try:
                    refuse_unknown(item, child, "")
                except FieldError as error:
                    here = f"{_join(path, name)}[{index}]"
                    raise FieldError(_join(here, error.path), error.problem) from None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


_KINDS = {
    "int": "an integer",
    "float": "a fraction",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "empty",
    "datetime": "a time",
}
_EXPECTED = re.compile(r"Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`")


def plain(error: msgspec.ValidationError) -> FieldError:
    """What msgspec has found, as the error of a field."""
    text, _, where = str(error).partition(" - at `")
    # msgspec marks a key at fault as `key in $.a` and a value in a free mapping as `$.a[...]`.
    is_key = where.startswith("key in ")
    path = where.rstrip("`").removeprefix("key in ").removeprefix("$").removeprefix(".")
    match = _EXPECTED.search(text)
    if match is None:
        return FieldError(path, text[:1].lower() + text[1:])
    wants = [_KINDS.get(want, want) for want in match["want"].split(" | ") if want != "null"]
    got = _KINDS.get(match["got"], match["got"])
    subject = "each key must be" if is_key else "must be"
    advice = '; put it in quotes ("...")' if wants == ["a string"] and got in _SCALARS else ""
    return FieldError(path, f"{subject} {' or '.join(wants)}, not {got}{advice}")


_SCALARS = frozenset({"an integer", "a fraction", "true or false"})
