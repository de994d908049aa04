"""nfqproxy beside the rules of a real kube-proxy: the same connections, answered alike but for what is listed.

Twin clusters (twins.py) hold the Services of ../shared/data/services.yaml: one runs the real nfqproxy, one has the
rules that kube-proxy v1.30 wrote for them in iptables mode, one those of its nftables mode. Every destination is
asked by every kind of client (twin_cases.py), and what differs must be in kube_proxy_differences.py. All of it
happens in one fixture, so that the proxy starts three times in the module: with its defaults, with the data path
``mark``, and configured to do as the iptables mode does. The fallback and the refusals are the same rules on both
data paths; without a worker they are asked once.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.kernel.counters import refusal_counters
from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.chi_square import chi_square
from nfqproxy.model import Family, Protocol
from tests.kernel.kube_proxy_differences import AS_PRIMARY, DIFFERENCES, Difference, Mode
from tests.kernel.manifests import Manifest
from tests.kernel.proxy import CLUSTER_CIDR, Proxy, run_cli, wait_until
from tests.kernel.responder import Responder
from tests.kernel.snapshot import restore_kube_proxy, shared, shared_objects
from tests.kernel.twin_cases import (
    BOUND_VIP,
    NODE,
    SECOND,
    SERVICE_CIDRS,
    Case,
    Place,
    Target,
    Who,
    cases,
    targets,
)
from tests.kernel.twins import Kind, Outcome, Outcomes, Twin, twin

SERVICE_CIDR = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {"name": "kubernetes"},
    "spec": {"cidrs": list(SERVICE_CIDRS)},
}
AS_IPTABLES = {
    "kind": "NfqproxyConfiguration",
    "nodePortAddresses": ["0.0.0.0/0", "::/0"],
    "localhostNodePorts": True,
}
"""What the table of differences names to do as the iptables mode does; and no ServiceCIDR object."""

# All happens in one fixture, where every question to a broken proxy waits for its own time-out.
pytestmark = pytest.mark.timeout(240)


class Stage(StrEnum):
    """Who answers."""

    IPTABLES = "kube-proxy, iptables"
    NFTABLES = "kube-proxy, nftables"
    WORKER = "nfqproxy"
    FALLBACK = "nfqproxy, killed"
    MARKED = "nfqproxy by marks"
    AS_IPTABLES = "nfqproxy as iptables"
    AS_IPTABLES_FALLBACK = "nfqproxy as iptables, killed"


OURS = (Stage.WORKER, Stage.FALLBACK, Stage.MARKED, Stage.AS_IPTABLES, Stage.AS_IPTABLES_FALLBACK)
Explained = dict[Case, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What all stages have shown."""

    outcomes: dict[Stage, Outcomes]
    offline: Explained
    """explain by the manifests alone."""
    running: dict[Stage, Explained]
    """explain by the running proxy."""
    packets: dict[Stage, int]
    """Packets that the worker read from its queue in stages WORKER and MARKED."""
    counters: dict[Stage, dict[str, int]]
    """What it counted as out of the ordinary."""
    refusals: dict[Stage, Counter[str]]
    """What the kernel refused in stages WORKER, FALLBACK and MARKED, by counter."""
    frontends: frozenset[str]
    """Members of the queue's sets in stage WORKER."""


# ------------------------------------------------------------------------------ explain


def ask_explain(node: Namespace, asked: Iterable[Case], packets: Path, *options: str) -> Explained:
    """``nfqproxy explain --packets`` about these cases."""
    asked = list(asked)
    lines = [json.dumps({"from": case.source, "to": str(case.packet)}) for case in asked]
    packets.write_text("\n".join(lines))
    done = run_cli(node, "explain", "--packets", str(packets), *options)
    assert done.returncode == 0, done.stderr + done.stdout[-500:]
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


def explain_offline(node: Namespace, asked: list[Case], folder: Path, manifest: Path) -> Explained:
    """By the manifests, which do not say which further addresses the node has."""
    options = ["--manifests", str(manifest), "--node", "n1", "--cluster-cidr", CLUSTER_CIDR]
    options += [text for address in SECOND.values() for text in ("--node-address", address)]
    found: Explained = {}
    for is_bound in (False, True):
        more = ("--node-address", BOUND_VIP) if is_bound else ()
        part = [case for case in asked if case.is_vip_bound is is_bound]
        found |= ask_explain(node, part, folder / "packets", *options, *more)
    return found


