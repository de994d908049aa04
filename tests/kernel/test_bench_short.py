"""The whole short profile by its command: every experiment gives values, and all connections were right.

No time and no rate is looked at, only that each is there: what a machine under other load can do too.
"""

import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench import bars
from bench import result as results
from bench.bars import BARS, MANY, Measure
from bench.experiments import EXPERIMENTS
from bench.observation import Observation
from bench.profiles import PROFILES
from bench.result import Result

REPOSITORY = Path(__file__).parents[2]
SHORT = PROFILES["short"]
MOST = max(SHORT.services)

KERNEL = {"dnat", "kube-proxy-iptables", "kube-proxy-nftables"}
RELAYS = {"haproxy", "nginx-stream"}
WORKERS = {"nfqproxy", "c"}
QUANTILES: set[object] = {0.5, 0.9, 0.99, 0.999}
FLOWS = {"rate": "1/s", "path_cpu": "us", "worker_cpu": "us"}

# Of each experiment: who takes part, the metrics with their units, and what is varied.
YIELDS: dict[str, tuple[set[str], dict[str, str], dict[str, set[object]]]] = {
    "connections": (
        KERNEL | WORKERS | {"mark", "overlay", "netfilterqueue"},
        FLOWS,
        {"services": set(SHORT.services)},
    ),
    "latency": (
        KERNEL | WORKERS | RELAYS,
        {"connect": "us", "answer": "us"},
        {"services": {MOST}, "quantile": QUANTILES, "load": {"idle", "half"}},
    ),
    "packets": (KERNEL | {"nfqproxy"}, {"path_cpu": "us"}, {"services": {1}}),
    "requests": (
        KERNEL | RELAYS | {"nfqproxy"},
        {"rate": "1/s", "cpu": "us", "latency": "us", "userspace_packets": "packets"},
        {"services": {1}, "quantile": QUANTILES},
    ),
    "bulk": (
        KERNEL | RELAYS | {"nfqproxy"},
        {"throughput": "bit/s", "cpu": "ms/GB"},
        {"services": {1}},
    ),
    "udp_flows": (KERNEL | {"nfqproxy"}, FLOWS, {"services": {MOST}}),
    "overload": (
        {"nfqproxy"},
        {
            "capacity": "1/s",
            "offered": "1/s",
            "reached": "x",
            "by_worker": "share",
            "by_fallback": "share",
            "lost": "share",
        },
        {"factor": {2, 10}, "worker": {"own CPU", "slowed"}},
    ),
    "scaling": (
        {"nfqproxy"},
        {**FLOWS, "imbalance": "ratio"},
        {"workers": set(SHORT.workers), "placement": {"own", "with the load", "shared"}},
    ),
    "programming": (
        KERNEL - {"dnat"} | {"nfqproxy"},
        {"first_sync": "ms", "endpoint_change": "ms", "load_rules": "ms"},
        {
            "services": set(SHORT.services),
            "endpoints": {3, MOST * 3, MOST * 16},
            "source": {"directory", "file-json"},
        },
    ),
    "memory": (
        {"nfqproxy"},
        {f"{who}_{what}": "bytes" for who in ("supervisor", "worker") for what in ("rss", "peak")},
        {
            "services": set(SHORT.services),
            "endpoints": {3, MOST * 3},
            "source": {"directory"},
        },
    ),
}
# Who has no such metric.
LACKING = {(who, "worker_cpu") for who in KERNEL} | {
    *(
        (f"kube-proxy-{kind}", f"{what}")
        for kind in ("iptables", "nftables")
        for what in ("first_sync", "endpoint_change")
    ),
    ("nfqproxy", "load_rules"),
}


@dataclass(frozen=True)
class Run:
    result: Result
    report: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("short")
    output, report = directory / "result.json", directory / "report"
    words = ["bench", "run", "--profile", "short", "-o", str(output), "--report", str(report)]
    with subprocess.Popen(
        [sys.executable, "-m", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            _, said = running.communicate(timeout=800)
        finally:
            running.send_signal(signal.SIGINT)  # it has ended, or cleans up
    assert running.returncode == 0, said
    assert [path.name for path in Path("/run/netns").glob(f"nfqb-{running.pid}-*")] == []
    return Run(results.load(output), report)


def of(run: Run, name: str) -> list[Observation]:
    return [each for each in run.result.observations if each.experiment == name]


@pytest.mark.timeout(900)
def test_every_experiment_is_run_and_known_by_its_modules_name(run: Run) -> None:
    modules = {path.stem for path in (REPOSITORY / "bench/experiments").glob("[a-z]*.py")}
    assert set(EXPERIMENTS) == modules == set(YIELDS)
    assert {one.name: one.failure for one in run.result.ran} == dict.fromkeys(YIELDS, "")
    assert run.result.is_complete


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", YIELDS)
def test_experiment_yields_every_metric_of_every_contender(run: Run, name: str) -> None:
    found = of(run, name)
    contenders, units, varied = YIELDS[name]
    assert {(one.contender, one.metric) for one in found} == {
        (who, metric) for who in contenders for metric in units
    } - LACKING
    for one in found:
        assert one.unit == units[one.metric]
        assert set(one.parameters) <= set(varied)
        # A queue may just hold what comes twice as fast; nothing may be lost or leave the kernel.
        if one.metric in ("lost", "userspace_packets"):
            assert one.value == 0
        elif (one.metric, one.parameters.get("factor")) != ("by_fallback", 2):
            assert one.value > 0, one
    for key, values in varied.items():
        seen = {one.parameters[key] for one in found if key in one.parameters}
        assert seen <= values if key == "placement" else seen == values


@pytest.mark.timeout(900)
def test_every_bar_finds_its_figures(run: Run) -> None:
    """With 5,000 Services in the table, as the full profile has, the bars would find theirs."""
    assert {1, MANY} <= set(PROFILES["full"].services)
    fitting = [
        replace(
            bar,
            measured=at_most(bar.measured),
            relative_to=bar.relative_to and at_most(bar.relative_to),
        )
        for bar in BARS
    ]
    unmet = [
        one.bar.title
        for one in bars.standings(run.result.observations, fitting)
        if one.measured is None
    ]
    assert unmet == []


def at_most(measure: Measure) -> Measure:
    """The same with as many Services as the short profile has."""
    if measure.parameters.get("services") != MANY:
        return measure
    return replace(measure, parameters={**measure.parameters, "services": MOST})


@pytest.mark.timeout(900)
def test_the_report_shows_every_experiment(run: Run) -> None:
    text = (run.report / "report.md").read_text()
    assert [name for name in YIELDS if f"## {name}: " not in text] == []
    page = (run.report / "report.html").read_text()
    assert [name for name in YIELDS if f'id="{name}"' not in page] == []
    plots = {path.name.partition("-")[0] for path in run.report.glob("*.svg")}
    assert plots == set(YIELDS)
