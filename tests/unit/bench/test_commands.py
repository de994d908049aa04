"""The commands about results: what they print, write and return; no privilege, no measuring."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import bench.experiments
from bench import baseline as baselines
from bench import commands, intervals, runner
from bench import result as results
from bench.bars import BARS
from bench.cli import cli
from bench.observation import Experiment
from bench.profiles import PROFILES
from nfqproxy.cli import bench as verb
from nfqproxy.errors import HostError, InputError, NfqproxyError
from tests.unit.bench import fakes
from tests.unit.bench.samples import everything, observe, result

QUIET = [1.0, 1.01, 0.99, 1.02, 0.98]


@pytest.fixture(autouse=True)
def _fake_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    there = (fakes.Steady(), fakes.Wrong(), fakes.Interrupted())
    monkeypatch.setattr(bench.experiments, "EXPERIMENTS", {one.name: one for one in there})
    monkeypatch.setattr(commands, "_check_root", lambda: None)


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def stored(path: Path, values: list[float], **fields: object) -> Path:
    results.save(result(observe(values), **fields), path)
    return path


def test_an_experiment_that_fails_leaves_the_others_their_values() -> None:
    kept: list[results.Result] = []
    lines: list[str] = []
    experiments: list[Experiment] = [
        fakes.Wrong(),
        fakes.Twice(),
        fakes.Empty(),
        fakes.Partly(),
        fakes.Crashed(),
        fakes.Steady(),
    ]
    made = runner.run(experiments, PROFILES["smoke"], lines.append, kept.append)
    assert {one.name: one.failure for one in made.ran} == {
        "wrong": "3 of 9 connections were lost",
        "twice": "experiment twice: worker_cpu of nfqproxy in round 1 of twice is there twice; "
        "mend the experiment",
        "empty": "it observed nothing",
        "partly": "c lost 3",
        "crashed": "KeyError: 'end'",
        "connections": "",
    }
    assert list(made.observations) == fakes.Partly.observations + fakes.Steady.observations
    assert [len(one.ran) for one in kept] == [1, 2, 3, 4, 5, 6]
    assert lines == ["[2/6] twice: seed 1", "[3/6] empty: seed 1", "[6/6] connections: seed 1"]


def test_run_writes_the_result_and_the_report(tmp_path: Path) -> None:
    output, report = tmp_path / "result.json", tmp_path / "report"
    done = invoke(
        "run", "--experiments", "connections", "--seed", 5, "-o", output, "--report", report
    )
    assert done.exit_code == 0, done.output
    assert results.load(output).scale.seed == 5
    assert "seed 5" in done.stderr
    assert (report / "report.md").read_text().startswith("# Bench")
    ElementTree.fromstring((report / "report.html").read_text().partition("\n")[2])
    assert [path.name for path in report.glob("*.svg")] == ["connections-worker_cpu.svg"]


def test_a_run_with_a_failure_ends_with_it_and_keeps_the_rest(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = invoke("run", "--experiments", "wrong,connections", "-o", output)
    assert isinstance(done.exception, NfqproxyError)
    assert "not all values of wrong" in str(done.exception)
    assert "3 of 9 connections were lost" in done.stderr
    assert len(results.load(output).observations) == 8


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = invoke("run", "--experiments", "connections,interrupted", "-o", output)
    assert done.exit_code == 1  # of click's runner; main() makes 130 of it
    assert f"{output} holds 1 of 2 experiments" in done.stderr
    kept = results.load(output)
    assert len(kept.observations) == 8
    assert not kept.is_complete


def test_wrong_usage_measures_nothing(tmp_path: Path) -> None:
    unknown = invoke("run", "--experiments", "weather", "-o", tmp_path / "r.json")
    assert isinstance(unknown.exception, InputError)
    assert "choose from connections, wrong, interrupted" in str(unknown.exception)
    nowhere = invoke("run", "-o", tmp_path / "none" / "r.json")
    assert isinstance(nowhere.exception, InputError)
    assert invoke("run", "--profile", "huge", "-o", tmp_path / "r.json").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_full_profile_measures_what_the_bars_speak_of() -> None:
    assert set(PROFILES) == {"smoke", "short", "full"}
    named = {bar.measured.parameters.get("services", 1) for bar in BARS}
    assert named <= set(PROFILES["full"].services)


def test_two_short_results_can_be_compared() -> None:
    rounds = [1.0] * PROFILES["short"].rounds
    assert intervals.of_ratio(rounds, rounds).is_sure


def test_report_prints_markdown_or_writes_what_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "result.json"
    results.save(result(everything()), source)
    printed = invoke("report", source)
    assert printed.exit_code == 0
    assert "## Bars of the design" in printed.stdout
    document = tmp_path / "doc.md"
    document.write_text("<!-- bench:bars -->\n<!-- /bench:bars -->\n")
    words = ["--html", tmp_path / "r.html", "--plots", tmp_path / "plots", "--into", document]
    written = invoke("report", source, *words)
    assert written.exit_code == 0, written.output
    assert written.stdout == ""
    assert "| measure |" in document.read_text()
    plots = list((tmp_path / "plots").iterdir())
    assert len(plots) >= 6
    for plot in plots:
        assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")


def test_compare_marks_and_fails_above_a_limit(tmp_path: Path) -> None:
    before = stored(tmp_path / "a.json", QUIET)
    after = stored(tmp_path / "b.json", [value * 1.3 for value in QUIET])
    shown = invoke("compare", before, after)
    assert shown.exit_code == 0, shown.output
    (line,) = (line for line in shown.stdout.splitlines() if "worker_cpu" in line)
    assert line.split()[-1] == "worse"
    assert " 1.30 (" in line
    failed = invoke("compare", before, after, "--fail-above", 1.1, "--metric", "worker_cpu")
    assert isinstance(failed.exception, NfqproxyError)
    assert not isinstance(failed.exception, InputError)
    assert "connections.worker_cpu of nfqproxy" in str(failed.exception)
    assert invoke("compare", before, after, "--fail-above", 1.4).exit_code == 0
    assert invoke("compare", after, before, "--fail-above", 1.1).exit_code == 0


def test_compare_with_too_few_rounds_does_not_pass_for_good(tmp_path: Path) -> None:
    before = stored(tmp_path / "a.json", QUIET[:3])
    after = stored(tmp_path / "b.json", [5.0, 5.0, 5.0])
    assert invoke("compare", before, after).stdout.count(" ?") >= 1
    refused = invoke("compare", before, after, "--fail-above", 1.1)
    assert isinstance(refused.exception, InputError)
    assert "too few rounds" in str(refused.exception)


def test_compare_refuses_other_machines_and_unknown_metrics(tmp_path: Path) -> None:
    before = stored(tmp_path / "a.json", QUIET)
    after = stored(tmp_path / "b.json", QUIET, kernel="Linux 6.1")
    refused = invoke("compare", before, after)
    assert isinstance(refused.exception, InputError)
    assert invoke("compare", before, after, "--different-machines").exit_code == 0
    unknown = invoke("compare", before, before, "--metric", "wattage")
    assert isinstance(unknown.exception, InputError)


def test_check_measures_and_fails_when_the_ratio_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = tmp_path / "r.json", tmp_path / "baseline.json"
    results.save(result(fakes.Steady.observations), source)
    assert invoke("baseline", source, "-o", path).exit_code == 0
    good = invoke("check", "--baseline", path)
    assert good.exit_code == 0, good.output
    assert "ok" in good.stdout
    monkeypatch.setitem(bench.experiments.EXPERIMENTS, "connections", fakes.Slow())
    grown = invoke("check", "--baseline", path)
    assert isinstance(grown.exception, NfqproxyError)
    assert "REGRESSION" in grown.stdout
    assert "grew by more than 15%" in str(grown.exception)
    assert invoke("check", "--baseline", path, "--tolerance", 1.5).exit_code == 0


def test_check_without_a_baseline_says_how_to_write_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = invoke("check", "--baseline", tmp_path / "none.json")
    assert isinstance(done.exception, InputError)
    assert "python -m bench baseline RESULT" in str(done.exception)


def test_a_committed_baseline_can_be_read() -> None:
    if baselines.PATH.exists():
        assert baselines.load(baselines.PATH).ratios


def test_the_verb_of_the_program_is_the_same_command() -> None:
    for words in (["-m", "nfqproxy", "bench"], ["-m", "bench"]):
        done = subprocess.run(
            [sys.executable, *words, "report", "none.json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=Path(__file__).parents[3],
        )
        assert done.returncode == 2
        assert done.stderr.strip() == (
            "bench: none.json cannot be read: No such file or directory; give a JSON file"
        )


def test_the_program_does_not_import_the_bench() -> None:
    code = "import sys, nfqproxy.cli.main, nfqproxy.app; sys.exit('bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_installation_without_the_bench_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "_folders", lambda: (tmp_path,))
    done = CliRunner().invoke(verb.bench, ["run"])
    assert isinstance(done.exception, HostError)
    assert "from a clone" in str(done.exception)
