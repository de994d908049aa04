"""Service ports of one family, by the rules that lead to them.

Names come from the comments that kube-proxy puts on every such rule: ``namespace/service:port`` and
what the address is. In KUBE-SERVICES stand cluster IPs, external IPs and those of load balancers, in
KUBE-NODEPORTS node ports; refusals (no endpoints) stand in the chains of the same names of table
filter, those of external addresses since v1.9 in KUBE-EXTERNAL-SERVICES.
"""

import re
from collections.abc import Iterable

from msgspec import Struct, field

from nfqproxy.model import Family, Protocol
from nfqproxy.sources.iptables.chains import MASQUERADE, Chains, Detector, Picks, Target
from nfqproxy.sources.iptables.rule import Rule, host
from nfqproxy.sources.iptables.text import Loss, Table

_COMMENT = re.compile(r"([^/\s:]+)/([^/\s:]+)(?::([a-z0-9-]{0,63}))?(?: (.+))?")
_CLUSTER_IP, _EXTERNAL_IP, _VIP = "cluster IP", "external IP", "loadbalancer IP"
_NO_ENDPOINTS, _NO_LOCAL = "has no endpoints", "has no local endpoints"
_HEALTH_PORT = "health check node port"
_NODE_PORTS = "KUBE-NODEPORTS"
_CHAINS = ("KUBE-SERVICES", _NODE_PORTS, "KUBE-EXTERNAL-SERVICES")


class PortName(Struct, frozen=True, order=True):
    """What a comment calls a service port."""

    namespace: str
    service: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        name = f":{self.port}" if self.port else ""
        return f"{self.namespace}/{self.service}{name}"


class Port(Struct, kw_only=True):
    """What the rules of one family say of a service port."""

    line: int
    """Where it is first named."""
    origin: str
    cluster_ip: str = ""
    """Empty: the rules do not say."""
    port: int = 0
    node_port: int = 0
    external_ips: dict[str, None] = field(default_factory=dict)
    vips: dict[str, None] = field(default_factory=dict)
    ranges: tuple[str, ...] = ()
    is_internal_local: bool = False
    is_external_local: bool = False
    is_elsewhere: bool = False
    """There are endpoints, none of them on this node."""
    health_port: int = 0
    cluster: Picks | None = None
    """Endpoints for policy Cluster; None: the rules do not say."""
    local: Picks | None = None
    """Endpoints on this node; None: none, or no policy Local."""


class NodePorts(Struct):
    """Where kube-proxy serves node ports."""

    networks: dict[str, None] = field(default_factory=dict)
    on_all: bool = False
    on_loopback: bool = False


