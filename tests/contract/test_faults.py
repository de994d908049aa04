"""Each fault alone, as a client meets it; then all at once, and a client that ends with the right state."""

import asyncio
import contextlib
import gc
import random
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from nfqproxy.errors import InputError
from nfqproxy.testing import ApiServer, Fault, Faults, Settings
from nfqproxy.testing.resources import by_plural
from tests.contract.api import Api, Object, endpoint_slice, names, service, version
from tests.contract.follower import Follower

SERVICES, SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"
MET_S = 20
_SLICES = by_plural["discovery.k8s.io", "endpointslices"]


def manifest(namespace: str, name: str, *addresses: str) -> Object:
    value = endpoint_slice(name, *addresses)
    value["metadata"]["namespace"] = namespace
    return {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **value}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(MET_S):
        while not holds():  # noqa: ASYNC110 - the far end of a connection
            await asyncio.sleep(0.005)


async def to_the_end(api: Api, start: str, do: Callable[[], Awaitable[object]]) -> bytes:
    """Watch the Services and do something meanwhile; all that comes, to the end of the answer."""
    async with api.watch("services", resourceVersion=start) as watch:
        await do()
        return b"".join([line async for line in watch.lines()])


async def test_a_watch_is_cut_in_the_middle_of_an_event(api: Api, server: ApiServer) -> None:
    start = version(await api.list("services"))
    ends = []
    for number in range(12):
        server.faults.force(Fault.CUT)
        value = service(f"a{number}")
        value["metadata"]["namespace"] = api.namespace
        reader, writer = await asyncio.open_connection(server.host, server.port)
        query = f"{SERVICES}?watch=1&resourceVersion={start}&timeoutSeconds=60"
        writer.write(f"GET {query} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        server.apply({"apiVersion": "v1", "kind": "Service", **value})
        start = str(server.store.revision)
        told = b""
        try:
            while data := await reader.read(65536):
                told += data
            ends.append("FIN")
        except ConnectionResetError:
            ends.append("RST")
        writer.close()
        # Some of the line has come (nothing, if the reset was quicker), not all of it, and no end of the chunks.
        assert told == b"" or b"\r\n{" in told
        assert b"}\n" not in told
        assert not told.endswith(b"0\r\n\r\n")
    assert server.faults.counts[Fault.CUT] == 12
    assert set(ends) == {"FIN", "RST"}


async def test_a_client_sees_a_cut_as_an_error(api: Api, server: ApiServer) -> None:
    start = version(await api.list("services"))
    server.faults.force(Fault.CUT)
    with pytest.raises(aiohttp.ClientPayloadError):
        await to_the_end(api, start, lambda: api.create("services", service("a")))
    # From where it was, nothing is lost.
    async with api.watch("services", resourceVersion=start) as watch:
        assert (await watch.next())["object"]["metadata"]["name"] == "a"


async def test_a_list_is_cut(api: Api, server: ApiServer) -> None:
    await api.create("services", service("a"))
    server.faults.force(Fault.CUT_LIST)
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await api.list("services")
    assert names(await api.list("services")) == ["a"]


async def test_a_watch_ends_early(api: Api, server: ApiServer) -> None:
    server.faults.force(Fault.END)
    async with api.watch("services", timeoutSeconds=3600) as watch:
        await api.create("services", service("a"))
        events = [event async for event in watch.events()]
    assert [event["type"] for event in events] == ["ADDED"]


async def test_one_watch_may_overtake_another(api: Api, server: ApiServer) -> None:
    start = version(await api.list("services"))
    server.faults.delay_s = 2.0
    # The first draw of this seed's stream, as a part of the longest delay.
    assert Faults(0).chance(Fault.DELAY).random() > 0.2
    order: list[str] = []

    async def see(plural: str) -> None:
        async with api.watch(plural, resourceVersion=start) as watch:
            order.append((await watch.next())["object"]["kind"])

    watches = [asyncio.create_task(see(plural)) for plural in ("endpointslices", "services")]
    await until(lambda: server.watches.total() == 2)
    server.faults.force(Fault.DELAY, only=["endpointslices"])
    server.apply(manifest(api.namespace, "web-1", "10.244.1.10"))
    await api.create("services", service("a"))
    await asyncio.gather(*watches)
    assert order == ["Service", "EndpointSlice"]
    assert server.faults.counts[Fault.DELAY] == 1


async def test_what_is_cached_comes_in_any_order(api: Api, server: ApiServer) -> None:
    expected = [f"a{number}" for number in range(10, 30)]
    for name in expected:
        await api.create("services", service(name))
    assert names(await api.list("services", resourceVersion="0")) == expected
    server.faults.force(Fault.SHUFFLE, 2)
    found = names(await api.list("services", resourceVersion="0"))
    assert found != expected
    assert sorted(found) == expected
    # A consistent list, and pages, are always in order.
    assert names(await api.list("services")) == expected
    async with api.watch("services") as watch:
        first = [(await watch.next())["object"]["metadata"]["name"] for _ in expected]
    assert first != expected
    assert sorted(first) == expected


async def test_version_zero_may_be_the_past(api: Api, server: ApiServer) -> None:
    before = version(await api.list("services"))
    for number in range(50):
        await api.create("services", service(f"a{number}"))
    server.faults.force(Fault.STALE)
    found = await api.list("services", resourceVersion="0")
    assert int(version(found)) < int(before) + 50
    assert len(found["items"]) == max(0, int(version(found)) - int(before))
    # A watch that begins in the past goes on to the present.
    server.faults.force(Fault.STALE)
    async with api.watch("services", resourceVersion="0") as watch:
        seen = {(await watch.next())["object"]["metadata"]["name"] for _ in range(50)}
    assert len(seen) == 50
    assert server.faults.counts[Fault.STALE] == 2


async def test_endpoints_are_in_two_slices_for_a_while(api: Api, server: ApiServer) -> None:
    addresses = [f"10.244.1.{last}" for last in range(10, 40)]
    server.faults.force(Fault.DUPLICATE_SLICE)
    await api.create("endpointslices", endpoint_slice("web-1", *addresses))
    first, second = (await api.list("endpointslices"))["items"]
    assert first["metadata"]["labels"] == second["metadata"]["labels"]
    found = [[item["addresses"][0] for item in one["endpoints"]] for one in (first, second)]
    assert found[0] == addresses
    assert found[1] != addresses
    assert sorted(found[1]) == addresses
    # Written again, the first slice is alone: what left it is nowhere else.
    await api.put("endpointslices", endpoint_slice("web-1", "10.244.1.10"))
    assert names(await api.list("endpointslices")) == ["web-1"]
    server.faults.force(Fault.DUPLICATE_SLICE, 2)
    await api.create("endpointslices", endpoint_slice("web-2", "10.244.1.11"))
    await api.create("endpointslices", endpoint_slice("web-3", "10.244.1.12"))
    await api.delete("endpointslices", "web-2")
    assert names(await api.list("endpointslices")) == ["web-1", "web-3", "web-3-second"]
    server.settle()
    assert names(await api.list("endpointslices")) == ["web-1", "web-3"]


async def test_a_watch_and_a_page_expire(api: Api, server: ApiServer) -> None:
    for name in ("a", "b"):
        await api.create("services", service(name))
    first = await api.list("services", limit=1)
    server.faults.force(Fault.EXPIRE)
    page = await api.call("GET", api.path("services"), continue_=first["metadata"]["continue"])
    assert page.status == 410
    server.faults.force(Fault.EXPIRE)
    async with api.watch("services", resourceVersion=version(first)) as watch:
        assert (await watch.next())["object"]["code"] == 410
    # In the middle of a stream.
    async with api.watch("services", resourceVersion=version(first)) as watch:
        await api.create("services", service("c"))
        assert (await watch.next())["type"] == "ADDED"
        server.faults.force(Fault.EXPIRE)
        await api.create("services", service("d"))
        assert (await watch.next())["type"] == "ERROR"
    assert server.faults.counts[Fault.EXPIRE] == 3


async def test_too_many_requests(api: Api, server: ApiServer) -> None:
    server.faults.retry_after_s = 7
    server.faults.force(Fault.TOO_MANY)
    async with api.session.get(api.path("services").lstrip("/")) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "7"
        status = await response.json()
    assert (status["reason"], status["details"]["retryAfterSeconds"]) == ("TooManyRequests", 7)


async def test_an_internal_error_may_come_after_the_write(api: Api, server: ApiServer) -> None:
    server.faults.set(Fault.INTERNAL, 1)
    assert (await api.call("GET", api.path("services"))).status == 500
    for number in range(20):
        refused = await api.call("POST", api.path("services"), service(f"a{number}"))
        assert (refused.status, refused.body["reason"]) == (500, "InternalError")
    server.faults.clear()
    assert 0 < len((await api.list("services"))["items"]) < 20


async def test_a_restart_cuts_everything_and_forgets(api: Api, server: ApiServer) -> None:
    start = version(await api.list("services"))
    port = server.port
    server.faults.force(Fault.RESTART)
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await to_the_end(api, start, lambda: api.create("services", service("a")))
    await until(lambda: not server.is_restarting)
    assert server.port == port
    asked = {"watch": 1, "resourceVersion": start, "timeoutSeconds": 5}
    found = await api.call("GET", api.path("services"), **asked)
    assert found.body["object"]["code"] == 410
    assert names(await api.list("services")) == ["a"]


# asyncio itself forgets a connection that is accepted when its listener has just been closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_stop_waits_for_no_connection_that_just_came() -> None:
    for turns in range(8):
        async with ApiServer() as server:
            coming = asyncio.create_task(asyncio.open_connection(server.host, server.port))
            for _ in range(turns):
                await asyncio.sleep(0)
            async with asyncio.timeout(MET_S):
                await server.stop()
            with contextlib.suppress(OSError):
                _, writer = await coming
                writer.close()
                await writer.wait_closed()
    gc.collect()  # here, not in the next test


async def test_while_it_is_away_nobody_answers(api: Api, server: ApiServer) -> None:
    restart = asyncio.create_task(server.restart(down_s=0.5))
    await until(lambda: server._runner is None)
    with pytest.raises(aiohttp.ClientError):
        await api.list("services")
    await restart
    assert names(await api.list("services")) == []


async def test_a_fault_keeps_to_its_resources(api: Api, server: ApiServer) -> None:
    server.faults.set("429", 1, only=["endpointslices"])
    assert (await api.call("GET", api.path("services"))).status == 200
    assert (await api.call("GET", api.path("endpointslices"))).status == 429
    server.faults.set("429", 0)
    assert (await api.call("GET", api.path("endpointslices"))).status == 200
    assert server.faults.counts == {Fault.TOO_MANY: 1}


@pytest.mark.parametrize(("name", "rate"), [("cuts", 0.1), ("cut", 1.5), ("cut", -1)])
def test_a_wrong_fault_is_refused(name: str, rate: float) -> None:
    with pytest.raises(InputError, match="cut"):
        Faults().set(name, rate)


def test_a_seed_draws_each_fault_from_a_stream_of_its_own() -> None:
    def draws(*others: Fault) -> list[bool]:
        faults = Faults(5)
        faults.set(Fault.CUT, 0.3)
        found = []
        for _ in range(50):
            found.append(faults.hits(Fault.CUT, "services"))
            for other in others:
                faults.set(other, 0.5)
                faults.hits(other, "services")
        return found

    assert draws() == draws(Fault.DELAY, Fault.END)
    assert 5 < sum(draws()) < 25


@pytest.mark.parametrize("seed", [1, 2])
def test_a_client_by_the_rules_survives_everything(runner: asyncio.Runner, seed: int) -> None:
    """Nothing a fault does is outside the rules: the state is right in the end, whatever came."""
    runner.run(_survives(seed))


async def _survives(seed: int) -> None:
    chance = random.Random(seed)
    async with ApiServer(seed=seed, settings=Settings(bookmark_s=0.02, history=200)) as server:
        server.faults.delay_s = 0.01
        rates = dict.fromkeys(Fault, 0.08) | {Fault.RESTART: 0.01, Fault.DELAY: 0.3, Fault.END: 0.3}
        server.faults.set_all(rates)
        followers = {path: Follower(server.url, path) for path in (SERVICES, SLICES)}
        tasks = [asyncio.create_task(follower.run()) for follower in followers.values()]
        try:
            for step in range(300):
                _write(server, chance)
                if step % 3 == 0:
                    await asyncio.sleep(0.003)
            counts = server.faults.counts.copy()
            server.settle()
            await until(lambda: not server.is_restarting)
            expected = {path: await _state(server, path) for path in followers}

            def is_right() -> bool:
                return all(followers[path].state == state for path, state in expected.items())

            await until(is_right)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    common = {Fault.CUT, Fault.END, Fault.DELAY, Fault.DUPLICATE_SLICE, Fault.EXPIRE, Fault.RESTART}
    assert common <= set(counts), counts


def _write(server: ApiServer, chance: random.Random) -> None:
    number = chance.randrange(12)
    name = f"web-{number}"
    if chance.random() < 0.2 and server.store.get(_SLICES, "default", name):
        server.discard("EndpointSlice", name)
    else:
        addresses = [f"10.244.1.{chance.randrange(1, 200)}" for _ in range(chance.randrange(1, 5))]
        server.apply(manifest("default", name, *addresses))
    if chance.random() < 0.3:
        labels = {"n": str(chance.randrange(1000))}
        value: dict[str, Any] = service(name, **labels)
        server.apply({"apiVersion": "v1", "kind": "Service", **value})


async def _state(server: ApiServer, path: str) -> dict[tuple[str, str], Object]:
    async with aiohttp.ClientSession(server.url) as session, session.get(path) as response:
        items = (await response.json())["items"]
    return {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in items}
