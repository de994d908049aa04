"""The configuration file: YAML, ``kind: NfqproxyConfiguration``.

Field names are those of kube-proxy's v1alpha1 file wherever they mean the same. An unknown field is an
error that names it and the nearest known one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nfqproxy.control.address import canonical_cidr, canonical_ip
from nfqproxy.control.node import INTERFACE_NAME, Detector, NodeSettings, NonPodBackends
from nfqproxy.errors import InputError, ManifestError
from nfqproxy.model import DEFAULT_MARK_MASK, DataPath, MarkMask
from nfqproxy.sources import paths as on_disk
from nfqproxy.sources.document import DocumentError, parse_yaml
from nfqproxy.sources.manifest import Shape
from nfqproxy.sources.schema import FieldError, convert, one_of

KIND = "NfqproxyConfiguration"
API_VERSION = "nfqproxy.io/v1alpha1"
MODES = ("replace", "overlay")
DATA_PATHS = tuple(str(path) for path in DataPath)
READERS = ("netlink", "netfilterqueue")
IPTABLES = ("auto", "nft", "legacy")
PRIMARY = ("primary",)
DETECTORS = tuple(str(detector) for detector in Detector)
NON_POD_BACKENDS = tuple(str(choice) for choice in NonPodBackends)
_MAX_WORKERS = 64
_MAX_QUEUE = 65535
_MAX_INTERFACE_NAME = 15
"""IFNAMSIZ of linux/if.h, without the final zero."""


class DetectLocal(Shape, frozen=True, kw_only=True):
    """What the two detectors that look at interfaces go by."""

    bridge_interface: str = ""
    """detectLocalMode BridgeInterface: name of the pods' bridge."""
    interface_name_prefix: str = ""
    """detectLocalMode InterfaceNamePrefix: how the names of the pods' interfaces begin."""


class ClientConnection(Shape, frozen=True, kw_only=True):
    """How the API server is reached."""

    kubeconfig: str = ""
    """Path of a kubeconfig file; empty: the Kubernetes API is not the source of Services, unless inCluster
    says so."""


class ProxyConfig(Shape, frozen=True, kw_only=True):
    """What a proxy needs to know beside its Services. Field names in the file are in camel case."""

    api_version: str = API_VERSION
    kind: str = KIND
    mode: str = "replace"
    """replace: be the node proxy; overlay: beside a running kube-proxy."""
    manifests: tuple[str, ...] = ()
    """Files and directories of manifests, relative to the working directory."""
    iptables_save: tuple[str, ...] = ()
    """In place of manifests: files with what iptables-save and ip6tables-save print on this node under
    kube-proxy; live: the node's own rules."""
    iptables_save_interval_seconds: int = 10
    """How often the node's own rules are read."""
    client_connection: ClientConnection | None = None
    """In place of manifests: the Kubernetes API, by a kubeconfig file."""
    in_cluster: bool = False
    """In place of manifests: the Kubernetes API, by the service account of the pod this runs in."""
    hostname_override: str = ""
    """Name of this node in the cluster; empty: the host's name in lower case."""
    node_addresses: tuple[str, ...] = ()
    """Addresses of this node beside those of its Node object; the first of a family is its primary
    one where there is no Node object."""
    node_port_addresses: tuple[str, ...] = PRIMARY
    """"primary", or networks (single addresses too): node ports are served on this node's addresses
    inside them; a family for which none is given has them on all its addresses."""
    localhost_node_ports: bool = False
    """Serve IPv4 node ports on 127.0.0.1 too, for processes of this node."""
    cluster_cidr: str = ""
    """Pod networks, comma separated."""
    detect_local_mode: str = "ClusterCIDR"
    """What tells local pods from other clients: ClusterCIDR (by clusterCIDR; empty: nothing does),
    NodeCIDR (by the Node object's podCIDRs), BridgeInterface or InterfaceNamePrefix (by detectLocal)."""
    detect_local: DetectLocal | None = None
    masquerade_all: bool = False
    """Masquerade every connection to a ClusterIP, those of pods too."""
    masquerade_non_pod_backends: str = "auto"
    """A pod's connection to a backend that is no pod: auto masquerades where clusterCIDR says what a pod
    is, always lets the pod CIDRs of Node objects say it too, never keeps the pod's address."""
    steer_all: bool = False
    """Overlay mode: steer every Service, not only those labelled nfqproxy.io/steer: "true"."""
    data_path: str = str(DataPath.CTNETLINK)
    """ctnetlink: workers make conntrack entries; mark: they mark packets, and a nat rule translates."""
    mark_mask: int = DEFAULT_MARK_MASK
    """Data path mark: the bits of packet marks that are the proxy's alone, at least three."""
    workers: int = 1
    reader: str = "netlink"
    """netlink: the project's own queue reader; netfilterqueue: the package of that name."""
    first_queue: int = 100
    """NFQUEUE number of the first worker, the others follow."""
    queue_length: int = 4096
    """Packets that may wait for a worker; further ones are served by what stands behind the queue."""
    seed: int | None = None
    """Seed of the balancers' random numbers; none: from the system."""
    iptables: str = "auto"
    """nft, legacy or auto: the back end that the node's other rules use."""

    @property
    def cluster_cidrs(self) -> tuple[str, ...]:
        """The pod networks, one by one."""
        return tuple(cidr.strip() for cidr in self.cluster_cidr.split(",") if cidr.strip())

    @property
    def kubeconfig(self) -> str:
        """The kubeconfig file, empty if none is given."""
        return self.client_connection.kubeconfig if self.client_connection else ""

    @property
    def has_source(self) -> bool:
        """Whether it says where Services come from."""
        return bool(self.manifests or self.kubeconfig or self.in_cluster or self.iptables_save)

    @property
    def node_port_networks(self) -> tuple[str, ...] | None:
        """The networks with node ports; None: the node's primary addresses."""
        return None if self.node_port_addresses == PRIMARY else self.node_port_addresses

    def node_settings(self, node_name: str) -> NodeSettings:
        """What decisions on the node of this name depend on; the configuration must be checked."""
        local = self.detect_local or DetectLocal()
        return NodeSettings(
            node_name=node_name,
            addresses=self.node_addresses,
            detector=Detector(self.detect_local_mode),
            cluster_cidrs=self.cluster_cidrs,
            bridge_interface=local.bridge_interface,
            interface_name_prefix=local.interface_name_prefix,
            node_port_networks=self.node_port_networks,
            localhost_node_ports=self.localhost_node_ports,
            masquerade_all=self.masquerade_all,
            non_pod_backends=NonPodBackends(self.masquerade_non_pod_backends),
            is_overlay=self.mode == "overlay",
            steer_all=self.steer_all,
            marks=MarkMask(self.mark_mask) if self.data_path == DataPath.MARK else None,
        )


