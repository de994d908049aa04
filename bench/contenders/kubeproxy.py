"""kube-proxy's rules for all Services of the world, in both of its modes; no process runs.

The measured Service stands in the middle of the list (`bench.services.table`), so in iptables mode a
packet meets as many rules as the average Service's does; in nftables mode the place does not matter.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from bench.contenders.base import Contender, Placement, Serving
from bench.contenders.kubeproxy_rules import iptables_rules, nftables_rules
from bench.world import NODE_ADDRESS, SOURCES, Backend, World

# 5,000 Services take some 8 s in either mode.
_TIMEOUT_S = 120.0


class _KubeProxy(Contender):
    """What both modes share."""

    is_queued: ClassVar[bool] = False
    has_processes: ClassVar[bool] = False

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        """kube-proxy knows no weights."""
        return {str(backend): 1 / len(backends) for backend in backends}

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        """Loads the rules; they go with the namespace."""
        command, rules = self._rules(world)
        world.node.run(*command, stdin=rules, timeout_s=_TIMEOUT_S)
        yield Serving()

    @abstractmethod
    def _rules(self, world: World) -> tuple[tuple[str, ...], str]:
        """The command that reads them, and their text."""


class KubeProxyIptables(_KubeProxy):
    """A rule per Service in one list, looked through from the top."""

    name: ClassVar[str] = "kube-proxy-iptables"
    title: ClassVar[str] = "kernel: kube-proxy's rules, iptables mode"

    def _rules(self, world: World) -> tuple[tuple[str, ...], str]:
        return ("iptables-restore", "-w", "--noflush"), iptables_rules(world.services, SOURCES)


class KubeProxyNftables(_KubeProxy):
    """One map of all Services, a chain for each."""

    name: ClassVar[str] = "kube-proxy-nftables"
    title: ClassVar[str] = "kernel: kube-proxy's rules, nftables mode"

    def _rules(self, world: World) -> tuple[tuple[str, ...], str]:
        return ("nft", "-f", "-"), nftables_rules(world.services, SOURCES, NODE_ADDRESS)
