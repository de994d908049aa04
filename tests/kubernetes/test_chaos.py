"""Whatever an API server may do to its clients: the table ends as what the server holds, and what is always
there is never missed on the way.

Faults come by a seed, so a case that fails can be run again; hypothesis chooses which faults, how often
and what is written meanwhile.
"""

import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfqproxy.testing import ApiServer, Fault, Settings
from tests.kernel.manifests import Endpoint, Manifest, Port, service
from tests.kubernetes.follower import HASTY, QUICK, following, held, run, until

PORTS = [Port(port=80, target=8080, name="http"), Port(port=443, target=8443, name="https")]
ALWAYS, COMING_AND_GOING = range(3), range(3, 9)
WRITES = 40


def manifests(number: int, chance: random.Random) -> list[Manifest]:
    """A Service and its slice; of those that are always there endpoints change but never all go."""
    endpoints = [
        Endpoint(address=f"10.244.{number}.{last}", ready=chance.random() < 0.8)
        for last in chance.sample(range(1, 9), chance.randint(1, 4))
    ]
    weights = {endpoints[0].address: chance.randint(0, 9)} if chance.random() < 0.3 else None
    ports = PORTS if number in ALWAYS else chance.sample(PORTS, chance.randint(1, 2))
    return service(
        f"s{number}",
        vips=[f"10.96.0.{number + 1}"],
        ports=ports,
        endpoints=endpoints,
        weights=weights,
    )


def write(server: ApiServer, chance: random.Random) -> None:
    """One write: a new or altered Service or slice, or a deletion of one that comes and goes."""
    number = chance.choice([*ALWAYS, *COMING_AND_GOING])
    value = chance.choice(manifests(number, chance))
    kind, name = value["kind"], value["metadata"]["name"]
    is_there = any(
        version.name == name
        for resource in server.store._objects
        if resource.kind == kind
        for version in server.store.all(resource)
    )
    if number in COMING_AND_GOING and is_there and chance.random() < 0.4:
        server.discard(kind, name)
    else:
        server.apply(value)


async def storm(seed: int, faults: dict[Fault, float], directory: Path, **options: Any) -> None:
    chance = random.Random(seed)
    async with ApiServer(seed=seed, settings=Settings(**options)) as server:
        for number in ALWAYS:
            for value in manifests(number, chance):
                server.apply(value)
        always = tuple(held(server))
        server.store.compact()  # a cache that lags shows nothing from before
        server.faults.delay_s = 0.02
        server.faults.retry_after_s = 0
        for fault, rate in faults.items():
            server.faults.set(fault, rate)
        async with following(
            server, directory, always=always, pace=QUICK, time_outs=HASTY
        ) as follower:
            for _ in range(WRITES):
                write(server, chance)
                await asyncio.sleep(chance.choice((0, 0, 0.002, 0.01)))
                if chance.random() < 0.02:
                    await follower.source.reload()
            server.settle()
            await until(
                lambda: follower.cluster.ports == held(server),
                f"the table equals what the server holds, after {dict(server.faults.counts)}",
            )
            await until(lambda: follower.source.last_error is None, "all is well")
            assert follower.missed == []


FAULTS = {
    Fault.CUT: 0.2,
    Fault.CUT_LIST: 0.4,
    Fault.END: 0.2,
    Fault.DELAY: 0.2,
    Fault.SHUFFLE: 0.5,
    Fault.STALE: 0.5,
    Fault.DUPLICATE_SLICE: 0.4,
    Fault.EXPIRE: 0.2,
    Fault.TOO_MANY: 0.3,
    Fault.INTERNAL: 0.3,
    Fault.RESTART: 0.05,
}
"""The highest rate of each."""


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    seed=st.integers(0, 2**32),
    chosen=st.sets(st.sampled_from(sorted(FAULTS)), min_size=2),
    history=st.sampled_from((5, 10_000)),
    expired_as_http=st.booleans(),
)
def test_any_storm(seed: int, chosen: set[Fault], history: int, expired_as_http: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run(
            storm(
                seed,
                {fault: FAULTS[fault] for fault in sorted(chosen)},
                Path(directory),
                history=history,
                expired_as_http=expired_as_http,
            )
        )


def test_all_at_once(tmp_path: Path) -> None:
    run(storm(20, FAULTS, tmp_path, history=20))
