"""The lab with weights: one client, one node, backends of one Service each for TCP and UDP.

``nfqproxy lab`` builds it for one run of traffic, ``nfqproxy lab up`` leaves it standing.
"""

import os
import sys

from msgspec.structs import replace

from nfqproxy.errors import HostError, NfqproxyError
from nfqproxy.kernel.netns import random_prefix
from nfqproxy.kernel.processes import ProcessRef
from nfqproxy.lab import state as states
from nfqproxy.lab.cluster import Cluster, Step
from nfqproxy.lab.jobs import Target
from nfqproxy.lab.manifest import DNS_VIP4, WEB_VIP4, WEB_VIP6, backend_name, manifest
from nfqproxy.lab.servers import WHOAMI
from nfqproxy.lab.state import FIRST_UDP_PORT, LabState
from nfqproxy.model import DataPath, MarkMask

__all__ = ["DNS", "PLAIN", "WEB", "WEB6", "Lab"]

WEB = Target("web", WEB_VIP4, 80)
WEB6 = Target("web6", WEB_VIP6, 80)
DNS = Target("dns", DNS_VIP4, 53)
PLAIN = Target("plain DNAT", "203.0.113.99", 80)
"""No Service of the proxy: one plain iptables rule in the node leads to the first backend."""


class Lab(Cluster):
    """Builds, uses and leaves standing the lab with weights."""

    frontends = 4

    @classmethod
    def plan(
        cls,
        name: str,
        *,
        weights: tuple[int, ...],
        workers: int,
        reader: str,
        data_path: DataPath | None,
    ) -> "Lab":
        """A lab that is not built yet."""
        return cls(
            LabState(
                name=name,
                prefix=random_prefix(),
                clients=1,
                pods=len(weights),
                weights=weights,
                workers=workers,
                reader=reader,
                data_path=data_path or DataPath.CTNETLINK,
                owner=ProcessRef.of(os.getpid()),
            )
        )

    @classmethod
    def attach(cls, name: str) -> "Lab":
        """A lab that stands; NfqproxyError when there is none of this name or it is at work."""
        state = states.load(name)
        if state is None:
            others = [other for other in states.names() if states.load(other)]
            there = f"there is {', '.join(others)}" if others else "make one with nfqproxy lab up"
            raise NfqproxyError(f"no lab named {name} stands; {there}")
        if state.has_owner:
            assert state.owner is not None
            raise NfqproxyError(
                f"process {state.owner.pid} is at work on the lab {name}; wait until it is done"
            )
        return cls(state)

    @property
    def direct(self) -> Target:
        """The first backend without any Service between."""
        return Target("direct", self.topology.pods[0].address4, 8080)

    def furnish(self, step: Step) -> None:
        """A web and a DNS server in every backend, the path to compare with, the manifests."""
        pods = self.topology.pods
        step(f"servers: nginx and dnsmasq in {len(pods)} backends")
        for index, pod in enumerate(pods):
            self.serve(pod, backend_name(index))
        self._compare_rules()
        self.write_manifests(manifest(self.topology.node, pods, self.state.weights))

    def _compare_rules(self) -> None:
        """The plain DNAT of the comparison, and what counts connections no worker has decided.

        A chain of type nat sees only the first packet of a connection, and only while no address
        translation is set up for it: an entry that the worker installed passes it by, and a packet that
        the worker marked is told by its mark. Its priority, ahead of what translates by marks (-107) and of
        every fallback (from -105), makes it count exactly what is left to them.
        """
        first = self.topology.pods[0]
        self.node.run(
            *("iptables", "-t", "nat", "-A", "PREROUTING", "-d", PLAIN.address, "-p", "tcp"),
            *("--dport", str(PLAIN.port), "-j", "DNAT", "--to", f"{first.address4}:8080"),
        )
        self.node.run("nft", "-f", "-", stdin=_observer())

    def take_ports(self, count: int) -> int:
        """Reserve UDP source ports that no flow of an earlier run has; the first of them.

        Below those that the kernel gives out (ip_local_port_range begins at 32768): somebody's dig
        would have made one of them a flow that is known already, and not queued again.
        """
        low, high = FIRST_UDP_PORT, 32_000
        if count > high - low:
            raise HostError(f"{count} queries need as many source ports; {high - low} are the most")
        first = self.state.next_port if self.state.next_port + count <= high else low
        self.state = replace(self.state, next_port=first + count)
        states.save(self.state)
        return first

    def hand_over(self) -> None:
        """Leave the lab standing: from now on it belongs to no process."""
        self.state = replace(self.state, owner=None)
        states.save(self.state)

    def occupy(self) -> None:
        """Say that this process is at work on it, so that nobody else starts to be."""
        self.state = replace(self.state, owner=ProcessRef.of(os.getpid()))
        states.save(self.state)

    def stop_load(self) -> None:
        """End the load that this process started in a lab it is attached to; the lab itself stands on."""
        self.client.close()

    def commands(self) -> list[tuple[str, str]]:
        """Things to try: what it shows, and the command."""
        program = f"{sys.executable} -m nfqproxy"
        client, node = self.client.name, self.node.name
        pod = self.topology.pods[0].namespace.name
        enter = "ip netns exec"
        table = "raw" if self.state.data_path is DataPath.CTNETLINK else "mangle"
        return [
            ("a connection", f"{enter} {client} curl -si http://{WEB.address}/"),
            ("over IPv6", f"{enter} {client} curl -s 'http://[{WEB6.address}]/'"),
            ("from a pod", f"{enter} {pod} curl -s http://{WEB.address}/"),
            ("from the node", f"{enter} {node} curl -s http://{WEB.address}/"),
            ("a DNS query", f"{enter} {client} dig +short @{DNS.address} {WHOAMI} TXT"),
            ("the connections", f"{enter} {node} conntrack -L --orig-dst {WEB.address}"),
            ("the proxy", f"{enter} {node} {program} status"),
            ("what is queued", f"{enter} {node} iptables -t {table} -nvxL NFQPROXY-QUEUE"),
            ("change weights", f"edit {self.manifest_file}; the proxy follows it"),
            ("its log", f"tail {self.proxy_log}"),
        ]


def _observer() -> str:
    undecided = f"meta mark & {MarkMask().numbers:#x} == 0 counter name undecided"
    return f"""
table ip lab-observer {{
    counter undecided-tcp {{ }}
    counter undecided-udp {{ }}
    chain prerouting {{
        type nat hook prerouting priority -150; policy accept;
        ip daddr {WEB.address} tcp dport {WEB.port} {undecided}-tcp
        ip daddr {DNS.address} udp dport {DNS.port} {undecided}-udp
    }}
}}
"""
