"""The worked vectors as real packets: every scenario file, by each protocol and family, with a worker and without.

``tests/scenarios`` says what must happen and is held against ``explain`` there. Here the same files make the
running proxy's configuration and manifests, and the packets are sent: TCP and UDP by sockets, SCTP by INIT
chunks through raw sockets, 127.0.0.1 from outside by frames. Asserted is what a client and a backend can tell:

- backend: the candidates that answer, all of them and no other, and the source address that they saw;
- reject: the ICMP error, port unreachable, and that a socket feels it as ECONNREFUSED;
- drop: silence, and that our counters or the worker account for each such packet;
- pass: that it arrives where the routes lead, from the client's own address.

In the phases *alive* and *marked* it is the worker that decides, on the data paths ``ctnetlink`` and
``mark``, in *killed* the fallback alone, while the supervisor goes on following the manifests. One proxy runs
per configuration and phase and follows from vector to vector; all packets of a vector are sent at once. The
tests then only look up what became of theirs.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from nfqproxy.api import admin
from nfqproxy.kernel import node_rules
from nfqproxy.kernel.counters import queue_statistics, refusal_counters
from nfqproxy.model import Family, FrontendKey, Protocol
from tests.kernel.probes import QUIET_S, REFUSED, SILENCE, ping, probe
from tests.kernel.proxy import Proxy
from tests.kernel.responder import TIMEOUT_S, parse
from tests.kernel.vector_world import NAMES, PRIMARY, SEEN_BY, VectorWorld, next_port, vector_world
from tests.scenarios.twins import TWINS, Case, Object, cases, objects, twin

PHASES = ("alive", "marked", "killed")
LISTED = sorted(cases(), key=lambda case: case.config)
PARAMETERS = [
    pytest.param(phase, case, id=f"{case}-{phase}")
    for group in [tuple(g) for _, g in itertools.groupby(LISTED, key=lambda case: case.config)]
    for phase in PHASES
    for case in group
]

LEAST, MOST = 12, 80
"""Connections where several backends are possible; that all of 80 meet one of two has a chance of 2^-79."""
_DROPS = (
    "source-range-dropped",
    "no-local-endpoint-dropped",
    "no-owner-dropped",
    "martian-dropped",
)
_DROPS_OF_WORKERS = ("source_range_dropped", "no_local_endpoint_dropped")


@dataclass(kw_only=True)
class Found:
    """What became of one case's packets."""

    outcomes: set[str] = field(default_factory=set)
    """"NAME SOURCE" of servers, or what the probe told."""
    explained: str = ""
    """The verdict that explain gives."""
    account: tuple[str, str] = ("", "")
    """What all packets of the step ought to have counted, and what they have."""


@dataclass(frozen=True)
class Step:
    """The cases of one manifest."""

    vector: int
    as_in_file: bool
    cases: tuple[Case, ...]

    def objects(self, mark: int) -> list[Object]:
        """The manifest; ``mark`` tells it from the last one, whose plans may be the same."""
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "mark"},
            "spec": {"clusterIP": f"10.96.255.{mark}", "ports": [{"port": 9}]},
        }
        return [*objects(self.vector, as_in_file=self.as_in_file), service]


def steps(wanted: Sequence[Case]) -> list[Step]:
    """The cases by manifest, in order."""
    return [
        Step(vector, as_in_file, tuple(group))
        for (vector, as_in_file), group in itertools.groupby(
            sorted(wanted, key=lambda c: (c.vector, c.objects_as_in_file)),
            key=lambda c: (c.vector, c.objects_as_in_file),
        )
    ]


