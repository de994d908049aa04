"""A manifest file cut into parts that can be read by themselves: documents of YAML, items of a JSON list.

So that of a file with thousands of objects only those parts are parsed that a change has touched. What
cannot be cut safely is one part; whatever is wrong with a part is told by reading the file as a whole.
"""

import codecs

import msgspec

WHOLE_BYTES = 16 * 1024
"""Smaller files are not cut: they are read in a few milliseconds."""

_MARKER = b"\n---\n"


class _List(msgspec.Struct):
    """Any ``kind: List``; the rest of it is read as text."""

    items: msgspec.Raw


def cut(data: bytes, *, is_json: bool) -> list[bytes] | None:
    """The parts, the first being what remains of a JSON list without its items; None: not to be cut.

    With the first part of a JSON file every other is meant to be read as an item of it.
    """
    if len(data) < WHOLE_BYTES:
        return None
    data = data.removeprefix(codecs.BOM_UTF8)
    return _cut_json(data) if is_json else _cut_yaml(data)


def _cut_json(data: bytes) -> list[bytes] | None:
    try:
        found = msgspec.json.decode(data, type=_List).items
        items = [bytes(item) for item in msgspec.json.decode(found, type=list[msgspec.Raw])]
    except (msgspec.MsgspecError, RecursionError):
        return None
    # The place of the list: if it stands there twice, what remains has the key "items" twice.
    text = bytes(found)
    start = data.find(text[:64])
    while start >= 0 and data[start : start + len(text)] != text:
        start = data.find(text[:64], start + 1)
    return [data[:start] + b"[]" + data[start + len(text) :], *items] if start >= 0 else None


def _cut_yaml(data: bytes) -> list[bytes]:
    # No text or list goes on behind a marker, and a directive before one is wrong without it.
    *others, last = data.split(_MARKER)
    # The line's end belongs to what stands before the marker: a block of text may end with it.
    return [*(part + b"\n" for part in others), last]
