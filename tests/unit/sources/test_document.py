import contextlib
import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.sources.document import DocumentError, parse_json, parse_yaml


def only(text):
    values = list(parse_yaml(text))
    assert len(values) == 1
    return values[0]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from(["yes", "0x10", "1_0", "~", "010", "<<", "1e3", "-", ".", "+.inf", "12:30"]),
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(trees, st.sampled_from([None, True, False]))
def test_what_pyyaml_writes_is_read_back(tree, flow):
    text = yaml.safe_dump(tree, default_flow_style=flow)
    assert only(text) == tree


@given(trees)
def test_json_is_read_as_json_and_as_yaml(tree):
    text = json.dumps(tree)
    assert parse_json(text) == tree


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("~", None),
        ("yes", True),
        ("OFF", False),
        ("0777", 0o777),
        ("0o17", "0o17"),
        ("0x1F", 31),
        ("0b101", 5),
        ("-1_000", -1000),
        ("1.50", 1.5),
        ("1e3", "1e3"),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("08", "08"),
        ("10.0.0.1", "10.0.0.1"),
        ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"),
        ("2024-01-02", "2024-01-02"),
        ("12:30", "12:30"),
        ("y", "y"),
        ("'yes'", "yes"),
        ('"80"', "80"),
        ("!!str 80", "80"),
        ("!!int '80'", 80),
        ("fd00::1", "fd00::1"),
    ],
)
def test_words(text, expected):
    found = only(f"a: {text}")["a"]
    assert found == expected
    assert type(found) is type(expected)


def test_documents_anchors_and_merge_keys():
    text = """
base: &base {port: 80, protocol: TCP}
mixin: &mixin {protocol: UDP, name: dns}
one: {<<: *base, port: 81}
two:
  <<: [*base, *mixin]
three: *base
quoted: {"<<": 1}
value: <<
---
--- [1, 2]
"""
    first, empty, last = parse_yaml(text)
    assert first["one"] == {"port": 81, "protocol": "TCP"}
    assert first["two"] == {"port": 80, "protocol": "TCP", "name": "dns"}
    assert first["three"] is first["base"]
    assert first["quoted"] == {"<<": 1}
    assert first["value"] == "<<"
    assert empty is None
    assert last == [1, 2]


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ("a: 1\nb: [1,\n", 3, 1, "not YAML: "),
        ("a: b: c", 1, 5, "mapping values are not allowed"),
        ("a:\n\t- b", 2, 1, "cannot start any token"),
        ("spec:\n  port: 80\n  port: 81\n", 3, 3, 'the key "port" is given twice'),
        ("{a: 1, a: 1}", 1, 8, 'the key "a" is given twice'),
        ("a: *b", 1, 4, 'the alias "*b" has no anchor'),
        ("a: &a [*a]", 1, 8, 'the alias "*a" stands inside what it names'),
        ("--- &a 1\n---\nb: *a", 3, 4, 'the alias "*a" has no anchor'),
        ("{<<: 1}", 1, 6, "after"),
        ("a: !!python/object:os.system x", 1, 4, "is not understood"),
        ("a: !!set {x}", 1, 4, "is not understood"),
        ("? [a]\n: b", 1, 3, "a key must be a plain word"),
        ("[" * 101, 1, 101, "nested more than 100 deep"),
    ],
)
def test_yaml_that_is_wrong_is_located(text, line, column, problem):
    with pytest.raises(DocumentError) as caught:
        list(parse_yaml(text))
    assert problem in caught.value.problem
    assert (caught.value.line, caught.value.column) == (line, column)


def test_characters_outside_yaml_are_refused():
    with pytest.raises(DocumentError, match="not YAML: "):
        list(parse_yaml("a: \x01"))


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ('{"a": 1, 2}', 1, 10, "not JSON: "),
        ("", 1, 1, "not JSON: expecting value"),
        ('{"a": {"b": 1,\n"b": 2}}', 0, 0, 'the key "b" is given twice'),
        ("[" * 200_000, 0, 0, "nested too deeply"),
    ],
)
def test_json_that_is_wrong_is_located(text, line, column, problem):
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert problem in caught.value.problem
    assert (caught.value.line, caught.value.column) == (line, column)


@given(st.text(alphabet="ab:-[]{}&*!|>'\"\n\t #,?%@`.~\xe9\x85\ufeff", max_size=30))
def test_any_text_gives_pyyamls_values_or_an_error_of_ours(text):
    found = expected = None
    with contextlib.suppress(DocumentError):
        found = list(parse_yaml(text))
    with contextlib.suppress(yaml.YAMLError):
        expected = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    # Stricter than PyYAML in places (a key given twice), never looser, never another value.
    assert found is None or found == expected
