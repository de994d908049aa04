"""The API server's JSON becomes what the same manifest becomes, without what nobody reads."""

import json
from typing import Any

import msgspec
import pytest

from nfqproxy.control.objects import EndpointSlice, KubernetesObject, Node, Service
from nfqproxy.sources.decode import KINDS, READERS
from nfqproxy.sources.decode import decode as decode_document
from nfqproxy.sources.fields import Context
from nfqproxy.sources.kubernetes.decoding import Bad, _lean, decode, identity

CONTEXT = Context("API server", once=set())
METADATA = {
    "name": "web",
    "namespace": "shop",
    "uid": "u-1",
    "resourceVersion": "17",
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "labels": {"app": "web"},
    "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}],
    "ofTheFuture": [1, {"a": None}],
}
SERVICE: dict[str, Any] = {
    "metadata": METADATA,
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00:10:96::1"],
        "ports": [
            {"name": "http", "port": 80, "targetPort": "http", "nodePort": 30080},
            {"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"},
        ],
        "externalIPs": ["203.0.113.9"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32000,
        "ofTheFuture": {"x": 1},
    },
    "status": {
        "loadBalancer": {"ingress": [{"ip": "198.51.100.7", "ipMode": "VIP"}]},
        "conditions": [{"type": "x"}],
    },
}
SLICE: dict[str, Any] = {
    "metadata": {
        **METADATA,
        "labels": {"kubernetes.io/service-name": "web"},
        "annotations": {"nfqproxy.io/weight": "3"},
    },
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    "endpoints": [
        {
            "addresses": ["10.244.1.1"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "n1",
            "zone": "z1",
            "targetRef": {"kind": "Pod", "name": "web-1", "uid": "u-2"},
            "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]},
        },
        {"addresses": ["10.244.1.2"], "conditions": {"ready": None}},
    ],
}
NODE: dict[str, Any] = {
    "metadata": {
        "name": "n1",
        "labels": {"topology.kubernetes.io/zone": "z1"},
        "deletionTimestamp": "2026-01-02T00:00:00Z",
    },
    "spec": {"podCIDR": "10.244.1.0/24", "taints": [{"key": "k", "effect": "NoSchedule"}]},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
        "images": [{"names": ["a", "b"], "sizeBytes": 1}],
    },
}
CIDR: dict[str, Any] = {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def nothing(_namespace: str, _name: str) -> KubernetesObject | None:
    return None


@pytest.mark.parametrize(
    ("kind", "value"),
    [("Service", SERVICE), ("EndpointSlice", SLICE), ("Node", NODE), ("ServiceCIDR", CIDR)],
)
def test_it_is_what_the_manifest_is(kind: str, value: dict[str, Any]) -> None:
    group, version = KINDS[kind]
    document = {"kind": kind, "apiVersion": f"{group}/{version}".lstrip("/"), **value}
    expected = decode_document(document, Context("API server", strict=False))
    found = decode(kind, raw(value), nothing, CONTEXT).value
    assert found is not None
    if kind == "Service":
        assert getattr(found, "labels", None) == {}, "labels that nobody looks at are not kept"
        assert isinstance(expected, Service)
        expected = msgspec.structs.replace(expected, labels={})
    if isinstance(expected, EndpointSlice):
        expected = msgspec.structs.replace(expected, labels={})
    if isinstance(expected, Node):
        assert expected.labels
    assert found == expected


def test_who_it_is() -> None:
    assert decode("Service", raw(SERVICE), nothing, CONTEXT).identity == (
        "shop",
        "web",
        "u-1",
        "17",
    )
    assert identity(raw(SERVICE)) == ("shop", "web", "u-1", "17")
    assert identity(raw({"metadata": {"name": 7}, "spec": 3})) == ("", "", "", "")
    for data in (b"", b"{", b"[]", b'{"metadata": 1}'):
        assert identity(data) == ("", "", "", "")


@pytest.mark.parametrize("shape", [reader.shape for reader in READERS.values()])
def test_what_nobody_reads_is_never_made(shape: Any) -> None:
    data = raw({"metadata": METADATA, "status": {"images": [1]}, "spec": {"topologyKeys": ["a"]}})
    found = msgspec.json.decode(data, type=_lean(shape))
    assert not hasattr(found.metadata, "managed_fields")
    assert not hasattr(getattr(found, "status", None), "images")


@pytest.mark.parametrize(
    ("kind", "value", "path"),
    [
        ("Service", {**SERVICE, "spec": {"ports": [{"port": "80"}]}}, "spec.ports[0].port"),
        ("Service", {**SERVICE, "spec": {"clusterIP": "10.96.0.999"}}, "spec.clusterIP"),
        ("EndpointSlice", {**SLICE, "addressType": None}, "addressType"),
        ("EndpointSlice", {**SLICE, "endpoints": [{}]}, "endpoints[0].addresses"),
        ("Node", {"metadata": {"name": 7}}, "metadata.name"),
        ("ServiceCIDR", {"metadata": {"name": "x"}}, "spec.cidrs"),
    ],
)
def test_what_cannot_be_read_names_the_field(kind: str, value: Any, path: str) -> None:
    with pytest.raises(Bad) as caught:
        decode(kind, raw(value), nothing, CONTEXT)
    assert caught.value.error.path == path
    if kind in ("Service", "EndpointSlice"):
        assert caught.value.identity[:2] == ("shop", "web")


def test_every_truncation_is_refused_or_the_whole() -> None:
    data = raw(SLICE)
    whole = decode("EndpointSlice", data, nothing, CONTEXT).value
    for length in range(len(data)):
        try:
            assert decode("EndpointSlice", data[:length], nothing, CONTEXT).value == whole
        except Bad:
            continue


def annotated(**annotations: str) -> bytes:
    names = {f"nfqproxy.io/{key.replace('_', '-')}": text for key, text in annotations.items()}
    return raw({**SERVICE, "metadata": {**METADATA, "annotations": {"other": "x", **names}}})


def test_bad_annotations_take_their_last_good_values() -> None:
    good = decode("Service", annotated(weights='{"n1": 5}', steer="true"), nothing, CONTEXT).value
    assert isinstance(good, Service)
    bad = annotated(weights="{", steer="yes", balancer_options="[]", weigths="{}")
    found = decode("Service", bad, lambda *_: good, CONTEXT)
    assert isinstance(found.value, Service)
    assert found.value.weights == {"n1": 5}
    assert found.value.annotations == good.annotations
    assert sorted(error.path for error in found.faults) == [
        "metadata.annotations[nfqproxy.io/balancer-options]",
        "metadata.annotations[nfqproxy.io/steer]",
        "metadata.annotations[nfqproxy.io/weights]",
        "metadata.annotations[nfqproxy.io/weigths]",
    ]
    assert any('did you mean "nfqproxy.io/weights"?' in str(error) for error in found.faults)
    # A slice keeps its weight so, too.
    weighty = decode("EndpointSlice", raw(SLICE), nothing, CONTEXT).value
    metadata = {**SLICE["metadata"], "annotations": {"nfqproxy.io/weight": "heavy"}}
    found = decode(
        "EndpointSlice", raw({**SLICE, "metadata": metadata}), lambda *_: weighty, CONTEXT
    )
    assert isinstance(found.value, EndpointSlice)
    assert found.value.weight == 3
    assert len(found.faults) == 1
    # Without a last good value there is none.
    fresh = decode("Service", bad, nothing, CONTEXT).value
    assert isinstance(fresh, Service)
    assert fresh.weights == fresh.annotations == {}


def test_what_is_odd_is_told_once(caplog: Any) -> None:
    context = Context("API server", once=set())
    value = {**SERVICE, "spec": {**SERVICE["spec"], "loadBalancerSourceRanges": ["nonsense"]}}
    for _ in range(3):
        decode("Service", raw(value), nothing, context)
    assert caplog.text.count("nonsense") == 1