class FamilyPorts:
    """All service ports of the tables of one family."""

    def __init__(self, family: Family, tables: Iterable[Table], losses: list[Loss]) -> None:
        self.family = family
        self.ports: dict[PortName, Port] = {}
        self.node_ports = NodePorts()
        tables = list(tables)
        nat = next((table for table in tables if table.name != "filter"), None)
        if nat is None:
            self.detector = Detector()
            table = tables[0]
            losses.append(
                Loss(
                    table.origin,
                    table.line,
                    f"table filter of IPv{int(family)} without its table nat; it is left out",
                )
            )
            return
        self._chains = Chains(nat, losses)
        self.detector = self._chains.detector
        for table in sorted(tables, key=lambda each: each is not nat):
            for chain in _CHAINS:
                for rule in self._chains.rules(chain, table):
                    self._take(rule, chain, table)
        self._chains.lose_unreached()

    def _take(self, rule: Rule, chain: str, table: Table) -> None:
        if rule.target == _NODE_PORTS:
            self._see_node_ports(rule, table)
            return
        found = _COMMENT.fullmatch(rule.comment)
        role = (found[4] or "") if found else ""
        if found is None or rule.protocol is None or rule.port is None:
            self._lose(rule, table, "no comment that names a Service, or no protocol and port")
            return
        name = PortName(found[1], found[2], found[3] or "", rule.protocol)
        address = None if rule.destination is None else host(rule.destination)
        is_node_port = chain == _NODE_PORTS or (address is None and rule.is_to_node is True)
        if rule.destination is not None and address is None and not is_node_port:
            self._lose(rule, table, f"{rule.destination} is not one address")
        elif rule.target == MASQUERADE:
            if role == _CLUSTER_IP:
                self._chains.see_masquerade(rule, chain)
            # Of other traffic kube-proxy masquerades all, or of node ports what comes from loopback.
        elif role == _HEALTH_PORT and rule.target == "ACCEPT":
            self._port(name, rule, table).health_port = rule.port
        elif rule.target in ("REJECT", "DROP"):
            is_external = chain == "KUBE-EXTERNAL-SERVICES"
            self._take_refusal(
                rule, table, name, None if is_node_port else address, role, is_external
            )
        elif is_node_port:
            self._take_frontend(rule, table, name, None)
        elif address is not None and role in (_CLUSTER_IP, _EXTERNAL_IP, _VIP):
            self._take_frontend(rule, table, name, address, role)
        else:
            self._lose(rule, table, f'"{role}" says not which address of a Service this is')

    def _port(self, name: PortName, rule: Rule, table: Table) -> Port:
        found = self.ports.get(name)
        if found is None:
            found = self.ports[name] = Port(line=rule.line, origin=table.origin)
        return found

    def _take_frontend(
        self, rule: Rule, table: Table, name: PortName, address: str | None, role: str = ""
    ) -> None:
        target = self._chains.target(rule)
        if target is None:
            return
        port = self._port(name, rule, table)
        if role == _CLUSTER_IP:
            assert address is not None
            self._set_cluster_ip(port, rule, table, address)
            port.is_internal_local |= target.is_local
        else:
            port.is_external_local |= target.is_local
            self._add_external(port, rule, table, address, role)
        self._add_endpoints(port, rule, table, target)

    def _take_refusal(
        self,
        rule: Rule,
        table: Table,
        name: PortName,
        address: str | None,
        role: str,
        is_external: bool,
    ) -> None:
        if role not in (_NO_ENDPOINTS, _NO_LOCAL):
            self._lose(rule, table, f'a refusal of "{role}" is not understood')
            return
        port = self._port(name, rule, table)
        is_local = role == _NO_LOCAL
        port.is_elsewhere |= is_local
        # Before v1.9 external addresses stood in one chain with the cluster IP, behind it.
        if address is not None and not is_external and port.cluster_ip in ("", address):
            self._set_cluster_ip(port, rule, table, address)
            port.is_internal_local |= is_local
        else:
            port.is_external_local |= is_local
            self._add_external(port, rule, table, address)

    def _set_cluster_ip(self, port: Port, rule: Rule, table: Table, address: str) -> None:
        assert rule.port is not None
        if port.cluster_ip not in ("", address):
            self._lose(rule, table, f"a second cluster IP beside {port.cluster_ip}")
            return
        port.cluster_ip = address
        self._set_number(port, rule, table, rule.port)

    def _set_number(self, port: Port, rule: Rule, table: Table, number: int) -> None:
        if port.port not in (0, number):
            self._lose(rule, table, f"port {number} for what was port {port.port} before")
            return
        port.port = number

    def _add_external(
        self, port: Port, rule: Rule, table: Table, address: str | None, role: str = ""
    ) -> None:
        """An address beside the cluster IP, or without address the node port."""
        assert rule.port is not None
        if address is None:
            if port.node_port not in (0, rule.port):
                self._lose(rule, table, f"a second node port beside {port.node_port}")
                return
            port.node_port = rule.port
            return
        if role == _VIP:
            port.vips[address] = None
        elif address not in port.vips:
            # A refusal says not of which kind the address is.
            port.external_ips[address] = None
        self._set_number(port, rule, table, rule.port)

    def _add_endpoints(self, port: Port, rule: Rule, table: Table, target: Target) -> None:
        for field_name in ("cluster", "local"):
            new, old = getattr(target, field_name), getattr(port, field_name)
            if new is None or new is old:
                continue
            if old is not None and _addresses(old) != _addresses(new):
                self._lose(rule, table, f"leads to other endpoints than line {old.line}")
            elif old is None:
                setattr(port, field_name, new)
        if target.ranges:
            port.ranges = target.ranges

    def _see_node_ports(self, rule: Rule, table: Table) -> None:
        wheres = rule.conditions
        if wheres == {"destination"} and rule.destination and host(rule.destination):
            self.node_ports.networks[rule.destination] = None
        elif wheres - {"not_destination"} == {"is_to_node"} and rule.is_to_node:
            self.node_ports.on_all = True
            self.node_ports.on_loopback = rule.not_destination is None
        else:
            self._lose(rule, table, "these conditions of node ports are not understood")

    def _lose(self, rule: Rule, table: Table, problem: str) -> None:
        self._chains.lose(rule.line, f"{problem}; the rule is left out", table)


def _addresses(picks: Picks) -> list[tuple[str, int]]:
    return sorted((pick.address, pick.port) for pick in picks.picks)
