"""Lists: versions, pages, selectors."""

import gzip

import pytest

from nfqproxy.testing import ApiServer
from tests.contract.api import Api, Object, endpoint_slice, names, service, version


async def test_a_list_has_a_version_and_its_items_have_no_kind(api: Api) -> None:
    empty = await api.list("endpointslices")
    assert (empty["kind"], empty["apiVersion"]) == ("EndpointSliceList", "discovery.k8s.io/v1")
    assert empty["items"] == []
    await api.create("endpointslices", endpoint_slice("web-1", "10.244.1.10"))
    found = await api.list("endpointslices")
    [item] = found["items"]
    assert "kind" not in item
    assert "apiVersion" not in item
    assert item["metadata"]["namespace"] == api.namespace
    assert int(version(empty)) < int(version(item)) <= int(version(found))


async def test_an_object_alone_has_its_kind(api: Api) -> None:
    await api.create("services", service("web"))
    found = await api.call("GET", api.path("services", "web"))
    assert found.status == 200
    assert (found.body["kind"], found.body["apiVersion"]) == ("Service", "v1")


async def test_what_is_not_there_is_told_by_a_status(api: Api) -> None:
    found = await api.call("GET", api.path("endpointslices", "none"))
    assert found.status == 404
    assert found.body["kind"] == "Status"
    assert (found.body["status"], found.body["reason"]) == ("Failure", "NotFound")
    assert found.body["code"] == 404
    assert found.body["details"] == {
        "name": "none",
        "group": "discovery.k8s.io",
        "kind": "endpointslices",
    }


async def test_pages_show_one_moment(api: Api) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await api.create("services", service(name))
    first = await api.list("services", limit=2)
    assert first["metadata"]["remainingItemCount"] == 3
    await api.delete("services", "c")
    await api.create("services", service("b2"))
    second = await api.list("services", limit=2, continue_=first["metadata"]["continue"])
    third = await api.list("services", limit=2, continue_=second["metadata"]["continue"])
    assert [names(page) for page in (first, second, third)] == [["a", "b"], ["c", "d"], ["e"]]
    assert version(first) == version(second) == version(third)
    assert "continue" not in third["metadata"]
    assert "remainingItemCount" not in third["metadata"]
    assert names(await api.list("services", limit=5)) == ["a", "b", "b2", "d", "e"]


async def test_pages_of_a_selection_do_not_tell_how_many_are_left(api: Api) -> None:
    for name in ("a", "b", "c"):
        await api.create("services", service(name, app="web"))
    page = await api.list("services", limit=1, labelSelector="app=web")
    assert names(page) == ["a"]
    assert "remainingItemCount" not in page["metadata"]
    rest = await api.list(
        "services", labelSelector="app=web", continue_=page["metadata"]["continue"]
    )
    assert names(rest) == ["b", "c"]


async def test_namespaces_are_ordered_as_their_paths(api: Api) -> None:
    """A namespace whose name begins like another's, and goes on with a character before the slash."""
    longer = f"{api.namespace}-x"
    made = await api.call("POST", "/api/v1/namespaces", {"metadata": {"name": longer}})
    assert made.status == 201
    try:
        for namespace in (api.namespace, longer):
            created = await api.call(
                "POST", api.path("services", namespace=namespace), service("a", at="order")
            )
            assert created.status == 201, created.body
        query = {"labelSelector": "at=order", "limit": 1}
        first = await api.list("services", "", **query)
        rest = await api.list("services", "", **query, continue_=first["metadata"]["continue"])
        found = [page["items"][0]["metadata"]["namespace"] for page in (first, rest)]
        assert found == [longer, api.namespace]
    finally:
        await api.call("DELETE", f"/api/v1/namespaces/{longer}")


async def test_a_continue_token_goes_with_no_version(api: Api) -> None:
    for name in ("a", "b"):
        await api.create("services", service(name))
    first = await api.list("services", limit=1)
    token = first["metadata"]["continue"]
    path = api.path("services")
    refused = await api.call("GET", path, limit=1, continue_=token, resourceVersion=version(first))
    assert refused.status == 400
    assert (await api.call("GET", path, continue_="no token")).status == 400


async def test_an_exact_version_shows_the_past(api: Api) -> None:
    made = await api.create("services", service("a", x="1"))
    before = version(made)
    await api.put("services", made | {"metadata": made["metadata"] | {"labels": {"x": "2"}}})
    await api.create("services", service("b"))
    await api.delete("services", "a")
    past = await api.list("services", resourceVersion=before, resourceVersionMatch="Exact")
    assert (names(past), version(past)) == (["a"], before)
    assert past["items"][0]["metadata"]["labels"] == {"x": "1"}
    # With a limit and no match it is meant exactly too.
    assert names(await api.list("services", resourceVersion=before, limit=5)) == ["a"]


@pytest.mark.parametrize("match", [{}, {"resourceVersionMatch": "NotOlderThan"}])
async def test_not_older_than_a_version_is_the_newest(api: Api, match: dict[str, str]) -> None:
    made = await api.create("services", service("a"))
    await api.create("services", service("b"))
    found = await api.list("services", resourceVersion=version(made), **match)
    assert "a" in names(found)
    assert int(version(found)) >= int(version(made))


async def test_version_zero_is_answered_from_whatever_is_there(api: Api) -> None:
    await api.create("services", service("a"))
    found = await api.list("services", resourceVersion="0")
    assert set(names(found)) <= {"a"}
    assert int(version(found)) > 0


