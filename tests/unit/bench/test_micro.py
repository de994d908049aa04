"""The micro benchmarks do what their names say, once each; pyperf itself in one quick run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import micro

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("name", micro.BENCHMARKS)
def test_every_benchmark_runs(name: str) -> None:
    timed, items = micro.BENCHMARKS[name]
    assert items >= 1
    assert timed(1) > 0
    assert timed(3) > 0


def bench_micro(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bench", "micro", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pyperf_runs_them_and_keeps_the_values(tmp_path: Path) -> None:
    output = tmp_path / "micro.json"
    done = bench_micro("--fast", "-o", str(output), "--", "--only", "5:3:2")
    assert done.returncode == 0, done.stderr
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    values = [value for run in benchmark["runs"] for value in run.get("values", ())]
    assert len(values) == 3
    assert 1e-9 < min(values) < 1e-3  # seconds of one pick


def test_a_name_that_no_benchmark_has_is_refused() -> None:
    done = bench_micro("--", "--only", "weather")
    assert done.returncode == 1
    assert "no benchmark's name holds 'weather'" in done.stderr
