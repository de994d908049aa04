"""Objects of a lab, read by the proxy's own source."""

from pathlib import Path

from nfqproxy.lab.objects import Endpoint, Port, Service, node_object, service_cidr, to_yaml
from nfqproxy.lab.topology import Topology, TopologySpec
from nfqproxy.sources.file import FileSource

BUILT = Topology(TopologySpec(pods=(2, 1)))


def test_a_service_of_every_kind(tmp_path: Path) -> None:
    near, _ = BUILT.pods_of("n1")
    (far,) = BUILT.pods_of("n2")
    web = Port(name="http", port=80, target=8080)
    plain = Service(
        name="plain",
        number=10,
        ports=(web,),
        endpoints=(Endpoint(pod=near), Endpoint(pod=far, ready=False, terminating=True)),
    )
    on_node = Service(
        name="on-node",
        number=11,
        ports=(Port(name="http", port=80, target=8080, node_port=30011),),
        endpoints=(),
        spec={"externalTrafficPolicy": "Local"},
    )
    balanced = Service(
        name="balanced", number=12, ports=(web,), endpoints=(), has_load_balancer=True
    )
    file = tmp_path / "objects.yaml"
    written = [node_object(node) for node in BUILT.nodes] + [service_cidr()]
    for service in (plain, on_node, balanced):
        written += service.objects()
    file.write_text(to_yaml(written))
    objects = FileSource([file]).load()
    assert [node.name for node in objects.nodes] == ["n1", "n2"]
    kinds = {
        item["metadata"]["name"]: item["spec"].get("type") for item in written if "spec" in item
    }
    assert kinds == {
        "kubernetes": None,
        "plain": "ClusterIP",
        "on-node": "NodePort",
        "balanced": "LoadBalancer",
    }
    # No endpoint, no slice.
    assert sorted(one.name for one in objects.endpoint_slices) == ["plain-ipv4", "plain-ipv6"]
    four = next(one for one in objects.endpoint_slices if one.name == "plain-ipv4")
    assert [(end.address, end.node, end.ready, end.terminating) for end in four.endpoints] == [
        ("10.244.1.11", "n1", True, False),
        ("10.244.2.11", "n2", False, True),
    ]
