import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.control import annotations


def test_weights_by_every_sort_of_key():
    text = '{"010.244.1.10": 5, "FD00::1": 4, "web-0": 3, "n1": 2, "zone:z1": 0}'
    assert annotations.parse_weights(text) == {
        "10.244.1.10": 5,
        "fd00::1": 4,
        "web-0": 3,
        "n1": 2,
        "zone:z1": 0,
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"n1": -1}', 'the weight of "n1" must be an integer from 0 to 2147483647, not -1'),
        ('{"n1": 1.5}', "not 1.5"),
        ('{"n1": true}', "not true"),
        ('{"n1": "3"}', 'not "3"'),
        ('{"n1": 2147483648}', "not 2147483648"),
        ('{"n1": 1, "n1": 2}', '"n1" is given twice'),
        ('{"10.0.0.1": 1, "010.0.0.1": 2}', '"010.0.0.1" is given twice'),
        ('{"": 1}', '"" names nothing'),
        ('{"zone:": 1}', '"zone:" names nothing'),
        ("[1]", "must be a JSON object such as"),
        ("n1: 3", "at character 1"),
        ("", "must be JSON such as"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_weights_are_refused_with_what_is_wrong(text, problem):
    with pytest.raises(ValueError, match=r".") as caught:
        annotations.parse_weights(text)
    assert problem in str(caught.value)


@given(st.dictionaries(st.from_regex(r"zone:[a-z]+", fullmatch=True), st.integers(0, 1000)))
def test_good_weights_come_back_as_given(weights):
    assert annotations.parse_weights(json.dumps(weights)) == weights


@pytest.mark.parametrize("text", ["-1", "1.5", "", "x", "1 ", "2147483648", "\u0663"])
def test_a_bad_slice_weight_is_refused(text):
    with pytest.raises(ValueError, match="must be an integer from 0"):
        annotations.parse_weight(text)


def test_a_slice_weight_of_zero_is_read():
    assert annotations.parse_weight("0") == 0


@pytest.mark.parametrize(
    ("labels", "own", "expected"),
    [
        ({annotations.STEER: "true"}, {}, True),
        ({}, {annotations.STEER: "true"}, True),
        ({annotations.STEER: "false"}, {}, False),
        ({}, {}, False),
    ],
)
def test_steering_by_label_or_annotation(labels, own, expected):
    assert annotations.is_steered(labels, own) is expected