# ------------------------------------------------------------------------------- stages


def kube_proxy(mode: Mode, node: Namespace) -> None:
    """Put the rules of a mode on the node, and the sysctl that kube-proxy sets with them."""
    if mode is Mode.IPTABLES:
        restore_kube_proxy(node)
        node.sysctl({"net/ipv4/conf/all/route_localnet": 1})
    else:
        node.run("nft", "-f", "-", stdin=shared("kube-proxy-1.30-nftables.nft"))


class Stages:
    """Goes through the stages and keeps what they show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = shared_objects()
        self.cases = cases(self.objects)
        self.outcomes: dict[Stage, Outcomes] = {}
        self.running: dict[Stage, Explained] = {}
        self._silent: frozenset[Case] = frozenset()

    def foresee_silence(self, explained: Explained) -> None:
        silent = {case for case, answer in explained.items() if answer["verdict"] == "drop"}
        moved = {case for case in self.cases if case.on_primary in silent}
        self._silent = frozenset(silent | moved)

    def observe(self, stage: Stage, lab: Twin, proxy: Proxy | None = None) -> None:
        """Ask everything; the running proxy is asked to explain it too."""
        found: Outcomes = {}
        explained: Explained = {}
        silent = self._silent
        if stage in (Stage.IPTABLES, Stage.NFTABLES):
            silent = frozenset(c for c in silent if c.target.place is not Place.NO_OWNER)
        for is_bound in (False, True):
            part = [case for case in self.cases if case.is_vip_bound is is_bound]
            if is_bound and stage is Stage.AS_IPTABLES_FALLBACK:
                break  # nobody lives to notice the address; its node ports are as others
            with lab.bound_vip() if is_bound else nullcontext():
                if stage is Stage.AS_IPTABLES:
                    follow_addresses(lab.node, is_bound=is_bound)
                found |= lab.observe(part, silent)
                if proxy is not None:
                    explained |= ask_explain(lab.node, part, self.folder / "packets")
        self.outcomes[stage] = found
        if proxy is not None:
            self.running[stage] = explained


def members(node: Namespace) -> frozenset[str]:
    """Elements of the sets that queue packets: ``10.96.0.10,tcp:80``."""
    listing = node.run("ipset", "save").stdout
    return frozenset(re.findall(r"^add nfqproxy-frontends-\d (\S+)", listing, re.MULTILINE))


def follow_addresses(node: Namespace, *, is_bound: bool) -> None:
    """Wait until node ports are served on BOUND_VIP too, or no longer."""
    wait_until(
        lambda: (f"{BOUND_VIP},tcp:30080" in members(node)) is is_bound,
        f"node ports follow {BOUND_VIP}, which the node {'has' if is_bound else 'no longer has'}",
    )


def refusals(node: Namespace) -> Counter[str]:
    """The kernel's counters of refusals, both families together."""
    total: Counter[str] = Counter()
    for (_, name), packets in node.call(refusal_counters).items():
        total[name] += packets
    return total


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    folder = tmp_path_factory.mktemp("kube-proxy")
    stages = Stages(folder)
    objects: list[Manifest] = stages.objects
    with Responder() as responder:
        with (
            twin(responder, objects) as lab,
            Proxy(lab.node, [*objects, SERVICE_CIDR]) as proxy,
        ):
            offline = explain_offline(lab.node, stages.cases, folder, proxy.manifest)
            stages.foresee_silence(offline)
            frontends = members(lab.node)
            stages.observe(Stage.WORKER, lab, proxy)
            packets = {Stage.WORKER: proxy.packets()}
            counters = {Stage.WORKER: proxy.counters()}
            refused = {Stage.WORKER: refusals(lab.node)}
            killed(proxy, lab)
            stages.observe(Stage.FALLBACK, lab)
            refused[Stage.FALLBACK] = refusals(lab.node) - refused[Stage.WORKER]
        with (
            twin(responder, objects) as lab,
            Proxy(lab.node, [*objects, SERVICE_CIDR], data_path="mark") as proxy,
        ):
            stages.observe(Stage.MARKED, lab, proxy)
            packets[Stage.MARKED], counters[Stage.MARKED] = proxy.packets(), proxy.counters()
            refused[Stage.MARKED] = refusals(lab.node)
        for stage, mode in ((Stage.IPTABLES, Mode.IPTABLES), (Stage.NFTABLES, Mode.NFTABLES)):
            with twin(responder, objects) as lab:
                kube_proxy(mode, lab.node)
                lab.listen_for_health()
                stages.observe(stage, lab)
        config = folder / "config.yaml"
        config.write_text(json.dumps(AS_IPTABLES))
        with (
            twin(responder, objects) as lab,
            Proxy(lab.node, objects, "--config", str(config)) as proxy,
        ):
            stages.observe(Stage.AS_IPTABLES, lab, proxy)
            follow_addresses(lab.node, is_bound=False)
            killed(proxy, lab)
            stages.observe(Stage.AS_IPTABLES_FALLBACK, lab)
    return Observed(
        outcomes=stages.outcomes,
        offline=offline,
        running=stages.running,
        packets=packets,
        counters=counters,
        refusals=refused,
        frontends=frontends,
    )


