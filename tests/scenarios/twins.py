"""The scenario files read for both families and all protocols at once.

A file speaks of IPv4 and mostly of TCP. Its *twin* is the same case with every address mapped to IPv6 and
with another protocol. Objects and packets of all twins of a file are put together, so that one manifest
serves them all: the Service becomes dual-stack, and each of its ports is there once per protocol.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nfqproxy.model import Family, FrontendKey, Protocol

FILES = tuple(sorted(Path(__file__).parent.glob("vector-*.yaml")))

TWINS = {
    "10.244.0.0/16": "fd00:10:244::/56",
    "10.244.1.0/24": "fd00:10:244:1::/64",
    "10.244.2.0/24": "fd00:10:244:2::/64",
    "10.244.1.5": "fd00:10:244:1::5",
    "10.244.1.9": "fd00:10:244:1::9",
    "10.244.2.5": "fd00:10:244:2::5",
    "10.244.2.9": "fd00:10:244:2::9",
    "10.96.0.0/16": "fd00:10:96::/112",
    "10.96.0.10": "fd00:10:96::10",
    "10.96.0.11": "fd00:10:96::11",
    "192.168.0.1": "fd00:192:168::1",
    "192.168.0.2": "fd00:192:168::2",
    "192.168.0.0/24": "fd00:192:168::/64",
    "203.0.113.9": "2001:db8:113::9",
    "198.51.100.7": "2001:db8:100::7",
    "192.0.2.50": "2001:db8:2::50",
    "8.8.8.8": "2001:db8:8::8",
    "10.0.0.0/8": "fd00:10::/32",
    "127.0.0.1": "::1",
}
"""Every address and network of the scenario files, and its IPv6 counterpart."""

_TARGET = re.compile(r"(?P<address>[\d.]+)(:(?P<port>\d+))?/(?P<protocol>\w+)")
_OBJECTS_AT = 1  # the first document of a file is the scenario itself

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One packet of one scenario, of one family and protocol, and what must become of it."""

    vector: int
    index: int
    """Which of the file's packets."""
    family: Family
    protocol: Protocol | None
    """None: a ping."""
    source: str
    interface: str
    """By which interface it comes in; empty where the file does not say."""
    address: str
    port: int
    verdict: str
    backends: tuple[tuple[str, str], ...]
    """(address, "client" or "node": whose address it sees)."""
    config: str
    """The configuration's fields as JSON, for both families."""
    node_addresses: tuple[str, ...]
    objects_as_in_file: bool
    """The packet is about a protocol that the Service lacks: its ports must not be multiplied."""

    @property
    def key(self) -> FrontendKey:
        """What it is sent to; not for a ping."""
        assert self.protocol is not None
        return FrontendKey(self.protocol, self.address, self.port)

    @property
    def target(self) -> str:
        """As ``explain --to`` takes it."""
        six = self.family is Family.IPV6
        if self.protocol is None:
            return f"{self.address}/{'icmpv6' if six else 'icmp'}"
        host = f"[{self.address}]" if six else self.address
        return f"{host}:{self.port}/{self.protocol.name.lower()}"

    @property
    def origin(self) -> str:
        """As ``explain --from`` takes it."""
        return f"{self.source}%{self.interface}" if self.interface else self.source

    def __str__(self) -> str:
        word = "icmp" if self.protocol is None else self.protocol.name.lower()
        return f"vector-{self.vector:02}-{self.index}-{word}-ipv{int(self.family)}"


@cache
def documents(file: Path) -> tuple[Any, ...]:
    """All documents of a scenario file; not to be changed."""
    return tuple(yaml.safe_load_all(file.read_text()))


def file_of(vector: int) -> Path:
    """The file of a vector."""
    return next(file for file in FILES if documents(file)[0]["vector"] == vector)


def twin(address: str, family: Family) -> str:
    """An address or network of the files in a family."""
    return address if family is Family.IPV4 else TWINS[address]


