"""The regression check: stored ratios to the C worker, and what counts as grown."""

import json
from pathlib import Path

import pytest

from bench import baseline as baselines
from bench.observation import Observation
from bench.result import read_document
from nfqproxy.errors import InputError, NfqproxyError
from tests.unit.bench.samples import observe, result

FLOOR = [4.0, 4.2, 3.9, 4.1]


def run_at(ratio: float, *, scatter: float = 0.02) -> list[Observation]:
    factors = [1 - scatter, 1 + scatter, 1.0, 1 + scatter / 2]
    values = [floor * ratio * factor for floor, factor in zip(FLOOR, factors, strict=True)]
    return [*observe(values, services=1), *observe(FLOOR, contender="c", services=1)]


def stored_at(ratio: float) -> baselines.Baseline:
    return baselines.of(result(run_at(ratio)))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baselines.save(stored_at(1.4), path)
    assert baselines.load(path) == stored_at(1.4)
    document = read_document(path)
    assert document["relative_to"] == "c"
    (ratio,) = document["ratios"]
    assert ratio["parameters"] == {"services": 1}
    assert ratio["rounds"] == 4
    assert ratio["middle"] == pytest.approx(1.4, rel=0.02)


@pytest.mark.parametrize(
    ("ratio", "is_regression", "is_better"),
    [(1.4, False, False), (1.55, False, False), (1.8, True, False), (1.1, False, True)],
)
def test_a_ratio_that_grew_by_more_than_the_tolerance_is_a_regression(
    ratio: float, is_regression: bool, is_better: bool
) -> None:
    (check,) = baselines.check(stored_at(1.4), run_at(ratio), tolerance=0.15)
    assert check.parameters == "services 1"
    assert check.limit == pytest.approx(check.stored * 1.15)
    assert check.is_regression is is_regression
    assert check.is_better is is_better


def test_a_round_below_the_limit_is_no_regression() -> None:
    (check,) = baselines.check(stored_at(1.4), run_at(1.8, scatter=0.3), tolerance=0.15)
    assert not check.is_regression


def test_a_slow_machine_alone_is_no_regression() -> None:
    slow = [
        *observe([value * 10 for value in FLOOR], services=1),
        *observe([value * 10 / 1.4 for value in FLOOR], contender="c", services=1),
    ]
    (check,) = baselines.check(stored_at(1.4), slow)
    assert not check.is_regression


def test_a_run_without_the_floor_gives_no_baseline() -> None:
    with pytest.raises(NfqproxyError, match="no worker_cpu of nfqproxy and c"):
        baselines.of(result(observe(FLOOR, services=1)))


def test_a_modified_tree_gives_no_baseline() -> None:
    with pytest.raises(NfqproxyError, match="commit them"):
        baselines.of(result(run_at(1.4), is_modified=True))


def test_without_common_parameters_nothing_is_checked() -> None:
    other = [*observe([1.0], services=9), *observe([1.0], contender="c", services=9)]
    with pytest.raises(NfqproxyError, match="no parameters in common"):
        baselines.check(stored_at(1.4), other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "is not there: write it with `python -m bench baseline RESULT`"),
        ({"schema": 7}, "is no baseline of schema 1"),
        ({"ratios": [{}]}, "missing required field"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, change: dict[str, object] | None, said: str
) -> None:
    path = tmp_path / "baseline.json"
    if change is not None:
        baselines.save(stored_at(1.4), path)
        path.write_text(json.dumps({**read_document(path), **change}))
    with pytest.raises(InputError, match=said):
        baselines.load(path)
