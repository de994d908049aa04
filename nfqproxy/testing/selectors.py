"""Label and field selectors.

Sources: k8s.io/apimachinery pkg/labels/selector.go and pkg/fields/selector.go for the grammar.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from nfqproxy.testing.resources import Resource
from nfqproxy.testing.status import bad_request
from nfqproxy.testing.store import Version

__all__ = ["Selector", "selector"]

Selector: TypeAlias = Callable[[Version], bool]
_Requirement: TypeAlias = Callable[[Mapping[str, str]], bool]

_KEY = r"(?P<key>[A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?)"
_VALUE = r"[A-Za-z0-9]?(?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_EXISTS = re.compile(rf"\s*(?P<not>!?)\s*{_KEY}\s*")
_EQUALS = re.compile(rf"\s*{_KEY}\s*(?P<operator>==|=|!=)\s*(?P<value>{_VALUE})\s*")
_COMPARES = re.compile(rf"\s*{_KEY}\s*(?P<operator>[<>])\s*(?P<value>-?[0-9]+)\s*")
_IS_IN = re.compile(
    rf"\s*{_KEY}\s+(?P<operator>in|notin)\s*"
    rf"\(\s*(?P<values>{_VALUE}(?:\s*,\s*{_VALUE})*)\s*\)\s*"
)
_COMMA = re.compile(r",(?![^(]*\))")
_FIELD = re.compile(r"(?P<key>[^=!]+)(?P<operator>==|!=|=)(?P<value>.*)", re.DOTALL)


def selector(resource: Resource, labels: str, fields: str, namespace: str = "") -> Selector | None:
    """What selects the objects of a request; None if it wants all. ApiError (400) if malformed."""
    wanted_labels = [_label(part) for part in _COMMA.split(labels)] if labels.strip() else []
    wanted_fields = [_field(resource, part) for part in fields.split(",")] if fields else []
    if not wanted_labels and not wanted_fields and not namespace:
        return None

    def selects(version: Version) -> bool:
        return (
            (not namespace or version.namespace == namespace)
            and all(matches(version.labels) for matches in wanted_labels)
            and all(matches(version.fields) for matches in wanted_fields)
        )

    return selects


def _label(text: str) -> _Requirement:
    if match := _IS_IN.fullmatch(text):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["operator"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := _EQUALS.fullmatch(text):
        key, value = match["key"], match["value"]
        if match["operator"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _COMPARES.fullmatch(text):
        key, bound = match["key"], int(match["value"])
        sign = 1 if match["operator"] == ">" else -1

        def compares(labels: Mapping[str, str]) -> bool:
            found = labels.get(key, "")
            return bool(re.fullmatch("-?[0-9]+", found)) and sign * (int(found) - bound) > 0

        return compares
    if match := _EXISTS.fullmatch(text):
        key, is_absent = match["key"], bool(match["not"])
        return lambda labels: (key in labels) is not is_absent
    raise bad_request(f'unable to parse requirement: "{text}" is no label selector')


def _field(resource: Resource, text: str) -> _Requirement:
    match = _FIELD.fullmatch(text)
    if match is None:
        raise bad_request(
            f"invalid field selector: {text!r}: must be name=value, name==value or name!=value"
        )
    key, value = match["key"], match["value"]
    if key not in resource.fields and key not in ("metadata.name", "metadata.namespace"):
        raise bad_request(
            f'Unable to find "{resource.api_version}, Resource={resource.plural}" that match '
            f'field selector "{text}": field label not supported: {key}'
        )
    if match["operator"] == "!=":
        return lambda fields: fields[key] != value
    return lambda fields: fields[key] == value
