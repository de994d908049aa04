"""Judgements on numbers, without a kernel."""

import pytest

from nfqproxy.doctor.check import Status
from nfqproxy.doctor.network import judge_room


@pytest.mark.parametrize(
    ("count", "limit", "status"),
    [
        (0, 262144, Status.OK),
        (80, 100, Status.OK),
        (81, 100, Status.WARN),
        (100, 100, Status.WARN),
        (5000, 0, Status.OK),
    ],
)
def test_room_in_conntrack(count: int, limit: int, status: Status) -> None:
    assert judge_room(count, limit).status is status


def test_the_hint_doubles_the_limit() -> None:
    finding = judge_room(900, 1000)
    assert finding.found == "900 of 1,000 entries (90%)"
    assert "net.netfilter.nf_conntrack_max=2000" in finding.fix
