"""YAML and JSON text as plain Python values.

The YAML reader builds values straight from the parser's events instead of through PyYAML's
constructor. Three reasons: a key given twice is an error here and not silently the last one;
unquoted times stay strings, as they do for Kubernetes; and a large manifest takes about half the
time.

Words are resolved as by PyYAML's safe loader (YAML 1.1: yes, on, 0777, 1_000 are not strings).
Anchors, aliases and merge keys are understood, tags of other languages are refused.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeAlias

import msgspec
import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

Value: TypeAlias = bool | int | float | str | list[Any] | dict[Any, Any] | None

MAX_DEPTH = 100
"""Nesting of collections; Kubernetes objects need about ten."""

# The C parser (libyaml) where PyYAML was built with it, as Debian's and the wheels are.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DocumentError(Exception):
    """The text is not YAML or JSON; line and column count from 1, 0 is unknown."""

    def __init__(self, problem: str, line: int = 0, column: int = 0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.column = column


def parse_json(text: str) -> Value:
    """The value of one JSON text; raises DocumentError."""
    with contextlib.suppress(msgspec.MsgspecError, RecursionError, OverflowError):
        quick: Value = msgspec.json.decode(text)
        # Several times quicker, but of a key given twice it keeps the last: then this would be shorter.
        if msgspec.json.encode(quick) == msgspec.json.format(text.encode(), indent=-1):
            return quick
    try:
        value: Value = json.loads(text, object_pairs_hook=_unique_members)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}", error.lineno, error.colno
        ) from None
    except RecursionError:
        raise DocumentError("not read: nested too deeply") from None
    return value


def _unique_members(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DocumentError(f'the key "{name}" is given twice in one object; remove one')
            seen.add(name)
    return members


def parse_yaml(text: str) -> Iterator[Value]:
    """The values of the documents of a YAML stream, one by one; raises DocumentError."""
    try:
        yield from _Builder(text).documents()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
        raise DocumentError(f"not YAML: {problem}", line, column) from None
    except yaml.YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise DocumentError(f"not YAML: {first_line}") from None


_OPEN = object()
"""What an anchor stands for until its collection is complete."""


class _Builder:
    """Values from parser events by recursive descent."""

    def __init__(self, text: str) -> None:
        self._next = _Loader(text).get_event
        self._anchors: dict[str, Any] = {}
        self._depth = 0

    def documents(self) -> Iterator[Value]:
        while True:
            event = self._next()
            kind = type(event)
            if kind is DocumentStartEvent:
                self._anchors.clear()
                yield self._value(self._next())
            elif kind is StreamEndEvent or event is None:
                return
            else:
                assert kind in (StreamStartEvent, DocumentEndEvent), kind

    def _value(self, event: Any) -> Any:
        kind = type(event)
        if kind is ScalarEvent:
            value: Any = _scalar(event)
            if event.anchor:
                self._anchors[event.anchor] = value
            return value
        if kind is AliasEvent:
            return self._alias(event)
        if event.tag not in _COLLECTION_TAGS:
            _fail(event, f'the tag "{event.tag}" is not understood; remove it')
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _fail(event, f"nested more than {MAX_DEPTH} deep")
        if event.anchor:
            self._anchors[event.anchor] = _OPEN
        if kind is MappingStartEvent:
            value = self._mapping()
        else:
            assert kind is SequenceStartEvent, kind
            value = self._sequence()
        self._depth -= 1
        if event.anchor:
            self._anchors[event.anchor] = value
        return value

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            _fail(event, f'the alias "*{event.anchor}" has no anchor before it')
        value = self._anchors[event.anchor]
        if value is _OPEN:
            _fail(event, f'the alias "*{event.anchor}" stands inside what it names')
        return value

    def _sequence(self) -> list[Any]:
        items: list[Any] = []
        following = self._next
        value = self._value
        while type(event := following()) is not SequenceEndEvent:
            items.append(value(event))
        return items

    def _mapping(self) -> dict[Any, Any]:
        members: dict[Any, Any] = {}
        merged: list[dict[Any, Any]] = []
        following = self._next
        value = self._value
        while type(event := following()) is not MappingEndEvent:
            key = value(event)
            if key == "<<" and type(event) is ScalarEvent and event.implicit[0]:
                merged.extend(self._sources(following()))
                continue
            if isinstance(key, (dict, list)):
                _fail(event, "a key must be a plain word, not a collection")
            if key in members:
                _fail(event, f'the key "{key}" is given twice in one mapping; remove one')
            members[key] = value(following())
        # What is written out wins over what is merged, the earlier merge over the later.
        for source in merged:
            for key, item in source.items():
                members.setdefault(key, item)
        return members

    def _sources(self, event: Any) -> list[dict[Any, Any]]:
        value = self._value(event)
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            _fail(event, 'after "<<" stands a mapping or a list of mappings')
        return sources


def _fail(event: Any, problem: str) -> NoReturn:
    mark = event.start_mark
    raise DocumentError(problem, mark.line + 1, mark.column + 1)


_TAG = "tag:yaml.org,2002:"
_COLLECTION_TAGS = (None, "!", _TAG + "map", _TAG + "seq")
_WORDS: dict[str, Any] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **{
        spelling: value
        for word, value in (
            ("true", True),
            ("yes", True),
            ("on", True),
            ("false", False),
            ("no", False),
            ("off", False),
        )
        for spelling in (word, word.capitalize(), word.upper())
    },
}
_NUMBER_START = frozenset("0123456789+-.")
_INT = re.compile(
    r"(?P<sign>[-+]?)(?:0b(?P<bin>[01_]+)|0x(?P<hex>[0-9a-fA-F_]+)|0(?P<oct>[0-7_]+)"
    r"|(?P<dec>0|[1-9][0-9_]*))"
)
# With a point always: 1e3 is a string, which a version or a commit's digits may well look like.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"(?P<sign>[-+]?)\.(?:(?P<inf>inf|Inf|INF)|nan|NaN|NAN)")


def _scalar(event: Any) -> Any:
    text: str = event.value
    tag = event.tag
    # implicit[0]: plain, no tag: the word decides what it is; implicit[1]: quoted, hence a string.
    if tag is None or tag == "!":
        return _resolve(text) if event.implicit[0] else text
    if tag == _TAG + "str":
        return text
    if tag in (_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"):
        return _resolve(text)
    _fail(event, f'the tag "{tag}" is not understood; remove it')


def _resolve(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_START:
        return text
    match = _INT.fullmatch(text)
    if match is not None:
        for name, base in (("dec", 10), ("oct", 8), ("hex", 16), ("bin", 2)):
            digits = (match[name] or "").replace("_", "")
            if digits:
                # Longer numbers stay text: int() refuses them from 4300 digits on.
                return int(match["sign"] + digits, base) if len(digits) < 1000 else text
        return text
    if _FLOAT.fullmatch(text) is not None:
        return float(text.replace("_", ""))
    special = _SPECIAL_FLOAT.fullmatch(text)
    if special is not None:
        return float(special["sign"] + "inf") if special["inf"] else math.nan
    return text