def load(path: Path) -> ProxyConfig:
    """Read a configuration file; ManifestError names the file and the field."""
    try:
        documents = [
            value
            for value in parse_yaml(on_disk.read(path, "configuration").decode())
            if value is not None
        ]
    except DocumentError as error:
        raise ManifestError(
            error.problem,
            file=str(path),
            field=f"line {error.line}, column {error.column}" if error.line else "",
        ) from None
    except UnicodeDecodeError:
        raise ManifestError("is not UTF-8 text; save it as UTF-8", file=str(path)) from None
    document: Any = documents[0] if len(documents) == 1 else None
    if not isinstance(document, dict):
        raise ManifestError(f"must hold exactly one YAML mapping with kind: {KIND}", file=str(path))
    try:
        one_of("kind", str(document.get("kind") or KIND), (KIND,))
        one_of("apiVersion", str(document.get("apiVersion") or API_VERSION), (API_VERSION,))
        return check(convert(document, ProxyConfig, strict=True))
    except FieldError as error:
        raise ManifestError(error.problem, file=str(path), field=error.path) from None


def check(config: ProxyConfig) -> ProxyConfig:
    """The configuration with canonical addresses; FieldError for a value out of range."""
    one_of("mode", config.mode, MODES)
    one_of("dataPath", config.data_path, DATA_PATHS)
    try:
        MarkMask(config.mark_mask)
    except ValueError as error:
        raise FieldError("markMask", str(error)) from None
    _check_source(config)
    one_of("reader", config.reader, READERS)
    one_of("iptables", config.iptables, IPTABLES)
    mode = one_of("detectLocalMode", config.detect_local_mode, DETECTORS)
    non_pod = one_of(
        "masqueradeNonPodBackends", config.masquerade_non_pod_backends, NON_POD_BACKENDS
    )
    _check_detect_local(Detector(mode), config.detect_local or DetectLocal())
    _within("workers", config.workers, 1, _MAX_WORKERS)
    _within("firstQueue", config.first_queue, 0, _MAX_QUEUE + 1 - config.workers)
    _within("iptablesSaveIntervalSeconds", config.iptables_save_interval_seconds, 1, 86_400)
    _within("queueLength", config.queue_length, 1, 1 << 20)
    cidrs = []
    for cidr in config.cluster_cidrs:
        try:
            cidrs.append(canonical_cidr(cidr))
        except ValueError:
            raise FieldError(
                "clusterCIDR", f'"{cidr}" is no network; write it like 10.244.0.0/16'
            ) from None
    return msgspec.structs.replace(
        config,
        cluster_cidr=",".join(cidrs),
        detect_local_mode=mode,
        masquerade_non_pod_backends=non_pod,
        node_addresses=_ips("nodeAddresses", config.node_addresses),
        node_port_addresses=_node_port_addresses(config.node_port_addresses),
    )


