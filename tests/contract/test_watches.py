"""Watches: events, initial state, bookmarks, selectors, ends and expiry."""

import asyncio
import json

import aiohttp
import pytest

from nfqproxy.testing import ApiServer, Settings
from nfqproxy.testing.resources import Resource
from nfqproxy.testing.store import Change
from tests.contract.api import Api, endpoint_slice, service, version


async def test_every_change_after_a_list_comes_in_order(api: Api) -> None:
    start = version(await api.list("services"))
    async with api.watch("services", resourceVersion=start) as watch:
        made = await api.create("services", service("a"))
        changed = await api.put(
            "services", {**made, "metadata": {**made["metadata"], "labels": {"x": "y"}}}
        )
        await api.delete("services", "a")
        events = [await watch.next() for _ in range(3)]
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    found = [event["object"] for event in events]
    assert all((item["kind"], item["apiVersion"]) == ("Service", "v1") for item in found)
    assert [version(item) for item in found[:2]] == [version(made), version(changed)]
    # The last state, with the version of the deletion.
    assert found[2]["metadata"]["labels"] == {"x": "y"}
    assert int(version(found[2])) > int(version(changed))


async def test_changes_before_the_watch_began_come_too(api: Api) -> None:
    start = version(await api.list("services"))
    await api.create("services", service("a"))
    await api.create("services", service("b"))
    await api.delete("services", "a")
    async with api.watch("services", resourceVersion=start) as watch:
        events = [await watch.next() for _ in range(3)]
    told = [(event["type"], event["object"]["metadata"]["name"]) for event in events]
    assert told == [("ADDED", "a"), ("ADDED", "b"), ("DELETED", "a")]


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}], ids=["unset", "zero"])
async def test_without_a_version_what_is_there_comes_first(api: Api, query: dict[str, str]) -> None:
    await api.create("services", service("a"))
    await api.create("services", service("b"))
    # Version 0 may be answered from the past: only then may "b" be late.
    async with api.watch("services", **query) as watch:
        first = [await watch.next() for _ in range(2)]
        await api.create("services", service("c"))
        last = await watch.next()
    assert {event["object"]["metadata"]["name"] for event in first} == {"a", "b"}
    assert {event["type"] for event in first} == {"ADDED"}
    assert (last["type"], last["object"]["metadata"]["name"]) == ("ADDED", "c")


async def test_other_resources_and_namespaces_are_not_told(api: Api) -> None:
    start = version(await api.list("endpointslices"))
    async with api.watch("endpointslices", resourceVersion=start) as watch:
        await api.create("services", service("a"))
        elsewhere = api.path("endpointslices", namespace="default")
        name = f"{api.namespace}-elsewhere"
        made = await api.call("POST", elsewhere, endpoint_slice(name, "10.244.1.1"))
        assert made.status == 201
        await api.call("DELETE", f"{elsewhere}/{name}")
        await api.create("endpointslices", endpoint_slice("web-1", "10.244.1.10"))
        event = await watch.next()
    assert event["object"]["metadata"]["name"] == "web-1"


async def test_a_watch_ends_in_good_order_when_its_time_is_over(api: Api) -> None:
    start = version(await api.list("services"))
    async with api.watch("services", resourceVersion=start, timeoutSeconds=1) as watch:
        assert [event async for event in watch.events()] == []


async def test_a_bookmark_is_a_version_to_go_on_from(api: Api) -> None:
    made = await api.create("endpointslices", endpoint_slice("web-1", "10.244.1.10"))
    async with api.watch(
        "endpointslices",
        resourceVersion=version(made),
        allowWatchBookmarks="true",
        timeoutSeconds=5,
    ) as watch:
        bookmark = (await watch.next("BOOKMARK"))["object"]
    assert (bookmark["kind"], bookmark["apiVersion"]) == ("EndpointSlice", "discovery.k8s.io/v1")
    assert "name" not in bookmark["metadata"]
    # Go's zero values: what reads an object must not stumble over them.
    assert bookmark["endpoints"] is None
    assert int(version(bookmark)) >= int(version(made))
    await api.create("endpointslices", endpoint_slice("web-2", "10.244.1.11"))
    async with api.watch("endpointslices", resourceVersion=version(bookmark)) as watch:
        event = await watch.next()
    assert (event["type"], event["object"]["metadata"]["name"]) == ("ADDED", "web-2")


