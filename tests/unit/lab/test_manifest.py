"""The lab's manifests, read by the proxy's own source."""

from pathlib import Path

from nfqproxy.lab.manifest import manifest
from nfqproxy.lab.topology import Topology, TopologySpec
from nfqproxy.sources.file import FileSource


def test_the_source_accepts_it(tmp_path: Path) -> None:
    planned = Topology(TopologySpec())
    file = tmp_path / "lab.yaml"
    file.write_text(manifest(planned.node, planned.pods, (5, 3, 2)))
    objects = FileSource([file]).load()
    assert sorted(service.name for service in objects.services) == ["dns", "web"]
    assert [node.name for node in objects.nodes] == ["n1"]
    addresses = [end.address for one in objects.endpoint_slices for end in one.endpoints]
    # Each pod serves both Services.
    assert sorted(addresses) == sorted(
        [pod.address4 for pod in planned.pods] * 2 + [pod.address6 for pod in planned.pods] * 2
    )