class Runs:
    """What became of all cases of a configuration and phase; each is run when it is first asked for."""

    def __init__(
        self, world: VectorWorld, wanted: Sequence[tuple[str, Case]], folder: Path
    ) -> None:
        self.world = world
        self._wanted = wanted
        self._folder = folder
        self._found: dict[tuple[str, Case], Found] = {}
        self._failures: dict[tuple[str, str], Exception] = {}

    def found(self, phase: str, case: Case) -> Found:
        """What became of this case."""
        run = (phase, case.config)
        if (phase, case) not in self._found and run not in self._failures:
            try:
                self._run(*run, steps([c for p, c in self._wanted if (p, c.config) == run]))
            except Exception as error:
                # Not tried again for each of its cases.
                self._failures[run] = error
        if (phase, case) not in self._found:
            raise AssertionError(f"the run ended before {case}") from self._failures[run]
        return self._found[phase, case]

    def _run(self, phase: str, config: str, batch: Sequence[Step]) -> None:
        file = self._folder / "config.yaml"
        file.write_text(json.dumps({"kind": "NfqproxyConfiguration", **json.loads(config)}))
        node = self.world.node
        mode = json.loads(config).get("mode", "replace")
        flags = ("--config", str(file))
        path = "mark" if phase == "marked" else "ctnetlink"
        try:
            with Proxy(
                node, batch[0].objects(0), *flags, cluster_cidr="", mode=mode, data_path=path
            ) as proxy:
                if phase == "killed":
                    proxy.lose_workers()
                for mark, step in enumerate(batch, start=1):
                    addresses = step.cases[0].node_addresses
                    with self.world.node_addresses(addresses):
                        # The worker, too, has heard of the addresses when it has followed.
                        if step is not batch[0] or addresses:
                            proxy.follow(step.objects(mark))
                        self._send(phase, proxy, step)
        finally:
            node.call(node_rules.cleanup)

    def _send(self, phase: str, proxy: Proxy, step: Step) -> None:
        before = self._count(proxy)
        if phase == "killed":
            assert self.world.node.call(queue_statistics) == {}, "somebody reads the queue"
        asked = [{"from": case.origin, "to": case.target} for case in step.cases]
        told = self.world.node.call(lambda: admin.ask("explain", packets=asked))["explanations"]
        found = {
            case: Found(explained=answer["verdict"])
            for case, answer in zip(step.cases, told, strict=True)
        }
        with ThreadPoolExecutor(len(step.cases)) as pool:
            sent = list(pool.map(lambda case: self._probe(case, found[case]), step.cases))
        after = self._count(proxy)
        served = sum(
            n for case, n in zip(step.cases, sent, strict=True) if case.verdict == "backend"
        )
        dropped = sum(is_counted_drop(case) for case in step.cases)
        expected = {"installed": 0 if phase == "killed" else served, "dropped": dropped}
        counted = {name: after[name] - before[name] for name in expected}
        for case in step.cases:
            found[case].account = (str(expected), str(counted))
            self._found[phase, case] = found[case]

    def _count(self, proxy: Proxy) -> dict[str, int]:
        """Entries that workers have made, and packets that they or the kernel's rules have dropped."""
        workers = proxy.status()["workers"]
        counters = self.world.node.call(refusal_counters)
        installed = sum(worker["installed"] for worker in workers)
        by_rule = sum(packets for (_, name), packets in counters.items() if name in _DROPS)
        # Datagrams it leaves to the rules: conntrack may know their flows.
        by_worker = sum(
            worker["counters"].get(name, 0) for worker in workers for name in _DROPS_OF_WORKERS
        )
        return {"installed": installed, "dropped": by_rule + by_worker}

    def _probe(self, case: Case, found: Found) -> int:
        """Send what the case asks for; returns how many connections that were."""
        namespace = self.world.namespace_of(case.source)
        wanted = {NAMES[address] for address, _ in case.backends}
        for count in range(1, MOST + 1):
            if case.source not in ("127.0.0.1", "::1") and case.address in ("127.0.0.1", "::1"):
                outcome = self.world.probe_by_frame(case.source, case.key)
            else:
                try:
                    outcome = namespace.call(lambda: ask(case))
                except (AssertionError, OSError) as error:
                    outcome = f"? {error}"
            found.outcomes.add(outcome)
            names = {outcome.split()[0] for outcome in found.outcomes}
            if len(wanted) < 2 or not names <= wanted or (count >= LEAST and names == wanted):
                break
        return count


def ask(case: Case) -> str:
    """One connection from the calling thread's namespace: "NAME SOURCE" of who answers, or what comes back."""
    source = (case.source, next_port())
    # Silence is taken for such at once only where it is expected.
    patience_s = QUIET_S if case.verdict == "drop" else TIMEOUT_S
    if case.protocol is None:
        return ping(case.address, source, patience_s=patience_s)
    outcome = probe(case.key, source, patience_s=patience_s)
    if "\n" not in outcome:
        return outcome
    answer = parse(outcome.encode())
    return f"{answer.name} {answer.client}"


def is_counted_drop(case: Case) -> bool:
    """Whether our rules or the worker drop it, and not the kernel's routing."""
    if case.verdict != "drop":
        return False
    if case.address not in ("127.0.0.1", "::1"):
        return True
    guarded = json.loads(case.config).get("localhostNodePorts", False)
    return bool(guarded) and case.family is Family.IPV4


def expected(case: Case) -> set[str]:
    """All that may come back, and must."""
    match case.verdict:
        case "backend":
            return {
                f"{NAMES[address]} "
                + (case.source if seen == "client" else SEEN_BY[NAMES[address]][case.family])
                for address, seen in case.backends
            }
        case "reject":
            return {REFUSED[case.family]}
        case "drop":
            return {SILENCE}
        case "pass":
            # To the node's own server on the loopback address, else wherever the default route leads.
            return {f"{'n1' if case.source in ('127.0.0.1', '::1') else 'outside'} {case.source}"}
        case verdict:
            raise AssertionError(f"{case}: no such verdict as {verdict}")


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    # Only what was selected, so that a single vector is quick to try.
    chosen = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == Path(__file__)
        and hasattr(item, "callspec")
    ]
    wanted = [(str(each["phase"]), cast("Case", each["case"])) for each in chosen]
    with ExitStack() as stack:
        world = stack.enter_context(vector_world())
        yield Runs(world, wanted, tmp_path_factory.mktemp("vectors"))


def test_a_frame_that_is_not_for_the_loopback_address_is_answered(runs: Runs) -> None:
    """So that silence about vector 22 is the node's, and not a frame's that never arrived."""
    for address in (PRIMARY, TWINS[PRIMARY]):
        for protocol in Protocol:
            source = twin("192.0.2.50", FrontendKey(protocol, address, 9).family)
            answer = runs.world.probe_by_frame(source, FrontendKey(protocol, address, 9))
            assert answer != SILENCE, f"{protocol} to {address}"


@pytest.mark.parametrize(("phase", "case"), PARAMETERS)
def test_vector(runs: Runs, phase: str, case: Case) -> None:
    found = runs.found(phase, case)
    assert found.outcomes == expected(case)
    assert found.explained == case.verdict
    should, did = found.account
    assert did == should, "of all packets of this vector"
