"""The reconciler's task ends when it is cancelled, at whatever moment that comes."""

import asyncio

import pytest

from nfqproxy.model import NodeContext
from nfqproxy.supervisor.reconciler import Reconciler, SweepReport


class WithoutKernel(Reconciler):
    """Its sweeps find nothing out."""

    def sweep(self, *, dry_run: bool) -> SweepReport:
        raise OSError("no kernel here")


def forget(stale: object) -> None:
    """No flows to forget."""


@pytest.mark.parametrize("turns", range(5))
def test_a_cancellation_beside_a_wanted_sweep_is_not_lost(turns: int) -> None:
    async def is_over() -> bool:
        reconciler = WithoutKernel(forget)
        task = asyncio.create_task(reconciler.run())
        await asyncio.sleep(0.01)  # it waits
        reconciler.follow((), NodeContext(node_name="n1"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1.0)
        found = task.cancelled()
        task.cancel()  # or asyncio.run would wait for it, as the program did
        return found

    assert asyncio.run(is_over())
