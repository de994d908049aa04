"""Classes of sources: pod before node before elsewhere."""

from ipaddress import ip_address

import pytest

from nfqproxy.core import sources
from nfqproxy.core.sources import SourceClasses, SourceClassifier
from nfqproxy.model import ClientClass, PodDetector

CLASSIFIER_ARGUMENTS = (
    ("10.244.0.0/16", "fd00:10:244::/56"),
    [ip_address(text).packed for text in ("192.0.2.1", "10.244.1.1", "2001:db8:2::1")],
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.244.1.9", ClientClass.POD),
        ("10.244.255.255", ClientClass.POD),
        ("10.245.0.0", ClientClass.EXTERNAL),
        ("10.243.255.255", ClientClass.EXTERNAL),
        ("10.244.1.1", ClientClass.POD),  # the node's address on the pod bridge: pod comes first
        ("192.0.2.1", ClientClass.NODE),
        ("127.0.0.1", ClientClass.NODE),
        ("192.0.2.2", ClientClass.EXTERNAL),
        ("fd00:10:244:1::9", ClientClass.POD),
        ("fd00:10:245::1", ClientClass.EXTERNAL),
        ("2001:db8:2::1", ClientClass.NODE),
        ("::1", ClientClass.NODE),
        ("::2", ClientClass.EXTERNAL),
        ("7f00::1", ClientClass.EXTERNAL),
        ("::", ClientClass.EXTERNAL),
    ],
)
def test_classes(address: str, expected: ClientClass) -> None:
    assert SourceClassifier(*CLASSIFIER_ARGUMENTS)[ip_address(address).packed] is expected


def test_forged_sources_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_REMEMBERED", 100)
    classifier = SourceClassifier(*CLASSIFIER_ARGUMENTS)
    for number in range(1000):
        assert classifier[(0x0A000000 + number).to_bytes(4)] is ClientClass.EXTERNAL
    assert len(classifier) <= 100


def test_the_whole_address_space_as_one_pod_network() -> None:
    classifier = SourceClassifier(["0.0.0.0/0"], [])
    assert classifier[b"\1\2\3\4"] is ClientClass.POD
    assert classifier[bytes(16)] is ClientClass.EXTERNAL


@pytest.mark.parametrize(
    ("detector", "interface", "expected"),
    [
        ({"bridge_interface": "cni0"}, "cni0", ClientClass.POD),
        ({"bridge_interface": "cni0"}, "cni01", ClientClass.EXTERNAL),
        ({"bridge_interface": "cni0"}, None, ClientClass.EXTERNAL),
        ({"interface_name_prefix": "veth"}, "veth", ClientClass.POD),
        ({"interface_name_prefix": "veth"}, "vethab12", ClientClass.POD),
        ({"interface_name_prefix": "veth"}, "eth0", ClientClass.EXTERNAL),
        ({"cluster_cidrs": ("198.51.100.0/24",)}, "eth0", ClientClass.POD),
        ({}, "cni0", ClientClass.EXTERNAL),
    ],
)
def test_interfaces(detector: dict[str, str], interface: str, expected: ClientClass) -> None:
    classes = SourceClasses(PodDetector(**detector), [ip_address("192.0.2.1").packed])
    assert classes.arriving_by(interface)[ip_address("198.51.100.9").packed] is expected
    # Sent by the node itself, whatever interfaces there are.
    assert classes.arriving_by(None)[ip_address("192.0.2.1").packed] is ClientClass.NODE
