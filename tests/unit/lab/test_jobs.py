"""Percentiles and the job messages."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.lab.jobs import (
    DnsJob,
    HeldJob,
    Job,
    LatencyJob,
    Percentiles,
    Progress,
    Report,
    Tally,
    Target,
    TcpJob,
    decode_job,
    decode_message,
    encode,
    percentiles,
)

TARGET = Target("vip", "10.96.0.80", 80)


def test_percentiles_by_nearest_rank() -> None:
    assert percentiles(range(1, 101)) == Percentiles(samples=100, p50=50, p90=90, p99=99, max=100)
    assert percentiles([7.0]) == Percentiles(samples=1, p50=7, p90=7, p99=7, max=7)
    assert percentiles([]).samples == 0


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_percentiles_are_ordered_samples(samples: list[int]) -> None:
    got = percentiles(samples)
    assert got.p50 <= got.p90 <= got.p99 <= got.max == max(samples)
    assert {got.p50, got.p90, got.p99} <= set(samples)
    assert sum(sample <= got.p90 for sample in samples) * 100 >= 90 * len(samples)


@pytest.mark.parametrize(
    "job",
    [
        TcpJob(targets=(TARGET,), connections=3, port_range=(20000, 20499)),
        LatencyJob(targets=(TARGET, TARGET), rounds=5),
        DnsJob(targets=(TARGET,), queries=9, rate=100.0),
        HeldJob(targets=(TARGET,), connections=2, duration_s=1.5),
    ],
)
def test_jobs_round_trip(job: Job) -> None:
    assert decode_job(encode(job)) == job


def test_messages_round_trip() -> None:
    tally = Tally(TARGET)
    tally.attempts, tally.ok = 2, 1
    tally.fail("ECONNREFUSED")
    tally.connect_us.append(59.0)
    report = Report(elapsed_s=1.0, targets=(tally.report(),))
    assert decode_message(encode(report)) == report
    assert report.target("vip").errors == {"ECONNREFUSED": 1}
    assert decode_message(encode(Progress(2, 1))) == Progress(2, 1)


def test_an_unknown_job_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_job(b'{"kind": "flood", "targets": []}')
