"""Yardsticks without userspace: one iptables rule, and no service at all."""

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from bench.contenders.base import Contender, Placement, Serving
from bench.services import PORT, VIP
from bench.world import Backend, World


class IptablesDnat(Contender):
    """Kernel DNAT: the least that any service proxy can cost, one Service and one backend."""

    name: ClassVar[str] = "dnat"
    title: ClassVar[str] = "kernel: one iptables DNAT rule"
    is_queued: ClassVar[bool] = False
    has_processes: ClassVar[bool] = False

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        """All connections go to the first backend."""
        return {str(backends[0]): 1.0}

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Adds the rule; it goes with the namespace."""
        protocol = world.measured.protocol
        match = ["PREROUTING", "-d", VIP, "-p", protocol, "--dport", str(PORT)]
        target = ["-j", "DNAT", "--to-destination", str(world.backends[0])]
        world.node.run("iptables", "-w", "-t", "nat", "-A", *match, *target)
        yield Serving()


class NoService(Contender):
    """The load alone: every SYN is dropped on arrival. What the sender costs, to be subtracted."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "load only: SYNs dropped in raw PREROUTING"
    is_queued: ClassVar[bool] = False
    has_processes: ClassVar[bool] = False

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        """Nobody connects."""
        return {}

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Adds the rule; it goes with the namespace."""
        world.node.run("iptables", "-w", "-t", "raw", "-A", "PREROUTING", "-d", VIP, "-j", "DROP")
        yield Serving()