def cases() -> Iterator[Case]:
    """Every packet of every file, in both families and all three protocols."""
    for file in FILES:
        scenario = documents(file)[0]
        served = {port.get("protocol", "TCP") for port in _service(file)["spec"]["ports"]}
        for index, packet in enumerate(scenario["packets"]):
            match = _TARGET.fullmatch(packet["to"])
            assert match, packet["to"]
            word = match["protocol"].upper()
            has_twins = word in served
            protocols = (
                tuple(Protocol) if has_twins else (None if word == "ICMP" else Protocol[word],)
            )
            for family in Family:
                for protocol in protocols:
                    yield _case(
                        scenario["vector"], index, packet, match, family, protocol, has_twins
                    )


def _case(
    vector: int,
    index: int,
    packet: Mapping[str, Any],
    match: re.Match[str],
    family: Family,
    protocol: Protocol | None,
    has_twins: bool,
) -> Case:
    source, _, interface = packet["from"].partition("%")
    expect = packet["expect"]
    verdict, backends = expect["verdict"], expect["backends"]
    if family is Family.IPV6 and verdict == "backend" and match["address"] == "127.0.0.1":
        # localhostNodePorts is of IPv4 alone.
        verdict, backends = "pass", {}
    return Case(
        vector=vector,
        index=index,
        family=family,
        protocol=protocol,
        source=twin(source, family),
        interface=interface,
        address=twin(match["address"], family),
        port=int(match["port"] or 0),
        verdict=verdict,
        backends=tuple(
            (twin(backend.rpartition(":")[0], family), seen) for backend, seen in backends.items()
        ),
        config=json.dumps(_config(packet["config"]), sort_keys=True),
        node_addresses=tuple(
            twin(address, f) for address in packet.get("nodeAddresses", ()) for f in Family
        ),
        objects_as_in_file=protocol is not None and not has_twins,
    )


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(fields)
    if "clusterCIDR" in found:
        found["clusterCIDR"] = ",".join(_both([found["clusterCIDR"]]))
    return found


def objects(vector: int, *, as_in_file: bool = False) -> list[Object]:
    """The objects of a file for both families; with every port in all protocols unless ``as_in_file``."""
    found: list[Object] = []
    for document in documents(file_of(vector))[_OBJECTS_AT:]:
        item = copy.deepcopy(document)
        match item["kind"]:
            case "Node":
                item["spec"]["podCIDRs"] = _both([item["spec"]["podCIDR"]])
                item["status"]["addresses"] = [
                    {**each, "address": address}
                    for each in item["status"]["addresses"]
                    for address in _both([each["address"]])
                ]
            case "ServiceCIDR":
                item["spec"]["cidrs"] = _both(item["spec"]["cidrs"])
            case "Service":
                _make_dual(item)
            case "EndpointSlice":
                other = copy.deepcopy(item)
                other["metadata"]["name"] += "-ipv6"
                other["addressType"] = "IPv6"
                for endpoint in other["endpoints"]:
                    endpoint["addresses"] = [TWINS[each] for each in endpoint["addresses"]]
                found.append(other)
        found.append(item)
    if not as_in_file:
        for item in found:
            if item["kind"] == "Service":
                item["spec"]["ports"] = _in_all_protocols(item["spec"]["ports"])
            elif item["kind"] == "EndpointSlice":
                item["ports"] = _in_all_protocols(item["ports"])
    return found


def _service(file: Path) -> Object:
    found: Object = next(d for d in documents(file)[_OBJECTS_AT:] if d["kind"] == "Service")
    return found


def _make_dual(service: Object) -> None:
    spec = service["spec"]
    spec["clusterIPs"] = _both([spec["clusterIP"]])
    spec["ipFamilies"] = ["IPv4", "IPv6"]
    spec["ipFamilyPolicy"] = "RequireDualStack"
    for field in ("externalIPs", "loadBalancerSourceRanges"):
        if field in spec:
            spec[field] = _both(spec[field])
    balancer = service.get("status", {}).get("loadBalancer", {})
    if "ingress" in balancer:
        balancer["ingress"] = [
            {**each, "ip": address}
            for each in balancer["ingress"]
            for address in _both([each["ip"]])
        ]


def _both(addresses: list[str]) -> list[str]:
    return [twin(address, family) for address in addresses for family in Family]


def _in_all_protocols(ports: list[Object]) -> list[Object]:
    return [
        {**port, "protocol": protocol.name, "name": f"{port['name']}-{protocol.name.lower()}"}
        for port in ports
        for protocol in Protocol
    ]
