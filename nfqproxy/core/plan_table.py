"""All plans of one node, kept up to date by difference.

A change of one Service costs work in proportion to that Service, whatever the size of the table: the
plans of the others stay the very same objects, so that whoever compares finds them equal at once.

Beside kube-proxy only steered Services have plans, and of these only frontends that are served: refusals
stay with kube-proxy.
"""

from collections.abc import Iterable
from types import MappingProxyType

from msgspec import Struct

from nfqproxy.control.node import NodeSettings
from nfqproxy.core.plans import Planner, is_served, is_steered
from nfqproxy.model import FrontendKey, FrontendPlan, NodeContext, ServicePort, ServicePortName

_Claim = tuple[int, ServicePortName]
"""Rank of the frontend kind, then the port's name: of several claims to one key the least wins."""


def plans_for_node(
    ports: Iterable[ServicePort], node: NodeContext, settings: NodeSettings
) -> dict[FrontendKey, FrontendPlan]:
    """All plans of these service ports, for one look at them (``explain``)."""
    table = PlanTable(settings)
    table.replace(ports, node)
    return dict(table.plans)


class PlanChange(Struct, frozen=True, kw_only=True):
    """What became of the plans."""

    upserts: dict[FrontendKey, FrontendPlan]
    """New and altered ones."""
    removes: tuple[FrontendKey, ...]

    def __bool__(self) -> bool:
        return bool(self.upserts or self.removes)

    @property
    def keys(self) -> tuple[FrontendKey, ...]:
        """Every key that was touched."""
        return (*self.upserts, *self.removes)


class PlanTable:
    """See the module. Before the first :meth:`replace` it is empty and knows no node."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._planner: Planner | None = None
        self._plans: dict[FrontendKey, FrontendPlan] = {}
        self._claims: dict[FrontendKey, dict[_Claim, FrontendPlan]] = {}
        self._keys_of: dict[ServicePortName, tuple[tuple[int, FrontendKey], ...]] = {}
        self.plans: MappingProxyType[FrontendKey, FrontendPlan] = MappingProxyType(self._plans)
        """The present plans: a live view, ``copy`` it to keep it (``dict()`` would hash all keys anew)."""

    def replace(self, ports: Iterable[ServicePort], node: NodeContext) -> PlanChange:
        """Take these as all service ports there are, on a node that may have changed."""
        self._planner = Planner(node)
        wanted = {port.name: port for port in ports}
        return self.apply(wanted.values(), [name for name in self._keys_of if name not in wanted])

    def apply(
        self, changed: Iterable[ServicePort], removed: Iterable[ServicePortName]
    ) -> PlanChange:
        """Take new or altered service ports and drop those removed; unknown names are fine."""
        if self._planner is None:
            raise ValueError("a plan table takes single changes only after replace()")
        touched: dict[FrontendKey, None] = {}
        for name in removed:
            self._withdraw(name, touched)
        for port in changed:
            self._withdraw(port.name, touched)
            if not is_steered(port, self._settings):
                continue
            keys = []
            for rank, plan in self._planner.plans_of(port):
                self._claims.setdefault(plan.key, {})[rank, port.name] = plan
                keys.append((rank, plan.key))
                touched[plan.key] = None
            if keys:
                self._keys_of[port.name] = tuple(keys)
        return self._settle(touched)

    def _withdraw(self, name: ServicePortName, touched: dict[FrontendKey, None]) -> None:
        for rank, key in self._keys_of.pop(name, ()):
            touched[key] = None
            claims = self._claims[key]
            del claims[rank, name]
            if not claims:
                del self._claims[key]

    def _settle(self, touched: Iterable[FrontendKey]) -> PlanChange:
        upserts: dict[FrontendKey, FrontendPlan] = {}
        removes: list[FrontendKey] = []
        for key in touched:
            before, plan = self._plans.get(key), self._winner(key)
            if plan is None:
                if before is not None:
                    del self._plans[key]
                    removes.append(key)
            elif plan != before:
                self._plans[key] = upserts[key] = plan
        return PlanChange(upserts=upserts, removes=tuple(removes))

    def _winner(self, key: FrontendKey) -> FrontendPlan | None:
        claims = self._claims.get(key)
        if claims is None:
            return None
        plan = claims[min(claims)]
        return None if self._settings.is_overlay and not is_served(plan) else plan