def killed(proxy: Proxy, lab: Twin) -> None:
    """No process of the proxy is left; the kernel goes by what it was given."""
    proxy.kill()
    lab.forget_connections()
    lab.listen_for_health()


# -------------------------------------------------------------------------------- tests


def agree(case: Case, kube: Outcome, ours: Outcome) -> bool:
    """Whether two outcomes are the same; of two sticky draws each may be another."""
    is_one_each = len(kube.draws) == len(ours.draws) == 1
    if case.target.is_sticky and is_one_each and kube.draws.keys() != ours.draws.keys():
        return kube.kind is ours.kind
    return kube == ours


def listed(rows: Iterable[Difference], case: Case, mode: Mode) -> Difference | None:
    found = [row for row in rows if row.concerns(case, mode)]
    assert len(found) < 2, f"{case}: two rows of the table"
    return found[0] if found else None


PAIRS = (
    (Mode.IPTABLES, Stage.WORKER),
    (Mode.IPTABLES, Stage.FALLBACK),
    (Mode.IPTABLES, Stage.MARKED),
    (Mode.NFTABLES, Stage.WORKER),
    (Mode.NFTABLES, Stage.FALLBACK),
    (Mode.NFTABLES, Stage.MARKED),
    (Mode.IPTABLES, Stage.AS_IPTABLES),
    (Mode.IPTABLES, Stage.AS_IPTABLES_FALLBACK),
)


@pytest.mark.parametrize(("mode", "stage"), PAIRS)
def test_nothing_differs_but_what_is_listed_and_all_of_that_does(
    observed: Observed, mode: Mode, stage: Stage
) -> None:
    is_switched = stage in (Stage.AS_IPTABLES, Stage.AS_IPTABLES_FALLBACK)
    rows = [row for row in DIFFERENCES if not (is_switched and row.switch)]
    kube_stage = Stage.IPTABLES if mode is Mode.IPTABLES else Stage.NFTABLES
    kube, ours = observed.outcomes[kube_stage], observed.outcomes[stage]
    wrong = []
    used = set()
    for case in ours:
        row = listed(rows, case, mode)
        said = f"{case}\n    {kube_stage}: {kube[case]}\n    {stage}: {ours[case]}"
        if row is None:
            if not agree(case, kube[case], ours[case]):
                wrong.append(f"{said}\n    not listed")
            continue
        used.add(row.place)
        answer = row.answer(mode)
        if answer == AS_PRIMARY:
            is_right = kube[case] == kube[case.on_primary]
        else:
            is_right = kube[case].kind == answer
        if not is_right or ours[case].kind is not row.nfqproxy:
            wrong.append(f"{said}\n    listed: {answer} / {row.nfqproxy}")
    assert not wrong, f"{len(wrong)} of {len(ours)}:\n" + "\n".join(wrong)
    assert used == {row.place for row in rows if row.answer(mode) != row.nfqproxy}