async def test_no_bookmarks_unless_asked_for(api: Api) -> None:
    start = version(await api.list("services"))
    # A real server's first would come two seconds before the end.
    life_s = 3 if api.server is None else 1
    async with api.watch("services", resourceVersion=start, timeoutSeconds=life_s) as watch:
        assert [event async for event in watch.events()] == []


async def test_an_idle_watch_sleeps(
    api: Api, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    since = server.store.since

    def counted(resource: Resource, revision: int) -> list[Change]:
        looks.append(revision)
        return since(resource, revision)

    monkeypatch.setattr(server.store, "since", counted)
    start = version(await api.list("services"))
    async with api.watch("services", resourceVersion=start, timeoutSeconds=1) as watch:
        assert [event async for event in watch.events()] == []
    assert len(looks) <= 2


async def test_objects_enter_and_leave_a_selection(api: Api) -> None:
    start = version(await api.list("services"))
    async with api.watch("services", resourceVersion=start, labelSelector="app=web") as watch:
        plain = await api.create("services", service("a"))

        def with_labels(**labels: str) -> dict[str, object]:
            metadata = {"name": "a", "namespace": api.namespace, "labels": labels}
            return {"metadata": metadata, "spec": plain["spec"]}

        await api.put("services", with_labels(app="web"))
        await api.put("services", with_labels(app="web", more="yes"))
        out = await api.put("services", with_labels(app="dns"))
        await api.delete("services", "a")
        await api.create("services", service("b", app="web"))
        events = [await watch.next() for _ in range(4)]
    told = [(event["type"], event["object"]["metadata"]["name"]) for event in events]
    assert told == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"), ("ADDED", "b")]
    # The last state that was selected, with the version of the change.
    assert events[2]["object"]["metadata"]["labels"] == {"app": "web", "more": "yes"}
    assert version(events[2]["object"]) == version(out)


async def test_one_object_can_be_watched_by_its_name(api: Api) -> None:
    await api.create("services", service("a"))
    await api.create("services", service("b"))
    async with api.watch("services", fieldSelector="metadata.name=b") as watch:
        await api.delete("services", "a")
        await api.delete("services", "b")
        events = [await watch.next() for _ in range(2)]
    assert [event["type"] for event in events] == ["ADDED", "DELETED"]
    assert {event["object"]["metadata"]["name"] for event in events} == {"b"}


async def test_a_version_long_gone_is_expired(api: Api) -> None:
    """As an HTTP status or as an ERROR event: both are allowed."""
    found = await api.call(
        "GET", api.path("services"), watch=1, resourceVersion="1", timeoutSeconds=5
    )
    status = found.body["object"] if found.status == 200 else found.body
    if found.status == 200:
        assert found.body["type"] == "ERROR"
    assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired")


@pytest.mark.parametrize(
    "query",
    [
        {"resourceVersionMatch": "NotOlderThan", "resourceVersion": "1"},
        {"sendInitialEvents": "true"},
        {"sendInitialEvents": "true", "resourceVersionMatch": "Exact"},
        {"resourceVersion": "abc"},
        {"timeoutSeconds": "long"},
    ],
    ids=str,
)
async def test_a_bad_query_is_refused(api: Api, query: dict[str, str]) -> None:
    found = await api.call("GET", api.path("services"), watch=1, **{"timeoutSeconds": 1} | query)
    assert found.status in (400, 422)
    assert found.body["kind"] == "Status"


async def test_a_streamed_list_ends_with_a_bookmark(api: Api) -> None:
    for name in ("a", "b"):
        await api.create("services", service(name))
    asked = {
        "watch": 1,
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": 20,
    }
    async with api.session.get(api.path("services").lstrip("/"), params=asked) as response:
        if response.status == 422 and api.server is None:
            pytest.skip("this server has no WatchList")
        assert response.status == 200
        seen = []
        async for line in response.content:
            event = json.loads(line)
            notes = event["object"]["metadata"].get("annotations", {})
            if notes.get("k8s.io/initial-events-end") == "true":
                assert event["type"] == "BOOKMARK"
                break
            seen.append((event["type"], event["object"]["metadata"]["name"]))
        end = version(event["object"])
        await api.create("services", service("c"))
        event = None
        async for line in response.content:
            event = json.loads(line)
            if event["type"] != "BOOKMARK":
                break
    assert sorted(seen) == [("ADDED", "a"), ("ADDED", "b")]
    assert event is not None
    assert event["object"]["metadata"]["name"] == "c"
    assert int(version(event["object"])) > int(end)


async def test_nothing_is_lost_or_told_twice_over_many_reconnections(api: Api) -> None:
    """A client that goes on from the last version it saw, each time after a few events."""
    start = version(await api.list("endpointslices"))

    async def write() -> None:
        for number in range(20):
            value = await api.create(
                "endpointslices", endpoint_slice(f"web-{number}", "10.244.1.1")
            )
            value["endpoints"] = [{"addresses": ["10.244.1.2"]}]
            value.pop("kind")
            await api.put("endpointslices", value)
            if number % 3 == 0:
                await api.delete("endpointslices", f"web-{number}")

    writing = asyncio.create_task(write())
    state: dict[str, str] = {}
    position, seen = start, []
    while len(seen) < 47:
        async with api.watch("endpointslices", resourceVersion=position) as watch:
            for _ in range(min(5, 47 - len(seen))):
                event = await watch.next()
                position = version(event["object"])
                name = event["object"]["metadata"]["name"]
                seen.append(int(position))
                if event["type"] == "DELETED":
                    del state[name]
                else:
                    assert (event["type"] == "ADDED") == (name not in state)
                    state[name] = position
    await writing
    assert seen == sorted(set(seen))
    found = await api.list("endpointslices")
    assert state == {item["metadata"]["name"]: version(item) for item in found["items"]}


async def test_a_watch_that_falls_behind_is_expired(api: Api, server: ApiServer) -> None:
    await api.create("services", service("a"))
    start = version(await api.list("services"))
    await api.create("services", service("b"))
    server.store.compact()
    async with api.watch("services", resourceVersion=start) as watch:
        event = await watch.next()
    assert event["type"] == "ERROR"
    assert event["object"]["code"] == 410
    # The newest version itself is still good.
    newest = version(await api.list("services"))
    async with api.watch("services", resourceVersion=newest) as watch:
        await api.create("services", service("c"))
        assert (await watch.next())["object"]["metadata"]["name"] == "c"


async def test_history_is_bounded(api: Api, server: ApiServer) -> None:
    start = version(await api.list("services"))
    for number in range(server.settings.history // 2 + 1):
        for label in ("x", "y"):
            server.apply(
                {"apiVersion": "v1", "kind": "Service", **service("a", n=f"{label}{number}")}
                | {
                    "metadata": {
                        "name": "a",
                        "namespace": api.namespace,
                        "labels": {"n": f"{label}{number}"},
                    }
                }
            )
    found = await api.call("GET", api.path("services"), watch=1, resourceVersion=start)
    assert found.body["object"]["code"] == 410


async def test_a_server_without_watch_list_refuses_it() -> None:
    async with (
        ApiServer(settings=Settings(has_watch_list=False)) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        query = {
            "watch": "1",
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
            "allowWatchBookmarks": "true",
        }
        async with session.get("/api/v1/services", params=query) as response:
            assert response.status == 422
            status = await response.json()
    assert status["reason"] == "Invalid"
    assert "WatchList" in status["message"]


async def test_expiry_can_be_an_http_status() -> None:
    async with (
        ApiServer(settings=Settings(expired_as_http=True)) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        query = {"watch": "1", "resourceVersion": "1"}
        async with session.get("/api/v1/services", params=query) as response:
            assert response.status == 410
            assert (await response.json())["reason"] == "Expired"


async def test_open_watches_are_counted(api: Api, server: ApiServer) -> None:
    async with api.watch("services") as _:
        assert server.watches["services"] == 1
    async with asyncio.timeout(10):
        while server.watches["services"]:  # noqa: ASYNC110 - the far end of a connection
            await asyncio.sleep(0.005)
    assert server.requests["watch", "services"] == 1


async def test_a_client_that_leaves_is_no_trouble(
    api: Api, server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection goes at the very moment when there is something to write."""
    async with api.watch("endpointslices", "") as watch:
        slice_ = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"}
        server.apply(slice_ | endpoint_slice("web-1", "10.244.1.10"))
        await watch.next()
        server.apply(slice_ | endpoint_slice("web-2", "10.244.1.11"))
        await server.stop()
    assert caplog.records == []
