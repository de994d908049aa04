"""A result on disk: what goes in comes out, and anything else is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import result as results
from bench.profiles import PROFILES
from bench.result import Ran
from nfqproxy.errors import InputError, NfqproxyError
from tests.unit.bench.samples import everything, observe, result


def stored(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "result.json"
    results.save(result(everything()), path)
    return path, json.loads(path.read_text())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path, document = stored(tmp_path)
    assert results.load(path) == result(everything())
    assert document["scale"]["seed"] == 7
    assert len(document["observations"]) == len(everything())
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_new_result_says_where_it_comes_from() -> None:
    begun = results.begin(PROFILES["smoke"], ["memory"])
    assert begun.scale.name == "smoke"
    assert begun.machine["cpus"]
    assert begun.kernel.startswith("Linux ")
    assert begun.python.startswith("CPython 3.")
    assert not begun.is_complete
    done = results.add(begun, Ran(name="memory", title="?", seconds=1), [])
    assert done.is_complete
    assert not results.add(
        begun, Ran(name="memory", title="?", seconds=1, failure="no"), []
    ).is_complete


def altered(document: dict[str, Any], **fields: object) -> str:
    return json.dumps({**document, **fields})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 1}, "has schema 1, this program reads 2"),
        ({"kind": "cpu"}, "is no result of `python -m bench run`"),
        ({"load_average": "high"}, "Expected `float`, got `str` - at `$.load_average`"),
        ({"weather": "fine"}, "weather"),
        ({"observations": 3}, "Expected `array`"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path, document = stored(tmp_path)
    path.write_text(altered(document, **change))
    with pytest.raises(InputError) as raised:
        results.load(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": None}, "Expected `float`, got `null`"),
        ({"round": 0}, "rounds count from 1"),
        ({"experiment": "other"}, "of an experiment that did not run"),
        ({"values": 3}, "holds fields that a result does not have"),
        ({"round": 2}, "worker_cpu of nfqproxy in round 2 of connections is there twice"),
    ],
)
def test_observations_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path, document = stored(tmp_path)
    document["observations"][0].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as raised:
        results.load(path)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON"), ("[]", "is no JSON object"), ("\xff", "is no JSON")]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=said):
        results.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        results.load(tmp_path / "none.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_at_once(value: float) -> None:
    begun = results.begin(PROFILES["smoke"], ["connections"])
    with pytest.raises(NfqproxyError, match=r"connections: worker_cpu of nfqproxy in round 2"):
        results.add(begun, Ran(name="connections", title="?", seconds=1), observe([1.0, value]))


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        results.save(result(everything()), tmp_path / "none" / "result.json")


def test_an_experiment_of_a_later_run_stands_in_place_of_the_first() -> None:
    first = result(everything())
    again = [each for each in everything() if each.experiment == "bulk"][:1]
    bulk = next(one for one in first.ran if one.name == "bulk")
    later = msgspec.structs.replace(
        result(again), commit="beef", ran=(bulk,), observations=tuple(again)
    )
    both = results.combined(first, later)
    assert [one.name for one in both.ran] == [one.name for one in first.ran]
    assert [each for each in both.observations if each.experiment == "bulk"] == again
    assert len(both.observations) == 1 + sum(
        each.experiment != "bulk" for each in first.observations
    )
    assert [one.name for one in both.ran if one.run and "commit beef" in str(one.run)] == ["bulk"]
    elsewhere = msgspec.structs.replace(later, kernel="Linux 1.0")
    with pytest.raises(InputError, match="different machines"):
        results.combined(first, elsewhere)
