"""The chains behind a frontend: KUBE-FW, KUBE-EXT (KUBE-XLB before v1.24), KUBE-SVC, KUBE-SVL, KUBE-SEP.

What each means to a connection (k8s.io/kubernetes pkg/proxy/iptables/proxier.go, v1.2 to v1.37):

- SVC, SVL: one endpoint by chance, after those this client was sent to of late. SVC holds the cluster's
  endpoints, SVL those of this node.
- SEP: one endpoint; masqueraded when it is the client itself.
- EXT: traffic from outside. externalTrafficPolicy Cluster masquerades all and goes to SVC; Local goes to
  SVL, but for pods and the node itself, which go to SVC. XLB is EXT of Local with the endpoints in it.
- FW: loadBalancerSourceRanges, then EXT (before v1.24 XLB or SVC).

A chain leads only to those further right in this list, so there are no loops.
"""

from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct, structs

from nfqproxy.sources.iptables.rule import Rule, RuleError, host, parse
from nfqproxy.sources.iptables.shares import is_out_of_order
from nfqproxy.sources.iptables.text import Loss, Table

MASQUERADE = "KUBE-MARK-MASQ"
_DROP = "KUBE-MARK-DROP"


class Kind(StrEnum):
    """What a chain is, by the beginning of its name."""

    FIREWALL = "KUBE-FW-"
    EXTERNAL = "KUBE-EXT-"
    OLD_EXTERNAL = "KUBE-XLB-"
    CLUSTER = "KUBE-SVC-"
    LOCAL = "KUBE-SVL-"
    ENDPOINT = "KUBE-SEP-"


_EXTERNALS = (Kind.EXTERNAL, Kind.OLD_EXTERNAL)
_SETS = (Kind.CLUSTER, Kind.LOCAL)


def kind_of(chain: str) -> Kind | None:
    """The kind of a chain of this name."""
    return next((kind for kind in Kind if chain.startswith(kind)), None)


class Pick(Struct, frozen=True):
    """An endpoint and its chance."""

    address: str
    """Empty: not to be found out."""
    port: int
    probability: float
    """Of the new connections that reach this rule, 0 to 1."""
    line: int


class Picks(Struct, kw_only=True):
    """What a connection may be given, in the order of the rules."""

    line: int
    picks: list[Pick] = []
    affinity_s: int = 0
    """0: none."""


class Target(Struct, kw_only=True):
    """Where a frontend leads."""

    cluster: Picks | None = None
    """None: the rules do not say."""
    local: Picks | None = None
    """None: no policy Local, or no endpoint on this node."""
    is_local: bool = False
    """Policy Local."""
    ranges: tuple[str, ...] = ()
    """loadBalancerSourceRanges."""


class Detector(Struct):
    """What the rules show of the configuration of kube-proxy, as it writes it into every chain."""

    pod_networks: dict[str, None] = {}
    pod_interfaces: dict[str, None] = {}
    masquerades_all: bool = False


