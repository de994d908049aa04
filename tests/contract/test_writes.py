"""Writes: creation, conflicts, merges, deletions, and what the server adds of its own."""

import asyncio
from typing import Any

import pytest

from tests.contract.api import Api, endpoint_slice, names, service, version

MERGE = {"Content-Type": "application/merge-patch+json"}
STRATEGIC = {"Content-Type": "application/strategic-merge-patch+json"}


async def patch(
    api: Api, plural: str, name: str, value: Any, headers: dict[str, str] = MERGE
) -> Any:
    return await api.call("PATCH", api.path(plural, name), value, headers=headers)


async def test_a_new_object_gets_identity_time_and_version(api: Api) -> None:
    made = await api.create("services", service("a"))
    metadata = made["metadata"]
    assert metadata["namespace"] == api.namespace
    assert len(metadata["uid"]) == 36
    assert metadata["creationTimestamp"].endswith("Z")
    assert metadata["resourceVersion"]
    other = await api.create("services", service("b"))
    assert other["metadata"]["uid"] != metadata["uid"]
    assert int(version(other)) > int(version(made))


async def test_an_object_is_made_once(api: Api) -> None:
    await api.create("services", service("a"))
    again = await api.call("POST", api.path("services"), service("a"))
    assert (again.status, again.body["reason"]) == (409, "AlreadyExists")


async def test_a_name_can_be_generated(api: Api) -> None:
    value = endpoint_slice("", "10.244.1.10")
    value["metadata"] |= {"generateName": "web-"}
    del value["metadata"]["name"]
    made = [await api.create("endpointslices", value) for _ in range(2)]
    found = {item["metadata"]["name"] for item in made}
    assert len(found) == 2
    assert all(name.startswith("web-") and len(name) == 9 for name in found)


def without_name() -> dict[str, Any]:
    return {"metadata": {}, "spec": {"ports": [{"port": 80}]}}


def elsewhere() -> dict[str, Any]:
    return {"metadata": {"name": "a", "namespace": "elsewhere"}, "spec": {"ports": [{"port": 80}]}}


@pytest.mark.parametrize(
    ("plural", "value", "status"),
    [
        ("services", without_name(), 422),
        ("services", elsewhere(), 400),
        ("services", service("Not_A_Name"), 422),
        ("services", service("a") | {"kind": "Node"}, 400),
        ("services", {"metadata": {"name": "a"}, "spec": {"ports": []}}, 422),
        ("services", {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 70000}]}}, 422),
        ("services", {"metadata": {"name": "a"}, "spec": {"ports": {"port": 80}}}, 400),
        (
            "services",
            {"metadata": {"name": "a", "labels": {"x": 1}}, "spec": {"ports": [{"port": 80}]}},
            400,
        ),
        ("services", service("a", x="no label value"), 422),
        ("endpointslices", endpoint_slice("a", "10.244.1.1") | {"addressType": "IPX"}, 422),
        ("endpointslices", endpoint_slice("a") | {"endpoints": [{"addresses": []}]}, 422),
        ("events", {"metadata": {"name": "a"}, "involvedObject": {"namespace": "elsewhere"}}, 422),
    ],
    ids=str,
)
async def test_what_is_wrong_is_refused(
    api: Api, plural: str, value: dict[str, Any], status: int
) -> None:
    found = await api.call("POST", api.path(plural), value)
    assert found.status == status, found.body
    assert found.body["kind"] == "Status"
    assert found.body["reason"] == ("Invalid" if status == 422 else "BadRequest")
    assert names(await api.list(plural)) == []


async def test_a_namespace_must_be_there(api: Api) -> None:
    found = await api.call(
        "POST", api.path("services", namespace=f"{api.namespace}-no"), service("a")
    )
    assert found.status == 404
    assert found.body["details"]["kind"] == "namespaces"


async def test_a_body_must_be_json(api: Api) -> None:
    broken = await api.call(
        "POST",
        api.path("services"),
        data=b'{"metadata":',
        headers={"Content-Type": "application/json"},
    )
    assert broken.status == 400
    text = await api.call(
        "POST", api.path("services"), data=b"hello", headers={"Content-Type": "text/plain"}
    )
    assert text.status == 415


