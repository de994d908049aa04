"""The lab's expectations, and how a result is shown."""

import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from nfqproxy.lab.chi_square import chi_square
from nfqproxy.lab.jobs import Tally, Target, TargetReport, percentiles
from nfqproxy.lab.result import (
    BackendShare,
    Check,
    KillResult,
    LabResult,
    LatencyResult,
    SpreadResult,
    checks,
)
from nfqproxy.lab.view import show_result

WEIGHTS = (5, 3, 2)


def part(attempts: int, failed: int = 0) -> TargetReport:
    tally = Tally(Target("web", "10.96.0.80", 80))
    tally.attempts, tally.ok = attempts, attempts - failed
    for _ in range(failed):
        tally.fail("ECONNREFUSED")
    return tally.report()


def spread(answers: tuple[int, ...], *, frontend: str, queued: int) -> SpreadResult:
    total = sum(answers)
    return SpreadResult(
        name="TCP",
        frontend=frontend,
        attempts=total,
        failed=0,
        errors={},
        retries=0,
        flows=total,
        backends=tuple(
            BackendShare(
                backend=f"backend-{i + 1}",
                weight=weight,
                answers=answers[i],
                share=answers[i] / total,
                expected_share=weight / 10,
            )
            for i, weight in enumerate(WEIGHTS)
        ),
        chi_square=chi_square(answers, WEIGHTS),
        queued=queued,
        sent_again=0,
        per_flow=queued / total,
        elapsed_s=0.5,
    )


SPREAD = spread((1520, 890, 590), frontend="[fd00:10:96::80]:80/tcp", queued=3000)
LATENCY = LatencyResult(
    path="nfqproxy", address="10.96.0.80:80", failed=0, connect_us=percentiles([50.0, 60.0, 90.0])
)
KILL = KillResult(
    killed=(4711,),
    after_s=1.0,
    recovered=True,
    fallback_s=0.3,
    tcp=part(2000),
    dns=part(800),
    held=part(8),
    fallback_tcp=150,
    fallback_udp=60,
)


def failing(
    *,
    spread: SpreadResult = SPREAD,
    latency: LatencyResult = LATENCY,
    kill: KillResult = KILL,
    source_kept: bool = True,
) -> list[Check]:
    return [
        check
        for check in checks([spread], [latency], kill, source_kept=source_kept)
        if not check.ok
    ]


def result(found: tuple[Check, ...]) -> LabResult:
    return LabResult(
        lab="lab",
        kernel="6.18.0",
        cpus=2,
        reader="netlink",
        data_path="mark",
        workers=1,
        weights=WEIGHTS,
        seed=7,
        source_kept=True,
        spreads=(SPREAD,),
        latencies=(LATENCY,),
        kill=KILL,
        conntrack=("tcp 6 117 TIME_WAIT src=192.0.2.10 dst=10.96.0.80 sport=40000 dport=80",),
        worker_counters={},
        checks=found,
    )


def test_all_expectations_hold() -> None:
    assert failing() == []


def test_a_syn_sent_again_is_a_packet_of_its_own() -> None:
    assert failing(spread=replace(SPREAD, queued=3002, sent_again=2)) == []


@pytest.mark.parametrize(
    ("changed", "name", "detail"),
    [
        (
            {"spread": spread((1000, 1000, 1000), frontend="x", queued=3000)},
            "TCP: spread by weight",
            "chi-square p",
        ),
        (
            {"spread": replace(SPREAD, queued=3001)},
            "TCP: one packet in userspace for each",
            "3001 packets for 3000",
        ),
        (
            {"spread": replace(SPREAD, sent_again=1)},
            "TCP: one packet in userspace for each",
            "3000 packets for 3000, SYNs sent again: 1",
        ),
        (
            {"spread": replace(SPREAD, failed=2, errors={"ETIMEDOUT": 2})},
            "TCP: every one answered",
            "2 of 3000 failed {'ETIMEDOUT': 2}",
        ),
        ({"latency": replace(LATENCY, failed=1)}, "latency: every connect succeeded", "1 failed"),
        (
            {"kill": replace(KILL, tcp=part(2000, failed=1))},
            "worker killed: no failed connections",
            "1 of 2000 failed {'ECONNREFUSED': 1}",
        ),
        (
            {"kill": replace(KILL, dns=part(800, failed=1))},
            "worker killed: no failed queries",
            "1 of 800",
        ),
        (
            {"kill": replace(KILL, held=part(8, failed=1))},
            "worker killed: no failed held",
            "1 of 8",
        ),
        (
            {"kill": replace(KILL, recovered=False)},
            "worker killed: a new one took over",
            "not within",
        ),
        ({"source_kept": False}, "servers saw the client's own address", "another source"),
    ],
)
def test_each_expectation_can_fail(changed: dict[str, object], name: str, detail: str) -> None:
    found = failing(**changed)  # type: ignore[arg-type]
    assert [check.name for check in found] == [name]
    assert found[0].detail.startswith(detail)


def test_the_tables_fit_80_columns() -> None:
    output = io.StringIO()
    show_result(result(()), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = output.getvalue()
    assert "…" not in text
    for word in (
        "[fd00:10:96::80]:80/tcp",
        "50.7%",
        "1.000",
        "nfqproxy",
        "0.30 s",
        "150",
        "data path mark",
    ):
        assert word in text
    assert (
        lines[-1] == "PASS  3,000 connections spread 5:3:2; 1.000 packets queued each; kill lost 0"
    )


def test_a_failed_expectation_is_shown() -> None:
    output = io.StringIO()
    bad = Check(name="worker killed: no failed queries", ok=False, detail="1 of 800 failed")
    show_result(result((bad,)), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert lines[-2] == "failed  worker killed: no failed queries: 1 of 800 failed"
    assert lines[-1].startswith("FAIL")
