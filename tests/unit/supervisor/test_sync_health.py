"""When a proxy counts as healthy."""

from nfqproxy.supervisor.sync_health import LIMIT_S, SyncHealth


def test_unhealthy_while_a_change_waits_too_long() -> None:
    now = 100.0
    health = SyncHealth(lambda: now)
    assert health.is_healthy
    first = health.queued()
    now += LIMIT_S
    assert health.is_healthy
    second = health.queued()
    now += 1.0
    # The limit runs from the first change that waits, not from the newest.
    assert not health.is_healthy
    health.done(first)
    assert not health.is_healthy
    health.done(second)
    assert health.is_healthy
    now += 10 * LIMIT_S
    assert health.is_healthy