async def test_an_update_of_an_old_version_is_a_conflict(api: Api) -> None:
    first = await api.create("services", service("a"))
    second = await api.put(
        "services", first | {"metadata": first["metadata"] | {"labels": {"x": "1"}}}
    )
    assert int(version(second)) > int(version(first))
    stale = first | {"metadata": first["metadata"] | {"labels": {"x": "2"}}}
    refused = await api.call("PUT", api.path("services", "a"), stale)
    assert (refused.status, refused.body["reason"]) == (409, "Conflict")
    stale["metadata"].pop("resourceVersion")
    third = await api.put("services", stale)
    assert third["metadata"]["labels"] == {"x": "2"}
    assert third["metadata"]["uid"] == first["metadata"]["uid"]
    assert third["metadata"]["creationTimestamp"] == first["metadata"]["creationTimestamp"]


async def test_an_update_that_changes_nothing_writes_nothing(api: Api) -> None:
    first = await api.create("services", service("a"))
    again = await api.put("services", first)
    assert version(again) == version(first)


async def test_an_update_needs_the_object_and_its_name(api: Api) -> None:
    value = endpoint_slice("a", "10.244.1.1")
    assert (await api.call("PUT", api.path("endpointslices", "a"), value)).status == 404
    await api.create("endpointslices", value)
    assert (await api.call("PUT", api.path("endpointslices", "b"), value)).status == 400


async def test_generation_counts_what_is_wanted(api: Api) -> None:
    value = await api.create("endpointslices", endpoint_slice("a", "10.244.1.1"))
    assert value["metadata"]["generation"] == 1
    value["metadata"]["annotations"] = {"x": "y"}
    value = await api.put("endpointslices", value)
    assert value["metadata"]["generation"] == 1
    value["endpoints"] = [{"addresses": ["10.244.1.2"]}]
    value = await api.put("endpointslices", value)
    assert value["metadata"]["generation"] == 2


async def test_the_address_type_of_a_slice_never_changes(api: Api) -> None:
    value = await api.create("endpointslices", endpoint_slice("a", "10.244.1.1"))
    value |= {"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::1"]}]}
    refused = await api.call("PUT", api.path("endpointslices", "a"), value)
    assert refused.status == 422
    assert "addressType" in refused.body["message"]


async def test_a_service_gets_a_cluster_ip_and_keeps_it(api: Api) -> None:
    made = await api.create("services", service("a"))
    address = made["spec"]["clusterIP"]
    assert made["spec"]["clusterIPs"][0] == address
    assert made["spec"]["type"] == "ClusterIP"
    assert made["spec"]["ports"][0]["protocol"] == "TCP"
    other = await api.create("services", service("b"))
    assert other["spec"]["clusterIP"] != address
    # An update that does not name it keeps it, another one is refused.
    changed = await api.put("services", service("a", x="y"))
    assert changed["spec"]["clusterIP"] == address
    changed["spec"] |= {
        "clusterIP": other["spec"]["clusterIP"],
        "clusterIPs": other["spec"]["clusterIPs"],
    }
    refused = await api.call("PUT", api.path("services", "a"), changed)
    assert refused.status == 422


async def test_a_node_port_is_handed_out(api: Api) -> None:
    value = service("a")
    value["spec"]["type"] = "NodePort"
    made = await api.create("services", value)
    port = made["spec"]["ports"][0]["nodePort"]
    assert 0 < port < 65536
    assert made["spec"]["externalTrafficPolicy"] == "Cluster"
    made["metadata"]["labels"] = {"x": "y"}
    assert (await api.put("services", made))["spec"]["ports"][0]["nodePort"] == port


async def test_status_is_written_apart(api: Api) -> None:
    value = service("a")
    value["spec"]["type"] = "LoadBalancer"
    made = await api.create(
        "services", value | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}}
    )
    assert made["status"]["loadBalancer"] == {}
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}}
    answer = await api.call(
        "PATCH", api.path("services", "a") + "/status", {"status": status}, headers=MERGE
    )
    assert answer.status == 200, answer.body
    assert answer.body["status"]["loadBalancer"]["ingress"][0]["ip"] == "198.51.100.7"
    changed = await api.put("services", service("a") | {"spec": value["spec"]})
    assert changed["status"]["loadBalancer"]["ingress"][0]["ip"] == "198.51.100.7"