VERDICTS = {
    "backend": {Kind.SERVED},
    "drop": {Kind.SILENCE},
    "reject": {Kind.REFUSED},
    "pass": {Kind.LEAVES, Kind.CLOSED, Kind.HERE},
}


CLASSES = {
    Who.NODE: "node",
    Who.VIP_OWNER: "node",
    Who.CLIENT: "external",
    Who.CLIENT_2: "external",
    Who.OUTSIDER: "external",
}
"""Class of each kind of client; all others are pods."""


def contradiction(case: Case, answer: Mapping[str, Any], outcome: Outcome) -> str:
    """What of an explanation a live outcome denies; empty if nothing."""
    if outcome.kind not in VERDICTS[answer["verdict"]]:
        return f"verdict {answer['verdict']}"
    if answer["client"] != CLASSES.get(case.who, "pod"):
        return f"client {answer['client']}"
    possible = {b["address"]: b for b in answer["backends"] if b["probability"]}
    if any(b["probability"] != pytest.approx(1 / len(possible)) for b in possible.values()):
        return f"chances {possible}, all weights being 1"
    names = {name for name, _ in outcome.seen} if outcome.kind is Kind.SERVED else set()
    if not (names <= possible.keys() if case.target.is_sticky else names == possible.keys()):
        return f"backends {sorted(possible)}"
    own = {NODE[case.target.family], BOUND_VIP} if case.is_vip_bound else {NODE[case.target.family]}
    for name, client in outcome.seen if names else ():
        if client not in (own if possible[name]["masquerade"] else {case.source}):
            return f"{name} masqueraded: {possible[name]['masquerade']}"
    return ""


@pytest.mark.parametrize("stage", OURS)
def test_explain_foretells_what_happens(observed: Observed, stage: Stage) -> None:
    told = {
        Stage.WORKER: observed.running[Stage.WORKER],
        Stage.FALLBACK: observed.offline,
        Stage.MARKED: observed.running[Stage.MARKED],
        Stage.AS_IPTABLES: observed.running[Stage.AS_IPTABLES],
        Stage.AS_IPTABLES_FALLBACK: observed.running[Stage.AS_IPTABLES],
    }[stage]
    wrong = [
        f"{case}\n    live: {outcome}\n    explain: {denied}: {told[case]['reason']}"
        for case, outcome in observed.outcomes[stage].items()
        if (denied := contradiction(case, told[case], outcome))
    ]
    assert not wrong, "\n".join(wrong)


def test_explain_says_the_same_with_and_without_the_proxy(observed: Observed) -> None:
    fields = ("verdict", "frontend", "client", "policy", "backends", "reason")
    running = observed.running[Stage.WORKER]
    differing = [
        f"{case}, {name}: {running[case][name]}, offline {offline[name]}"
        for case, offline in observed.offline.items()
        for name in fields
        if running[case][name] != offline[name]
    ]
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_client_with_affinity_keeps_its_endpoint(observed: Observed, stage: Stage) -> None:
    found = {c: o for c, o in observed.outcomes[stage].items() if c.target.is_sticky}
    moved = [f"{case}: {outcome}" for case, outcome in found.items() if len(outcome.draws) != 1]
    assert not moved, "\n".join(moved)
    # The same client asks again later, while BOUND_VIP is the node's.
    for case, outcome in found.items():
        before = Case(target=case.target, who=case.who, source=case.source)
        if case.is_vip_bound and before in found:
            assert outcome.draws.keys() == found[before].draws.keys(), str(case)
    assert set().union(*(outcome.draws for outcome in found.values())) == {
        address for case in found for _, address, _ in case.target.endpoints
    }


@pytest.mark.parametrize("stage", list(Stage))
def test_endpoints_share_alike(observed: Observed, stage: Stage) -> None:
    """Uniform for kube-proxy, and for us with equal weights: a lopsided draw shows at some hundred."""
    draws: dict[tuple[Target, frozenset[str]], Counter[str]] = {}
    for case, outcome in observed.outcomes[stage].items():
        if len(outcome.draws) > 1:
            group = (case.target, frozenset(outcome.draws))
            draws.setdefault(group, Counter()).update(outcome.draws)
    assert len({target.service for target, _ in draws}) == 5, "web, kube-dns, shop, lb, lb-local"
    for (target, names), counts in draws.items():
        p_value = chi_square([counts[name] for name in names], [1] * len(names)).p_value
        assert p_value > 1e-9, f"{target}: {counts}"


