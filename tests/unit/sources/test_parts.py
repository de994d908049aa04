"""A large file is read by parts: the same objects as when it is read as a whole, and the same faults."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfqproxy.errors import ManifestError
from nfqproxy.sources import file, parts
from nfqproxy.sources.document import DocumentError, parse_json, parse_yaml
from nfqproxy.sources.file import Loader, load


def service(number, address=None, kind=True):
    return {
        **({"apiVersion": "v1", "kind": "Service"} if kind else {}),
        "metadata": {"name": f"web-{number}"},
        "spec": {"clusterIP": address or f"10.96.1.{number}", "ports": [{"port": 80}]},
    }


def as_json(services, kind="List"):
    return json.dumps({"apiVersion": "v1", "kind": kind, "items": services}, indent=1)


def as_yaml(services):
    return "---\n".join(["# services\n", *(json.dumps(each, indent=1) + "\n" for each in services)])


@pytest.fixture
def every_file_is_large(monkeypatch):
    monkeypatch.setattr(parts, "WHOLE_BYTES", 0)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the objects that are decoded."""
    names = []
    decode = file.decode

    def counting(document, context, position=""):
        names.append(document["metadata"]["name"])
        return decode(document, context, position)

    monkeypatch.setattr(file, "decode", counting)
    return names


@pytest.mark.parametrize(("suffix", "text"), [("json", as_json), ("yaml", as_yaml)])
def test_only_the_parts_that_changed_are_decoded(
    tmp_path, every_file_is_large, decoded, suffix, text
):
    manifests = tmp_path / f"services.{suffix}"
    manifests.write_text(text([service(number) for number in range(9)]))
    loader = Loader([manifests])
    loader.load()
    assert len(decoded) == 9
    decoded.clear()
    services = [service(number) for number in range(9)]
    services[4] = service(4, "10.96.2.4")
    del services[7]
    manifests.write_text(text([*services, service(9)]))
    change = loader.load_altered([manifests])
    assert decoded == ["web-4", "web-9"]
    assert {(item.name, item.cluster_ips) for item in change.upserts} == {
        ("web-4", ("10.96.2.4",)),
        ("web-9", ("10.96.1.9",)),
    }
    assert [name for _, _, name in change.removes] == ["web-7"]
    assert loader.objects == load([manifests])
    decoded.clear()
    assert not loader.load_altered([manifests])
    assert decoded == []


def test_the_kind_of_the_list_counts_for_its_items(tmp_path, every_file_is_large):
    manifests = tmp_path / "services.json"
    manifests.write_text(as_json([service(1, kind=False)], kind="ServiceList"))
    loader = Loader([manifests])
    loader.load()
    assert [item.name for item in loader.objects.services] == ["web-1"]
    manifests.write_text(as_json([service(1, kind=False)]))
    with pytest.raises(ManifestError, match="default/web-1: kind: is missing"):
        loader.load_altered([manifests])
    assert [item.name for item in loader.objects.services] == ["web-1"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("s.json", as_json([service(1), service(2), service(1)]), "Service default/web-1.*twice"),
        ("s.yaml", as_yaml([service(1), service(2), service(1)]), "Service default/web-1.*twice"),
        ("s.json", as_json([service(1), 7]), r"document 1, items\[1\]"),
        ("s.yaml", as_yaml([service(1), 7]), "document 2"),
        ("s.json", as_json([service(1)]).replace('"spec"', '"spec": {}, "spec"'), '"spec".*twice'),
        ("s.json", as_json([service(1)])[:-1] + ', "items": []}', '"items".*twice'),
        ("s.json", as_json([service(1)])[:-1] + ', "items": [{}]}', '"items".*twice'),
        ("s.json", as_json([service(1)])[:-1], "line .*not JSON"),
        ("s.yaml", as_yaml([service(1)]) + "---\na: [\n", "line 20, column 1: not YAML"),
        ("s.yaml", "---\n# nothing\n---\n", "is empty"),
        ("s.json", as_json([]), "no Service"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, every_file_is_large, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=f"(?s){problem}"):
        load([tmp_path / name])


_LINES = st.lists(
    st.sampled_from(
        [
            "---",
            "--- a",
            "--- |",
            "a: 1",
            "  b",
            "'",
            '"',
            "- c",
            "...",
            "%YAML 1.1",
            "# d",
            "",
            "|",
            "&x [e]",
        ]
    ),
    max_size=8,
)


@given(_LINES, st.sampled_from(["\n", "\r\n", "\r"]))
@settings(max_examples=500)
def test_yaml_cut_up_says_the_same_or_is_wrong(lines, end):
    text = end.join(lines)
    whole = _values(parse_yaml, text)
    pieces = [_values(parse_yaml, piece.decode()) for piece in parts._cut_yaml(text.encode())]
    if None in pieces:
        return  # then the file is read as a whole
    assert whole is not None
    found = [value for values in pieces for value in values if value is not None]
    assert found == [value for value in whole if value is not None]


def _values(parse, text):
    try:
        return list(parse(text))
    except DocumentError:
        return None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_json_is_what_the_standard_library_reads(tree, indent, ascii_alone):
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_alone)
    found = parse_json(text)
    assert found == json.loads(text)
    assert repr(found) == repr(json.loads(text))


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":1}', '[{"b":{"a":1,"c":2,"a":3}}]', '{"a":{},"a":{}}']
)
def test_a_key_given_twice_is_refused(text):
    with pytest.raises(DocumentError, match='the key "a" is given twice'):
        parse_json(text)