async def test_a_merge_patch(api: Api) -> None:
    value = service("a", x="1", y="2")
    await api.create("services", value)
    found = await patch(api, "services", "a", {"metadata": {"labels": {"x": None, "z": "3"}}})
    assert found.status == 200
    assert found.body["metadata"]["labels"] == {"y": "2", "z": "3"}
    assert found.body["spec"]["ports"][0]["port"] == 80
    again = await patch(api, "services", "a", {"metadata": {"labels": {"z": "3"}}})
    assert version(again.body) == version(found.body)
    strategic = await patch(api, "services", "a", {"metadata": {"labels": {"w": "4"}}}, STRATEGIC)
    assert strategic.body["metadata"]["labels"] == {"y": "2", "z": "3", "w": "4"}


async def test_a_strategic_merge_patch_merges_lists_by_their_key(api: Api) -> None:
    value = service("a")
    value["spec"]["ports"] = [
        {"name": "http", "port": 80, "targetPort": 8080},
        {"name": "dns", "port": 53, "protocol": "UDP"},
    ]
    made = await api.create("services", value)
    port = {"name": "https", "port": 443}
    order = {"$setElementOrder/ports": [{"port": 443}, {"port": 80}, {"port": 53}]}
    changed = {"ports": [port, {"port": 80, "targetPort": 8081}]}
    found = await patch(api, "services", "a", {"spec": changed | order}, STRATEGIC)
    assert found.status == 200, found.body
    ports = {item["port"]: item for item in found.body["spec"]["ports"]}
    assert list(ports) == [443, 80, 53]
    assert (ports[80]["name"], ports[80]["targetPort"]) == ("http", 8081)
    assert ports[53]["protocol"] == "UDP"
    gone = {"ports": [{"port": 53, "$patch": "delete"}]}
    found = await patch(api, "services", "a", {"spec": gone}, STRATEGIC)
    assert [item["port"] for item in found.body["spec"]["ports"]] == [443, 80]
    assert found.body["spec"]["clusterIP"] == made["spec"]["clusterIP"]
    whole = {"ports": [{"$patch": "replace"}, {"name": "http", "port": 81}]}
    found = await patch(api, "services", "a", {"spec": whole}, STRATEGIC)
    assert [item["port"] for item in found.body["spec"]["ports"]] == [81]
    # By RFC 7396 a list is replaced whole.
    found = await patch(api, "services", "a", {"spec": {"ports": [{"port": 82}]}})
    assert [item["port"] for item in found.body["spec"]["ports"]] == [82]


async def test_a_strategic_merge_patch_replaces_atomic_lists(api: Api) -> None:
    await api.create("endpointslices", endpoint_slice("web-1", "10.244.1.10", "10.244.1.11"))
    endpoints = {"endpoints": [{"addresses": ["10.244.1.12"]}]}
    found = await patch(api, "endpointslices", "web-1", endpoints, STRATEGIC)
    assert [item["addresses"] for item in found.body["endpoints"]] == [["10.244.1.12"]]


async def test_a_strategic_merge_patch_has_directives_for_objects(api: Api) -> None:
    await api.create("services", service("a", x="1", y="2"))
    labels = {"metadata": {"labels": {"$patch": "replace", "z": "3"}}}
    found = await patch(api, "services", "a", labels, STRATEGIC)
    assert found.body["metadata"]["labels"] == {"z": "3"}
    retained = {"metadata": {"labels": {"$retainKeys": ["w"], "w": "4"}}}
    found = await patch(api, "services", "a", retained, STRATEGIC)
    assert found.body["metadata"]["labels"] == {"w": "4"}
    nameless = {"spec": {"ports": [{"targetPort": 8080}]}}
    assert (await patch(api, "services", "a", nameless, STRATEGIC)).status in (400, 422, 500)


async def test_a_patch_of_an_old_version_is_a_conflict(api: Api) -> None:
    first = await api.create("services", service("a"))
    await patch(api, "services", "a", {"metadata": {"labels": {"x": "1"}}})
    stale = {"metadata": {"resourceVersion": version(first), "labels": {"x": "2"}}}
    refused = await patch(api, "services", "a", stale)
    assert (refused.status, refused.body["reason"]) == (409, "Conflict")
    assert (await patch(api, "services", "none", {})).status == 404


async def test_an_unknown_kind_of_patch_is_refused(api: Api) -> None:
    await api.create("services", service("a"))
    found = await patch(api, "services", "a", {}, {"Content-Type": "application/json"})
    assert found.status == 415


