"""A standing lab: client, node with the real proxy, backends with real servers."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nfqproxy.api import admin
from nfqproxy.errors import HostError, InputError, NfqproxyError
from nfqproxy.kernel.netns import Namespace, random_prefix
from nfqproxy.kernel.processes import ProcessRef, uninterrupted
from nfqproxy.lab import state as states
from nfqproxy.lab.jobs import Target
from nfqproxy.lab.manifest import DNS_VIP4, WEB_VIP4, WEB_VIP6, backend_name, manifest
from nfqproxy.lab.servers import WHOAMI, require_programs, start_dns, start_web
from nfqproxy.lab.state import FIRST_UDP_PORT, LabState
from nfqproxy.lab.topology import Topology

__all__ = ["DNS", "PLAIN", "PROGRAMS", "WEB", "WEB6", "Lab"]

PROGRAMS = ("ip", "iptables", "ip6tables", "ipset", "nft", "conntrack", "nginx", "dnsmasq")
"""What the lab calls, curl and dig (only printed) left out."""

WEB = Target("web", WEB_VIP4, 80)
WEB6 = Target("web6", WEB_VIP6, 80)
DNS = Target("dns", DNS_VIP4, 53)
PLAIN = Target("plain DNAT", "203.0.113.99", 80)
"""No Service of the proxy: one plain iptables rule in the node leads to the first backend."""

_PROXY_START_S = 30.0

Step = Callable[[str], None]
"""Is told what is being done, in a few words."""


class Lab:
    """Builds, uses and removes one lab. ``state`` is kept on disk as well (state.py)."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.topology: Topology = state.topology()
        self.is_claimed = False
        """Whether build() has taken the name, so that there is something to remove."""

    @classmethod
    def plan(cls, name: str, *, weights: tuple[int, ...], workers: int, reader: str) -> "Lab":
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
    def node(self) -> Namespace:
        """The namespace the proxy runs in."""
        return self.topology.node.namespace

    @property
    def client(self) -> Namespace:
        """The namespace the load comes from."""
        return self.topology.client.namespace

    @property
    def manifest_file(self) -> Path:
        """What the proxy reads and follows."""
        return self.state.folder / "manifests.yaml"

    @property
    def proxy_log(self) -> Path:
        """Standard error of the proxy."""
        return self.state.folder / "nfqproxy.log"

    @property
    def direct(self) -> Target:
        """The first backend without any Service between."""
        return Target("direct", self.topology.pods[0].address4, 8080)

    def build(self, step: Step, *, proxy_seed: int | None = None) -> None:
        """Make everything; on failure or interrupt the caller removes."""
        require_programs(PROGRAMS)
        states.claim(self.state)
        self.is_claimed = True
        pods = self.topology.pods
        step(f"network: {len(pods) + 3} namespaces {self.state.prefix}*")
        self.topology.build()
        step(f"servers: nginx and dnsmasq in {len(pods)} backends")
        for index, pod in enumerate(pods):
            start_web(pod, self.state.folder, name=backend_name(index))
            self._record()
            start_dns(pod, self.state.folder, name=backend_name(index))
            self._record()
        self._compare_rules()
        self.manifest_file.write_text(manifest(self.topology.node, pods, self.state.weights))
        step(f"proxy: nfqproxy run in {self.node.name}")
        self._start_proxy(proxy_seed)

    def _record(self) -> None:
        processes = [ref for member in self.topology.group for ref in member.processes()]
        self.state = replace(self.state, processes=tuple(processes))
        states.save(self.state)

    def _compare_rules(self) -> None:
        """The plain DNAT of the comparison, and what counts connections no worker has decided.

        A chain of type nat sees only the first packet of a connection, and only while no address
        translation is set up for it: an entry that the worker installed passes it by. Its priority,
        after conntrack (-200) and ahead of every fallback (from -105), makes it count exactly what
        is left to them.
        """
        first = self.topology.pods[0]
        self.node.run(
            *("iptables", "-t", "nat", "-A", "PREROUTING", "-d", PLAIN.address, "-p", "tcp"),
            *("--dport", str(PLAIN.port), "-j", "DNAT", "--to", f"{first.address4}:8080"),
        )
        self.node.run("nft", "-f", "-", stdin=_OBSERVER.format(web=WEB, dns=DNS))

    def _start_proxy(self, seed: int | None) -> None:
        command = [sys.executable, "-m", "nfqproxy", "run", "--mode", "replace"]
        command += ["--manifests", str(self.manifest_file), "--node-name", self.topology.node.name]
        command += ["--workers", str(self.state.workers), "--reader", self.state.reader]
        if seed is not None:
            command += ["--seed", str(seed)]
        with self.proxy_log.open("wb") as log:
            child = self.node.popen(*command, stderr=log)
        self._record()
        deadline = time.monotonic() + _PROXY_START_S
        while True:
            if child.poll() is not None:
                problem = f"nfqproxy run exited with status {child.returncode}"
                kind = {2: InputError, 3: HostError}.get(child.returncode, NfqproxyError)
                raise kind(f"{problem}: {self._last_log_line()}")
            if self.is_serving():
                return
            if time.monotonic() >= deadline:
                raise NfqproxyError(
                    f"nfqproxy run was not ready after {_PROXY_START_S:g} s:"
                    f" {self._last_log_line()}"
                )
            time.sleep(0.02)

    def _last_log_line(self) -> str:
        lines = self.proxy_log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its log is empty"

    def status(self) -> dict[str, Any]:
        """What ``nfqproxy status -o json`` says in the node; NfqproxyError when none answers."""
        return self.node.call(lambda: admin.ask("status"))

    def is_serving(self) -> bool:
        """Whether the proxy answers, knows the Services and every worker decides."""
        try:
            now = self.status()
        except NfqproxyError:
            return False
        workers = now["workers"]
        return (
            now["frontends"] >= 4
            and len(workers) == self.state.workers
            and all(worker["ready"] for worker in workers)
        )

    def hand_over(self) -> None:
        """Leave the lab standing: from now on it belongs to no process."""
        self.state = replace(self.state, owner=None)
        states.save(self.state)

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

    def occupy(self) -> None:
        """Say that this process is at work on it, so that nobody else starts to be."""
        self.state = replace(self.state, owner=ProcessRef.of(os.getpid()))
        states.save(self.state)

    def stop_load(self) -> None:
        """End what this process started in a lab it is attached to; the lab itself stands on."""
        self.topology.group.stop_processes()

    def remove(self) -> None:
        """Remove every trace. Idempotent."""
        with uninterrupted():
            self.topology.close()
            states.remove(self.state.name)

    def commands(self) -> list[tuple[str, str]]:
        """Things to try: what it shows, and the command."""
        program = f"{sys.executable} -m nfqproxy"
        client, node = self.client.name, self.node.name
        pod = self.topology.pods[0].namespace.name
        enter = "ip netns exec"
        return [
            ("a connection", f"{enter} {client} curl -si http://{WEB.address}/"),
            ("over IPv6", f"{enter} {client} curl -s 'http://[{WEB6.address}]/'"),
            ("from a pod", f"{enter} {pod} curl -s http://{WEB.address}/"),
            ("from the node", f"{enter} {node} curl -s http://{WEB.address}/"),
            ("a DNS query", f"{enter} {client} dig +short @{DNS.address} {WHOAMI} TXT"),
            ("the connections", f"{enter} {node} conntrack -L --orig-dst {WEB.address}"),
            ("the proxy", f"{enter} {node} {program} status"),
            ("what is queued", f"{enter} {node} iptables -t raw -nvxL"),
            ("change weights", f"edit {self.manifest_file}; the proxy follows it"),
            ("its log", f"tail {self.proxy_log}"),
        ]


_OBSERVER = """
table ip lab-observer {{
    counter undecided-tcp {{ }}
    counter undecided-udp {{ }}
    chain prerouting {{
        type nat hook prerouting priority -150; policy accept;
        ip daddr {web.address} tcp dport {web.port} counter name undecided-tcp
        ip daddr {dns.address} udp dport {dns.port} counter name undecided-udp
    }}
}}
"""
