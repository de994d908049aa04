"""The configuration file: kube-proxy's names, canonical values, errors that name the field."""

from textwrap import dedent
from typing import Any

import pytest

from nfqproxy.control.node import Detector, NodeSettings, NonPodBackends
from nfqproxy.errors import InputError, ManifestError
from nfqproxy.model import MarkMask
from nfqproxy.sources import config
from nfqproxy.sources.config import ProxyConfig


def load(write: Any, text: str) -> ProxyConfig:
    return config.load(write("config.yaml", "kind: NfqproxyConfiguration\n" + dedent(text)))


def test_the_defaults() -> None:
    settings = config.check(ProxyConfig()).node_settings("n1")
    assert settings == NodeSettings(node_name="n1")


def test_everything_a_decision_depends_on(write: Any) -> None:
    found = load(
        write,
        """
        mode: overlay
        steerAll: true
        nodeAddresses: ["198.51.100.7"]
        clusterCIDR: 10.244.0.0/16, fd00:10:244::/56
        detectLocalMode: BridgeInterface
        detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}
        nodePortAddresses: [10.0.0.7/8, "fd00::1", 10.0.0.0/8]
        localhostNodePorts: true
        masqueradeAll: true
        masqueradeNonPodBackends: always
        """,
    )
    assert found.node_settings("n1") == NodeSettings(
        node_name="n1",
        addresses=("198.51.100.7",),
        detector=Detector.BRIDGE_INTERFACE,
        cluster_cidrs=("10.244.0.0/16", "fd00:10:244::/56"),
        bridge_interface="cni0",
        interface_name_prefix="veth",
        node_port_networks=("10.0.0.0/8", "fd00::1/128"),
        localhost_node_ports=True,
        masquerade_all=True,
        non_pod_backends=NonPodBackends.ALWAYS,
        is_overlay=True,
        steer_all=True,
    )


def test_the_data_path_and_its_bits(write: Any) -> None:
    assert load(write, "dataPath: mark").node_settings("n1").marks == MarkMask(0x3F7F)
    found = load(write, "dataPath: mark\nmarkMask: 0x00f00000")
    assert found.node_settings("n1").marks == MarkMask(0x00F0_0000)
    assert load(write, "markMask: 0x00f00000").node_settings("n1").marks is None


@pytest.mark.parametrize("text", ["nodePortAddresses: [primary]", "nodePortAddresses: []", ""])
def test_node_ports_on_the_primary_addresses(write: Any, text: str) -> None:
    assert load(write, text).node_port_networks is None


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("detectLocalMode: ClusterCidr", "detectLocalMode", 'did you mean "ClusterCIDR"?'),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface", "is missing"),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {bridgeInterface: cni0}",
            "detectLocal.interfaceNamePrefix",
            "is missing",
        ),
        (
            "detectLocal: {bridgeInterface: a-very-long-name}",
            "detectLocal.bridgeInterface",
            "longer than the 15 characters",
        ),
        (
            "detectLocal: {interfaceNamePrefix: veth*}",
            "detectLocal.interfaceNamePrefix",
            "is no name of an interface",
        ),
        (
            "detectLocal: {bridgeinterface: cni0}",
            "detectLocal.bridgeinterface",
            'did you mean "bridgeInterface"?',
        ),
        ("localhostNodePorts: 1", "localhostNodePorts", "must be true or false"),
        ("masqueradeNonPodBackends: no", "masqueradeNonPodBackends", "must be a string"),
        ("masqueradeNonPodBackends: sometimes", "masqueradeNonPodBackends", "known are"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses[0]", "stands alone"),
        ("nodePortAddresses: [10.0.0.0/33]", "nodePortAddresses[0]", "is no network"),
        ("nodePortAddresses: [eth0]", "nodePortAddresses[0]", "is no network"),
        ("clusterCIDR: 10.244.0.0", "clusterCIDR", "is no network"),
        ("inCluster: true\nmanifests: [a.yaml]", "manifests", "give one"),
        ("inCluster: true\nclientConnection: {kubeconfig: k}", "inCluster", "give one"),
        ("clientConnection: {kubeConfig: k}", "clientConnection.kubeConfig", '"kubeconfig"?'),
    ],
)
def test_errors_name_the_field(write: Any, text: str, where: str, problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(write, text)
    assert caught.value.field == where
    assert problem in str(caught.value)


def test_a_source_on_the_command_line_stands_for_that_of_the_file(write: Any) -> None:
    file = write("config.yaml", "clientConnection: {kubeconfig: of-the-file}\nworkers: 2")
    flags: dict[str, Any] = {"manifests": (), "kubeconfig": None, "in_cluster": None}
    assert config.from_file_and_flags(file, flags).kubeconfig == "of-the-file"
    found = config.from_file_and_flags(file, {**flags, "kubeconfig": "of-the-flag"})
    assert found.kubeconfig == "of-the-flag"
    found = config.from_file_and_flags(file, {**flags, "manifests": ("a.yaml",)})
    assert (found.manifests, found.kubeconfig, found.workers) == (("a.yaml",), "", 2)
    found = config.from_file_and_flags(file, {**flags, "in_cluster": True})
    assert found.in_cluster
    assert not found.kubeconfig


def test_two_sources_on_the_command_line() -> None:
    with pytest.raises(InputError, match=r"^--manifests: the Kubernetes API is given"):
        config.from_file_and_flags(None, {"manifests": ("a.yaml",), "kubeconfig": "k"})
    with pytest.raises(InputError, match=r"^--in-cluster: a kubeconfig file is given too"):
        config.from_file_and_flags(None, {"in_cluster": True, "kubeconfig": "k"})


def test_errors_of_flags_name_the_flag() -> None:
    with pytest.raises(InputError, match=r"^--cluster-cidr: "):
        config.check_flags(ProxyConfig(cluster_cidr="nonsense"))