async def test_deletion_has_preconditions(api: Api) -> None:
    made = await api.create("services", service("a"))
    path = api.path("services", "a")
    wrong = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    assert (await api.call("DELETE", path, wrong)).status == 409
    right = {"preconditions": {"uid": made["metadata"]["uid"]}}
    assert (await api.call("DELETE", path, right)).status == 200
    assert (await api.call("GET", path)).status == 404
    assert (await api.call("DELETE", path)).status == 404


async def test_deletion_is_answered_as_clients_decode_it(api: Api) -> None:
    """Generated clients have a type for each answer: a Service for a Service, a Status for a slice."""
    await api.create("services", service("a"))
    gone = await api.call("DELETE", api.path("services", "a"))
    assert (gone.body["kind"], gone.body["metadata"]["name"]) == ("Service", "a")
    made = await api.create("endpointslices", endpoint_slice("web-1", "10.244.1.10"))
    gone = await api.call("DELETE", api.path("endpointslices", "web-1"))
    assert (gone.body["kind"], gone.body["status"]) == ("Status", "Success")
    assert gone.body["details"]["uid"] == made["metadata"]["uid"]


async def test_an_object_made_anew_is_another_one(api: Api) -> None:
    first = await api.create("services", service("a"))
    await api.delete("services", "a")
    second = await api.create("services", service("a"))
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    stale = first | {"metadata": first["metadata"] | {"labels": {"x": "y"}}}
    stale["metadata"].pop("resourceVersion")
    assert (await api.call("PUT", api.path("services", "a"), stale)).status == 409


async def test_an_event_is_made_and_counted_on(api: Api) -> None:
    """What an event recorder does: POST once, then PATCH the count of the same."""
    made = await api.create(
        "events",
        {
            "metadata": {"name": "a.17"},
            "involvedObject": {"kind": "Service", "namespace": api.namespace, "name": "a"},
            "reason": "BadAnnotation",
            "message": "one",
            "type": "Warning",
            "count": 1,
            "source": {"component": "nfqproxy"},
            "firstTimestamp": "2026-01-01T00:00:00Z",
            "lastTimestamp": "2026-01-01T00:00:00Z",
        },
    )
    assert made["count"] == 1
    counted = await patch(
        api, "events", "a.17", {"count": 2, "lastTimestamp": "2026-01-01T00:01:00Z"}, STRATEGIC
    )
    assert counted.status == 200, counted.body
    assert (counted.body["count"], counted.body["message"]) == (2, "one")
    about = "involvedObject.name=a,involvedObject.kind=Service,reason=BadAnnotation"
    assert names(await api.list("events", fieldSelector=about)) == ["a.17"]
    assert names(await api.list("events", fieldSelector="involvedObject.name=b")) == []


async def test_a_namespace_takes_along_what_is_in_it(api: Api) -> None:
    name = f"{api.namespace}-gone"
    await api.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    path = api.path("services", namespace=name)
    assert (await api.call("POST", path, service("a"))).status == 201
    assert (await api.call("DELETE", f"/api/v1/namespaces/{name}")).status == 200
    while (await api.call("GET", f"/api/v1/namespaces/{name}")).status != 404:  # noqa: ASYNC110
        await asyncio.sleep(0.2)  # a real server takes a while
    assert (await api.call("GET", path)).body["items"] == []


async def test_methods_and_paths_that_are_not(api: Api) -> None:
    assert (await api.call("GET", "/api/v1/nothing")).status == 404
    assert (await api.call("GET", "/apis/none.example.com/v1/things")).status in (403, 404)
    assert (await api.call("PUT", api.path("services"), service("a"))).status == 405
    assert (await api.call("POST", api.path("services", "a"), service("a"))).status == 405


async def test_discovery(api: Api) -> None:
    assert (await api.call("GET", "/version")).body["major"] == "1"
    assert (await api.call("GET", "/readyz")).body == "ok"
    core = (await api.call("GET", "/api/v1")).body
    kinds = {item["name"]: item["kind"] for item in core["resources"]}
    assert kinds["services"] == "Service"
    assert kinds["services/status"] == "Service"
    groups = {item["name"] for item in (await api.call("GET", "/apis")).body["groups"]}
    assert {"discovery.k8s.io", "networking.k8s.io"} <= groups
    slices = (await api.call("GET", "/apis/discovery.k8s.io/v1")).body["resources"]
    assert {item["name"] for item in slices} >= {"endpointslices"}