@pytest.mark.parametrize(
    "query",
    [
        {"resourceVersionMatch": "Exact"},
        {"resourceVersion": "0", "resourceVersionMatch": "Exact"},
        {"resourceVersion": "5", "resourceVersionMatch": "Newest"},
        {"sendInitialEvents": "true"},
        {"resourceVersion": "abc"},
        {"limit": "many"},
        {"labelSelector": "a in b"},
        {"labelSelector": "=x"},
        {"fieldSelector": "spec.colour=red"},
        {"fieldSelector": "metadata.name"},
    ],
    ids=str,
)
async def test_a_bad_query_is_refused(api: Api, query: dict[str, str]) -> None:
    found = await api.call("GET", api.path("services"), **query)
    assert found.status in (400, 422)
    assert found.body["kind"] == "Status"
    assert found.body["message"]


async def test_a_version_that_has_not_come_is_waited_for_then_refused(api: Api) -> None:
    future = str(int(version(await api.list("services"))) + 100_000_000)
    found = await api.call("GET", api.path("services"), resourceVersion=future)
    assert found.status == 504
    assert found.body["reason"] == "Timeout"
    assert found.body["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("app=web", ["a", "b"]),
        ("app==web,tier=front", ["a"]),
        ("app!=web", ["c", "d"]),
        ("app in (web, dns)", ["a", "b", "c"]),
        ("app notin (web,dns)", ["d"]),
        ("tier", ["a", "b"]),
        ("!tier", ["c", "d"]),
        ("!example.com/skip,app", ["a", "c"]),
        ("size>5", ["b"]),
        ("", ["a", "b", "c", "d"]),
    ],
)
async def test_label_selectors(api: Api, wanted: str, expected: list[str]) -> None:
    labels = {
        "a": {"app": "web", "tier": "front"},
        "b": {"app": "web", "tier": "back", "size": "10", "example.com/skip": "true"},
        "c": {"app": "dns", "size": "5"},
        "d": {},
    }
    for name, given in labels.items():
        await api.create("services", service(name, **given))
    assert names(await api.list("services", labelSelector=wanted)) == expected


async def test_field_selectors(api: Api) -> None:
    for name in ("a", "b", "c"):
        await api.create("services", service(name))
    assert names(await api.list("services", fieldSelector="metadata.name=b")) == ["b"]
    assert names(await api.list("services", fieldSelector="metadata.name!=b")) == ["a", "c"]
    here = f"metadata.namespace={api.namespace}"
    assert names(await api.list("services", "", fieldSelector=here)) == ["a", "b", "c"]
    none = await api.list("services", fieldSelector="metadata.name=a,metadata.namespace=other")
    assert names(none) == []


async def test_a_large_list_is_compressed_for_who_can_read_it(api: Api) -> None:
    addresses = [f"10.244.{i // 250}.{i % 250 + 1}" for i in range(1000)]
    for number in range(6):
        await api.create("endpointslices", endpoint_slice(f"web-{number}", *addresses))
    path = api.path("endpointslices").lstrip("/")
    async with api.session.get(path, headers={"Accept-Encoding": "gzip"}) as zipped:
        assert zipped.headers["Content-Encoding"] == "gzip"
        assert len((await zipped.json())["items"]) == 6
    async with api.session.get(path, headers={"Accept-Encoding": "identity"}) as plain:
        assert "Content-Encoding" not in plain.headers
        body = await plain.read()
    assert len(gzip.compress(body)) < len(body)


async def test_no_answer_in_a_format_that_nobody_speaks(api: Api) -> None:
    found = await api.call("GET", api.path("services"), headers={"Accept": "text/html"})
    assert found.status == 406


async def test_an_expired_token_lets_the_rest_be_read_without_consistency(
    api: Api, server: ApiServer
) -> None:
    for name in ("a", "b", "d"):
        await api.create("services", service(name))
    first = await api.list("services", limit=1)
    await api.create("services", service("c"))
    server.store.compact()
    path, token = api.path("services"), first["metadata"]["continue"]
    refused = await api.call("GET", path, limit=1, continue_=token)
    assert (refused.status, refused.body["reason"]) == (410, "Expired")
    rest = await api.list("services", continue_=refused.body["metadata"]["continue"])
    assert names(rest) == ["b", "c", "d"]
    assert int(version(rest)) > int(version(first))


async def test_an_exact_version_that_is_compacted_is_gone(api: Api, server: ApiServer) -> None:
    await api.create("services", service("a"))
    before = version(await api.list("services"))
    await api.create("services", service("b"))
    server.store.compact()
    found = await api.call(
        "GET", api.path("services"), resourceVersion=before, resourceVersionMatch="Exact"
    )
    assert (found.status, found.body["reason"]) == (410, "Expired")


async def test_a_quarter_of_a_million_endpoints_in_one_list(api: Api, server: ApiServer) -> None:
    """As many as the largest clusters have; each address is there once, in one answer and in pages."""
    expected = set()
    for number in range(2500):
        addresses = [f"10.{number // 256}.{number % 256}.{last}" for last in range(100)]
        expected.update(addresses)
        value = endpoint_slice(f"web-{number}", *addresses)
        value["metadata"]["namespace"] = api.namespace
        server.apply({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **value})

    def addresses_of(found: Object) -> set[str]:
        return {
            endpoint["addresses"][0] for item in found["items"] for endpoint in item["endpoints"]
        }

    assert addresses_of(await api.list("endpointslices", "")) == expected
    seen: set[str] = set()
    page: Object = {"metadata": {"continue": ""}}
    while "continue" in page["metadata"]:
        page = await api.list("endpointslices", limit=500, continue_=page["metadata"]["continue"])
        assert not seen & addresses_of(page)
        seen |= addresses_of(page)
    assert seen == expected