def _check_source(config: ProxyConfig) -> None:
    if config.kubeconfig and config.in_cluster:
        raise FieldError("inCluster", "a kubeconfig file is given too; give one of the two")
    if config.manifests and (config.kubeconfig or config.in_cluster):
        raise FieldError(
            "manifests", "the Kubernetes API is given as the source of Services too; give one"
        )
    if config.iptables_save and config.manifests:
        raise FieldError("iptablesSave", "stands beside manifests; give one of the two")
    if config.iptables_save and (config.kubeconfig or config.in_cluster):
        raise FieldError(
            "iptablesSave", "the Kubernetes API is given as the source of Services too; give one"
        )


def _check_detect_local(mode: Detector, local: DetectLocal) -> None:
    for needs, field, value, example in (
        (Detector.BRIDGE_INTERFACE, "bridgeInterface", local.bridge_interface, "cni0"),
        (
            Detector.INTERFACE_NAME_PREFIX,
            "interfaceNamePrefix",
            local.interface_name_prefix,
            "veth",
        ),
    ):
        if mode is needs and not value:
            raise FieldError(
                f"detectLocal.{field}",
                f"is missing; detectLocalMode {mode} needs it, give a name such as {example}",
            )
        if len(value) > _MAX_INTERFACE_NAME:
            raise FieldError(
                f"detectLocal.{field}",
                f'"{value}" is longer than the {_MAX_INTERFACE_NAME} characters of an interface name',
            )
        if value and not INTERFACE_NAME.fullmatch(value):
            raise FieldError(
                f"detectLocal.{field}",
                f'"{value}" is no name of an interface; give one as ip link shows it, such as {example}',
            )


def _node_port_addresses(texts: tuple[str, ...]) -> tuple[str, ...]:
    """ "primary" alone, or networks; an address is the network of itself. Empty means primary."""
    if not texts or texts == PRIMARY:
        return PRIMARY
    networks = []
    for index, text in enumerate(texts):
        bits = "" if "/" in text else "/128" if ":" in text else "/32"
        try:
            networks.append(canonical_cidr(text + bits))
        except ValueError:
            advice = (
                "stands alone" if text in PRIMARY else "is no network; write it like 10.0.0.0/8"
            )
            raise FieldError(f"nodePortAddresses[{index}]", f'"{text}" {advice}') from None
    return tuple(dict.fromkeys(networks))


# Field -> the flag that sets it, where the name differs by more than dashes.
_FLAGS = {"firstQueue": "queue", "clusterCIDR": "cluster-cidr", "nodeAddresses": "node-address"}


_SOURCES: dict[str, Any] = {
    "manifests": (),
    "client_connection": None,
    "in_cluster": False,
    "iptables_save": (),
}


def from_file_and_flags(file: Path | None, flags: Mapping[str, Any]) -> ProxyConfig:
    """The configuration of a file, if any, with the flags that were given in place of its values.

    ManifestError names the file and the field, InputError the flag.
    """
    config = load(file) if file else ProxyConfig()
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    if kubeconfig := given.pop("kubeconfig", None):
        given["client_connection"] = ClientConnection(kubeconfig=kubeconfig)
    if _SOURCES & given.keys():
        # A source on the command line stands in place of the file's, of whatever kind that is.
        given = {**_SOURCES, **given}
    return check_flags(msgspec.structs.replace(config, **given))


def check_flags(config: ProxyConfig) -> ProxyConfig:
    """``check`` for values from the command line: InputError that names the flag."""
    try:
        return check(config)
    except FieldError as error:
        field = error.path.split("[")[0]
        dashed = re.sub(r"(?<=[a-z])[A-Z]", lambda match: "-" + match[0].lower(), field)
        raise InputError(f"--{_FLAGS.get(field, dashed)}: {error.problem}") from None


def _within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FieldError(field, f"{value} is not within {low}..{high}")


def _ips(field: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for index, address in enumerate(addresses):
        try:
            found.append(canonical_ip(address))
        except ValueError:
            raise FieldError(
                f"{field}[{index}]", f'"{address}" is no IP address of this node'
            ) from None
    return tuple(found)