class Chains:
    """The chains of table nat of one family, each read once."""

    def __init__(self, table: Table, losses: list[Loss]) -> None:
        self.table = table
        self.detector = Detector()
        self._losses = losses
        self._reached: set[str] = set()
        self._targets: dict[str, Target | None] = {}
        self._sets: dict[str, Picks | None] = {}
        self._endpoints: dict[str, tuple[str, int] | None] = {}

    def lose(self, line: int, problem: str, table: Table | None = None) -> None:
        """Take down what is not read of a line (of another table of the family)."""
        self._losses.append(Loss((table or self.table).origin, line, problem))

    def rules(self, chain: str, table: Table | None = None) -> Iterator[Rule]:
        """The rules of a chain (of another table of the family) that are understood."""
        table = table or self.table
        for line in table.chains.get(chain, ()):
            try:
                yield parse(line.number, line.text, table.family)
            except RuleError as error:
                self.lose(line.number, f"{error}; the rule is left out", table)

    def lose_unreached(self) -> None:
        """Take down the chains of Services and endpoints that no rule has led to."""
        for chain, line in self.table.declared.items():
            if kind_of(chain) is not None and chain not in self._reached:
                self.lose(line, f"chain {chain} is led to by no rule; it is left out")

    def is_there(self, rule: Rule) -> bool:
        """Whether the chain that a rule leads to has rules; taken down if not."""
        self._reached.add(rule.target)
        if self.table.chains.get(rule.target):
            return True
        what = "has no rules" if rule.target in self.table.chains else "is not there"
        self.lose(rule.line, f"leads to chain {rule.target}, which {what}")
        return False

    def target(self, rule: Rule) -> Target | None:
        """Where the rule of a frontend leads; None, with the loss taken down, if that is not understood."""
        kind = kind_of(rule.target)
        if kind is None or kind is Kind.ENDPOINT:
            self.lose(rule.line, f"a jump to {rule.target or 'nowhere'} is not understood here")
            return None
        if not self.is_there(rule):
            return None
        if rule.target not in self._targets:
            self._targets[rule.target] = self._read(rule, kind)
        return self._targets[rule.target]

    def _read(self, rule: Rule, kind: Kind) -> Target | None:
        chain = rule.target
        match kind:
            case Kind.FIREWALL:
                return self._firewall(rule, chain)
            case Kind.EXTERNAL | Kind.OLD_EXTERNAL:
                return self._external(chain)
            case Kind.LOCAL:
                return Target(local=self._picks(chain), is_local=True)
            case _:
                return Target(cluster=self._picks(chain))

    def _firewall(self, frontend: Rule, chain: str) -> Target | None:
        found: Target | None = None
        ranges: dict[str, None] = {}
        is_open = False
        for rule in self.rules(chain):
            if rule.target in ("", MASQUERADE, _DROP) and not rule.conditions:
                continue
            if kind_of(rule.target) not in (*_EXTERNALS, *_SETS) or not rule.conditions <= {
                "source"
            }:
                self._strange(rule, chain)
                continue
            if rule.source is None:
                is_open = True
            else:
                ranges[rule.source] = None
            found = self.target(rule) or found
        if found is None:
            # Without ranges the frontend would be open to everybody.
            self.lose(
                frontend.line, f"no rule of chain {chain} is understood; the frontend is left out"
            )
            return None
        return structs.replace(found, ranges=() if is_open else tuple(ranges))

    def _external(self, chain: str) -> Target:
        found = Target(is_local=True)
        balancing: list[Rule] = []
        for rule in self.rules(chain):
            kind = kind_of(rule.target)
            wheres = rule.conditions
            if rule.target in (MASQUERADE, _DROP):
                if wheres - {"is_from_node"}:
                    self._strange(rule, chain)
            elif kind is Kind.CLUSTER and not wheres:
                found.is_local = False
                found.cluster = self._set_of(rule)
            elif kind is Kind.CLUSTER and wheres in ({"source"}, {"in_interface"}):
                self._see_pods(rule.source, rule.in_interface)
                found.cluster = self._set_of(rule)
            elif kind is Kind.CLUSTER and wheres == {"is_from_node"} and rule.is_from_node:
                found.cluster = self._set_of(rule)
            elif kind is Kind.LOCAL and not wheres:
                found.local = self._set_of(rule)
            elif kind is Kind.ENDPOINT:
                balancing.append(rule)
            else:
                self._strange(rule, chain)
        if balancing:
            found.local = self._balancing(balancing, chain)
        return found

    def _set_of(self, rule: Rule) -> Picks | None:
        return self._picks(rule.target) if self.is_there(rule) else None

    def _picks(self, chain: str) -> Picks | None:
        """The endpoints of an SVC or SVL chain; None for one that drops."""
        if chain in self._sets:
            return self._sets[chain]
        self._sets[chain] = None
        balancing: list[Rule] = []
        for rule in self.rules(chain):
            if kind_of(rule.target) is Kind.ENDPOINT:
                balancing.append(rule)
            elif rule.target == MASQUERADE:
                self.see_masquerade(rule, chain)
            elif rule.target != _DROP or rule.conditions:
                self._strange(rule, chain)
        if balancing:
            self._sets[chain] = self._balancing(balancing, chain)
        return self._sets[chain]

    def see_masquerade(self, rule: Rule, chain: str) -> None:
        """Take note of the clients of a cluster IP that are masqueraded: all but pods, or all.

        (v1.20 to v1.23 have here those of external addresses and node ports too.)
        """
        rest = rule.conditions - {"protocol", "port", "destination"}
        if rest in ({"not_source"}, {"not_in_interface"}):
            self._see_pods(rule.not_source, rule.not_in_interface)
        elif rest:
            self._strange(rule, chain)
        elif rule.comment.endswith(" cluster IP"):
            self.detector.masquerades_all = True

    def _see_pods(self, network: str | None, interface: str | None) -> None:
        if network is not None:
            self.detector.pod_networks[network] = None
        if interface is not None:
            self.detector.pod_interfaces[interface] = None

    def _balancing(self, rules: list[Rule], chain: str) -> Picks:
        found = Picks(line=rules[0].line, picks=[])
        for rule in rules:
            if rule.conditions - {"probability", "remembered_s"}:
                self._strange(rule, chain)
                continue
            if rule.remembered_s is not None:
                if found.affinity_s not in (0, rule.remembered_s):
                    self.lose(
                        rule.line,
                        f"an affinity of {rule.remembered_s} s after one of {found.affinity_s} s in the"
                        " same chain; the first is taken",
                    )
                found.affinity_s = found.affinity_s or rule.remembered_s
                continue
            chance = 1.0 if rule.probability is None else rule.probability
            found.picks.append(Pick(*(self._endpoint(rule) or ("", 0)), chance, rule.line))
        self._check_order(found, chain)
        return found

    def _check_order(self, found: Picks, chain: str) -> None:
        """Take down what the weights will not say of these chances."""
        chances = [pick.probability for pick in found.picks]
        if is_out_of_order(chances):
            self.lose(
                found.line,
                f"the rules of chain {chain} are not in kube-proxy's order (was the text sorted?); all its"
                " endpoints are taken to share alike",
            )
            found.picks = sorted(found.picks, key=lambda pick: pick.probability)
        elif chances and chances[-1] < 1 and 1.0 not in chances:
            self.lose(
                found.picks[-1].line,
                f"the last endpoint of chain {chain} takes not all that is left; its endpoints are taken to"
                " share that too",
            )
        elif 1.0 in chances[:-1]:
            self.lose(
                found.picks[chances.index(1.0) + 1].line,
                f"stands behind a rule of chain {chain} that takes all; this endpoint and later ones get"
                " weight 0",
            )

    def _endpoint(self, rule: Rule) -> tuple[str, int] | None:
        if not self.is_there(rule):
            return None
        chain = rule.target
        if chain in self._endpoints:
            if self._endpoints[chain] is None:
                self.lose(rule.line, f"leads to chain {chain}, which names no endpoint")
            return self._endpoints[chain]
        found: tuple[str, int] | None = None
        hairpin: Rule | None = None
        for each in self.rules(chain):
            if each.target == "DNAT" and each.dnat and each.conditions <= {"protocol"}:
                if found is not None:
                    self.lose(each.line, f"a second endpoint in chain {chain}; the first is taken")
                found = found or each.dnat
            elif each.target == MASQUERADE and each.conditions == {"source"}:
                hairpin = each
            else:
                self._strange(each, chain)
        if found is None:
            self.lose(rule.line, f"leads to chain {chain}, which names no endpoint")
        elif hairpin is not None and host(hairpin.source or "") != found[0]:
            self.lose(
                hairpin.line,
                f"masquerades {hairpin.source}, though the endpoint of chain {chain} is {found[0]};"
                " the rule is left out",
            )
        self._endpoints[chain] = found
        return found

    def _strange(self, rule: Rule, chain: str) -> None:
        name = kind_of(chain) or chain
        self.lose(
            rule.line,
            f"a rule to {rule.target or 'nowhere'} with these conditions is not one that kube-proxy writes"
            f" in {name.removesuffix('-')}; it is left out",
        )
