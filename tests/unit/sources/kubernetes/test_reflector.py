"""What no server is meant to do, and a follower must live through: a stream that is scripted line by line."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nfqproxy.control.objects import KubernetesObject, ObjectKey
from nfqproxy.sources.fields import Context
from nfqproxy.sources.kubernetes.client import ApiServerError
from nfqproxy.sources.kubernetes.decoding import Identity
from nfqproxy.sources.kubernetes.reflector import Pace, Reflector, Resource

RESOURCE = Resource(kind="Service", paths=("/api/v1/services",), plural="services")
PACE = Pace(first_delay_s=0.001, longest_delay_s=0.002, short_watch_s=0.001)


def service(name: str, version: int, ip: int) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "default", "resourceVersion": str(version)},
        "spec": {"clusterIP": f"10.96.0.{ip}", "ports": [{"port": 80}]},
    }


class Server:
    """Answers list and watch from a script, then keeps the last watch open."""

    def __init__(self, lists: list[Any], watches: list[list[Any]]) -> None:
        self._lists = lists
        self._watches = watches
        self.asked: list[tuple[str, str]] = []
        """What was asked for, and from which version."""
        self.is_through = asyncio.Event()

    async def get(self, _path: str, query: dict[str, str], _what: str) -> bytes:
        self.asked.append(("list", query.get("resourceVersion", "")))
        answer = self._lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer).encode()

    @asynccontextmanager
    async def watch(
        self, _path: str, query: dict[str, str], _what: str
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        self.asked.append(("watch", query["resourceVersion"]))
        yield self._lines()

    async def _lines(self) -> AsyncGenerator[bytes, None]:
        if not self._watches:
            self.is_through.set()
            await asyncio.Event().wait()
        for each in self._watches.pop(0):
            if isinstance(each, Exception):
                raise each
            kind, value = each
            yield json.dumps({"type": kind, "object": value}).encode()


class Sink:
    def __init__(self) -> None:
        self.ips: dict[str, str] = {}
        self.faults: list[tuple[str, tuple[str, ...]]] = []
        self.gone: list[str] = []

    def changed(self, upserts: list[KubernetesObject], removes: list[ObjectKey]) -> None:
        for value in upserts:
            self.ips[value.name] = value.cluster_ips[0]  # type: ignore[union-attr]
        for key in removes:
            self.gone.append(key[2])
            del self.ips[key[2]]

    def identified(self, *_: Any) -> None: ...

    def synced(self, *_: Any) -> None: ...

    def trouble(self, *_: Any) -> None: ...

    def faulty(self, _resource: Resource, identity: Identity, faults: tuple[str, ...]) -> None:
        self.faults.append((identity.name, faults))


def follow(lists: list[Any], watches: list[list[Any]], pace: Pace = PACE) -> tuple[Server, Sink]:
    """What has come of a script once it is through."""

    async def work() -> tuple[Server, Sink]:
        server, sink = Server(lists, watches), Sink()
        reflector = Reflector(
            RESOURCE,
            server,  # type: ignore[arg-type]
            sink,
            pace=pace,
            chance=random.Random(1),
            context=Context("API server", once=set()),
        )
        task = asyncio.ensure_future(reflector.run())
        try:
            async with asyncio.timeout(10):
                await server.is_through.wait()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return server, sink

    return asyncio.run(work())


def page(version: int, *items: Any) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


def test_a_stream_that_runs_backwards_is_not_believed() -> None:
    server, sink = follow(
        [page(10, service("a", 5, 1)), page(13, service("a", 13, 3))],
        [[("MODIFIED", service("a", 12, 2)), ("MODIFIED", service("a", 11, 9))]],
    )
    assert server.asked == [("list", "0"), ("watch", "10"), ("list", ""), ("watch", "13")]
    assert sink.ips == {"a": "10.96.0.3"}


def test_what_comes_twice_is_as_if_it_came_once() -> None:
    once = ("MODIFIED", service("a", 11, 2))
    gone = ("DELETED", service("b", 12, 1))
    server, sink = follow(
        [page(10, service("a", 5, 1), service("b", 6, 1), service("b", 6, 1))],
        [[once, once, gone, gone]],
    )
    assert server.asked == [("list", "0"), ("watch", "10"), ("watch", "12")]
    assert sink.ips == {"a": "10.96.0.2"}
    assert sink.gone == ["b"]


def test_versions_are_numbers_and_if_not_then_taken_as_they_are() -> None:
    server, _ = follow(
        [page(9, service("a", 5, 1))],
        [[("MODIFIED", service("a", 10, 2)), ("BOOKMARK", service("", "x/1", 1))]],  # type: ignore[arg-type]
    )
    assert server.asked[-1] == ("watch", "x/1")


def test_an_object_without_a_name_takes_nothing_along() -> None:
    """Which of those that are known it was cannot be told, so none of them goes."""
    nameless = {"metadata": {"name": None}}
    _, sink = follow(
        [page(10, service("a", 5, 1)), page(20, nameless, service("b", 6, 2))],
        [[("ERROR", {"code": 410, "message": "too old"})]],
    )
    assert sink.ips == {"a": "10.96.0.1", "b": "10.96.0.2"}
    assert [name for name, faults in sink.faults if faults] == [""]


def test_an_object_that_is_gone_has_no_fault() -> None:
    bad = service("a", 11, 999)
    _, sink = follow(
        [page(10, service("a", 5, 1))],
        [[("MODIFIED", bad), ("DELETED", service("a", 12, 1))]],
    )
    assert sink.ips == {}
    assert [bool(faults) for _, faults in sink.faults] == [True, False]


def test_a_kind_of_event_that_is_not_known_is_passed_over() -> None:
    _, sink = follow(
        [page(10, service("a", 5, 1))],
        [[("RENAMED", service("a", 11, 2)), ("MODIFIED", service("a", 12, 3))]],
    )
    assert sink.ips == {"a": "10.96.0.3"}


def test_the_pause_grows_with_jitter_to_its_limit_and_keeps_to_what_the_server_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def wait(_event: asyncio.Event, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(Reflector, "_wait", staticmethod(wait))
    away = ApiServerError("away")
    busy = ApiServerError("busy", status=429, retry_after_s=17.0)
    much = ApiServerError("much", status=429, retry_after_s=9999.0)
    tick = ("BOOKMARK", service("", 11, 1))
    follow(
        [*[away] * 8, busy, much, page(10), page(10), page(11)],
        [[tick, away], [tick], [("ERROR", {"code": 410})], [("ERROR", {"code": 410})]],
        pace=Pace(first_delay_s=0.5, longest_delay_s=30.0),
    )
    whole = [0.5 * 2**number for number in range(6)] + [30.0] * 2
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, whole, strict=False))
    assert len(set(pauses[6:8])) == 2, "jitter"
    assert pauses[8] >= 17.0
    assert pauses[9] == 30.0
    # A watch that told something makes the next failure the first again; the first 410 needs no pause.
    assert 0.25 <= pauses[10] <= 0.5
    assert len(pauses) == 12
    assert 0.25 <= pauses[11] <= 0.5


def test_a_watch_that_is_refused_again_and_again_is_given_up_for_a_list() -> None:
    broken = ApiServerError("broken", status=500)
    busy = ApiServerError("busy", status=429)
    server, _ = follow([page(10), page(11)], [[busy]] * 9 + [[broken]] * 4)
    assert server.asked == [("list", "0"), *[("watch", "10")] * 13, ("list", ""), ("watch", "11")]
