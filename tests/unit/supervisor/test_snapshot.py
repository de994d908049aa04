"""What a worker is sent when it starts."""

from pathlib import Path

import pytest

from nfqproxy.model import (
    Action,
    FrontendKey,
    FrontendKind,
    FrontendPlan,
    NodeContext,
    Protocol,
    TrafficPolicy,
    Verdict,
)
from nfqproxy.supervisor.affinity_store import AffinityStore
from nfqproxy.supervisor.supervisor import Supervisor

REFUSED = Action(verdict=Verdict.REJECT)


def plan(port: int) -> FrontendPlan:
    return FrontendPlan(
        key=FrontendKey(Protocol.TCP, "10.96.0.1", port),
        kind=FrontendKind.CLUSTER_IP,
        namespace="default",
        service="web",
        port_name=str(port),
        policy=TrafficPolicy.CLUSTER,
        candidate_sets=(),
        actions=(REFUSED, REFUSED, REFUSED),
    )


class Kernel:
    """Nothing is published here."""

    def restore(self) -> None:
        raise AssertionError

    def sync(self, *_: object) -> object:
        raise AssertionError


@pytest.mark.parametrize("count", [0, 1, 250, 251, 1000])
def test_a_snapshot_in_parts(tmp_path: Path, count: int) -> None:
    supervisor = Supervisor(Kernel(), AffinityStore(tmp_path / "records"))
    plans = {one.key: one for one in map(plan, range(1, count + 1))}
    node = NodeContext(node_name="n1", cluster_cidrs=("10.244.0.0/16",))
    supervisor.feed_workers(plans, node)
    parts = list(supervisor.snapshot())
    assert [one for part in parts for one in part.upserts] == list(plans.values())
    assert [part.is_whole for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part.revision for part in parts} == {1}
    assert all(part.pod_detector == node.pod_detector for part in parts)
