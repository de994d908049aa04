"""A cluster of two nodes for the scenario ``services``: the first runs the proxy, both have pods.

Two pods of each node serve (nginx, dnsmasq); the third pod of the first node is a client. Outside are
two clients; the first has many addresses, to be many.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.netns import Namespace, random_prefix
from nfqproxy.kernel.processes import ProcessRef
from nfqproxy.lab import addresses as plan
from nfqproxy.lab.cluster import Cluster, Step
from nfqproxy.lab.objects import Object, node_object, service_cidr, to_yaml
from nfqproxy.lab.state import LabState
from nfqproxy.lab.topology import Client, Node, Pod
from nfqproxy.model import DataPath

__all__ = ["CROWD", "TwoNodes"]

CROWD = tuple(plan.client4(index) for index in range(90, 170))
"""Further addresses of the first client."""

_END_S = 5.0


class TwoNodes(Cluster):
    """The cluster of the steps."""

    frontends = 0  # Services come with the steps

    @classmethod
    def plan(
        cls, name: str, *, workers: int, reader: str, data_path: DataPath | None
    ) -> "TwoNodes":
        """A lab that is not built yet."""
        return cls(
            LabState(
                name=name,
                prefix=random_prefix(),
                clients=2,
                pods=3,
                far_pods=2,
                weights=(),
                workers=workers,
                reader=reader,
                data_path=data_path or DataPath.CTNETLINK,
                owner=ProcessRef.of(os.getpid()),
            )
        )

    @property
    def near(self) -> tuple[Pod, Pod]:
        """The servers on the proxy's node."""
        first, second, _ = self.topology.pods_of("n1")
        return first, second

    @property
    def far(self) -> tuple[Pod, Pod]:
        """The servers on the other node."""
        first, second = self.topology.pods_of("n2")
        return first, second

    @property
    def caller(self) -> Pod:
        """The pod that is a client."""
        return self.topology.pods_of("n1")[2]

    def host(self, name: str) -> Client | Node | Pod:
        """A client, node or pod by its short name."""
        built = self.topology
        hosts: list[Client | Node | Pod] = [*built.clients, *built.nodes, *built.pods]
        return next(host for host in hosts if host.name == name)

    def namespace(self, name: str) -> Namespace:
        """Its network namespace."""
        return self.host(name).namespace

    def furnish(self, step: Step) -> None:
        """Servers, the crowd's addresses, and manifests without any Service."""
        servers = (*self.near, *self.far)
        step(f"servers: nginx and dnsmasq in {len(servers)} pods on 2 nodes")
        for pod in servers:
            self.serve(pod, pod.name)
        self.client.ip(*(f"addr add {address}/24 dev eth0" for address in CROWD))
        self.write_manifests(self.manifests([]))

    def proxy_flags(self) -> list[str]:
        """Pods are told from others by address."""
        return ["--cluster-cidr", f"{plan.PODS4},{plan.PODS6}"]

    def manifests(self, objects: list[Object]) -> str:
        """These objects with the Nodes and the ServiceCIDR."""
        nodes = [node_object(node) for node in self.topology.nodes]
        return to_yaml([*nodes, service_cidr(), *objects])

    def restart_workers(self) -> None:
        """SIGKILL to every worker, then wait for those that the supervisor starts instead."""
        self._wait_for_others_than(self.kill_workers())

    @contextmanager
    def without_proxy(self) -> Iterator[None]:
        """SIGKILL to all of the proxy at once; another is started after the block.

        Not to the workers alone: the supervisor would have others within half a second.
        """
        status = self.status()
        pids = (status["pid"], *(worker["pid"] for worker in status["workers"]))
        refs = [ProcessRef.of(int(pid)) for pid in pids]
        for ref in refs:
            with suppress(ProcessLookupError):  # a worker may have followed its supervisor already
                os.kill(ref.pid, signal.SIGKILL)
        _await_end(refs)
        yield
        self.start_proxy()

    def _wait_for_others_than(self, killed: tuple[int, ...]) -> None:
        if not self.has_new_workers(killed):
            raise NfqproxyError(f"no new worker took over from the killed; see {self.proxy_log}")


def _await_end(refs: list[ProcessRef]) -> None:
    deadline = time.monotonic() + _END_S
    while any(ref.is_alive() for ref in refs):
        if time.monotonic() >= deadline:
            raise NfqproxyError(
                f"process {refs[0].pid} of the proxy outlived SIGKILL by {_END_S:g} s"
            )
        time.sleep(0.005)