@pytest.mark.parametrize("stage", [Stage.WORKER, Stage.MARKED])
def test_the_worker_decided_what_was_served(observed: Observed, stage: Stage) -> None:
    connections = sum(sum(o.draws.values()) for o in observed.outcomes[stage].values())
    assert connections <= observed.packets[stage]
    # On a busy machine a SYN may be sent again before its answer is there.
    assert observed.counters[stage].keys() - {"retransmit"} == WORKERS_COUNTERS.keys()


@pytest.mark.parametrize("stage", [Stage.WORKER, Stage.FALLBACK, Stage.MARKED])
def test_silence_and_refusals_are_those_of_the_counters(observed: Observed, stage: Stage) -> None:
    """No packet was merely lost: each silent one is in the counter of its reason."""
    counted = observed.refusals[stage].copy()
    if stage in observed.counters:
        for name, kernels_name in WORKERS_COUNTERS.items():
            counted[kernels_name] += observed.counters[stage][name]
    expected: Counter[str] = Counter()
    for case, outcome in observed.outcomes[stage].items():
        if outcome.kind in (Kind.SILENCE, Kind.REFUSED):
            expected[COUNTERS[case.target.place, outcome.kind]] += 1
    assert expected.keys() == (+counted).keys()
    # Some are more: a SYN that is sent again is refused again.
    assert expected <= counted, f"{expected - counted} not counted"


WORKERS_COUNTERS = {
    "source_range_dropped": "source-range-dropped",
    "no_local_endpoint_dropped": "no-local-endpoint-dropped",
}
"""What a living worker drops before the kernel's rules see it; and the kernel's counter of it."""
COUNTERS = {
    (Place.CLUSTER_IP, Kind.REFUSED): "no-endpoints-rejected",
    (Place.NODE_PORT, Kind.REFUSED): "no-endpoints-rejected",
    (Place.CLUSTER_IP, Kind.SILENCE): "no-local-endpoint-dropped",
    (Place.NODE_PORT, Kind.SILENCE): "no-local-endpoint-dropped",
    (Place.LB_IP, Kind.SILENCE): "source-range-dropped",
    (Place.NO_PORT, Kind.REFUSED): "no-port-rejected",
    (Place.PING, Kind.REFUSED): "no-port-rejected",
    (Place.NO_OWNER, Kind.SILENCE): "no-owner-dropped",
}


def test_the_queue_is_asked_for_what_is_served_and_nothing_else(observed: Observed) -> None:
    """The headless Service, those without endpoints and wrong ports among it."""
    served = {
        f"{case.target.address},{case.target.protocol.name.lower()}:{case.target.port}"
        for case, outcome in observed.outcomes[Stage.WORKER].items()
        if outcome.kind is Kind.SERVED and case.target.protocol is not None
    }
    assert observed.frontends == served


def test_every_frontend_of_the_dumps_is_asked_about() -> None:
    """What kube-proxy made of the manifests is what twin_cases.py made of them."""
    asked = {(t.address, t.protocol, t.port) for t in targets(shared_objects())}
    for family, tool in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables")):
        dump = shared(f"kube-proxy-1.30-{tool}.save")
        rules = re.findall(r"^-A KUBE-SERVICES -d (\S+)/\d+ -p (\w+) .* --dport (\d+)", dump, re.M)
        rules += [
            (NODE[family], *found)
            for chain in ("NODEPORTS", "EXTERNAL-SERVICES")
            for found in re.findall(rf"^-A KUBE-{chain} -p (\w+) .* --dport (\d+)", dump, re.M)
        ]
        assert rules
        found = {(address, Protocol[name.upper()], int(port)) for address, name, port in rules}
        assert found - asked <= {("10.96.0.1", Protocol.TCP, 443)}, "default/kubernetes"
