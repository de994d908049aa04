"""Where the steps of a scenario play: puts Services before the proxy, sends probes, judges them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import msgspec
from msgspec import Struct

from nfqproxy.api import admin
from nfqproxy.core.explain import Explanation
from nfqproxy.lab.attempt import Attempt, Outcome, attempt, get_json
from nfqproxy.lab.experiment import (
    Explained,
    Probe,
    ProbeResult,
    Seen,
    Situation,
    StepResult,
    judge,
    seen,
)
from nfqproxy.lab.objects import Service
from nfqproxy.lab.two_nodes import TwoNodes
from nfqproxy.model import Family, FrontendKey
from nfqproxy.model import Protocol as ProtocolNumber

__all__ = ["Audience", "Stage", "Step", "play"]

_PATIENCE_S = {Outcome.SERVED: 5.0, Outcome.REFUSED: 2.5, Outcome.DROPPED: 0.5}
"""How long a client waits, by what it should get."""
_GIVE_UP = 2
"""After so many connections that went wrong the rest of a probe is not sent."""


class Audience(Protocol):
    """Is shown the play as it happens."""

    def step_begins(self, number: int, step: "Step") -> None:
        """A heading."""
        ...

    def situation(self, title: str) -> None:
        """Something has changed before the next probes."""
        ...

    def probe(self, result: ProbeResult) -> None:
        """What came of one."""
        ...

    def step_ends(self, result: StepResult) -> None:
        """Time for a pause."""
        ...


class Stage:
    """What a step may do; remembers what came of it."""

    def __init__(self, lab: TwoNodes, audience: Audience) -> None:
        self.lab = lab
        self._audience = audience
        self._situations: list[tuple[str, list[ProbeResult]]] = []
        self._proxy_answers = True

    # -------------------------------------------------------------------------------- the scene

    def situation(self, title: str, *services: Service) -> None:
        """From now on these are the cluster's Services, or those of before if there are none here."""
        if services:
            objects = [one for service in services for one in service.objects()]
            self.lab.follow(self.lab.manifests(objects))
        self._situations.append((title, []))
        self._audience.situation(title)

    def restart_workers(self, title: str) -> None:
        """All workers are killed and replaced."""
        self.lab.restart_workers()
        self.situation(title)

    @contextmanager
    def without_proxy(self, title: str) -> Iterator[None]:
        """The whole proxy is killed; another starts after the block."""
        with self.lab.without_proxy():
            self._proxy_answers = False
            self.situation(title)
            yield
        self._proxy_answers = True

    # ------------------------------------------------------------------------------- the players

    def send(self, *probes: Probe) -> tuple[ProbeResult, ...]:
        """Send probes, all at once; what came of them, in their order."""
        pairs = [(probe, to) for probe in probes for to in probe.to]
        with ThreadPoolExecutor(max_workers=len(pairs)) as threads:
            parts = list(threads.map(lambda pair: self._attempts(*pair), pairs))
        reasons = self._explain(pairs)
        results, position = [], 0
        for probe in probes:
            own = slice(position, position + len(probe.to))
            position += len(probe.to)
            results.append(self._result(probe, parts[own], reasons[own]))
        self._tell(*results)
        return tuple(results)

    def check_health(self, source: str, port: int, *, status: int, endpoints: int) -> None:
        """Ask a health-check node port as a load balancer does, in both families."""
        namespace = self.lab.namespace(source)
        node = self.lab.topology.node
        answers = []
        for address in (node.address4, node.address6):
            try:
                got, document = namespace.call(
                    partial(get_json, address, port, timeout_s=_PATIENCE_S[Outcome.SERVED])
                )
                answers.append(f"HTTP {got}, localEndpoints {document.get('localEndpoints')}")
            except OSError as error:
                answers.append(f"no answer: {error}")
        expected = f"HTTP {status}, localEndpoints {endpoints}"
        self._tell(
            ProbeResult(
                source=source,
                sent=f"GET http://{node.address4}:{port}/",
                expected=expected,
                seen=(),
                answer=" and ".join(dict.fromkeys(answers)),
                problems=tuple(f"got {answer}" for answer in answers if answer != expected),
            )
        )

    def _tell(self, *results: ProbeResult) -> None:
        for result in results:
            self._situations[-1][1].append(result)
            self._audience.probe(result)

    def finish(self, number: int, title: str) -> StepResult:
        """What came of the step; the next one begins anew."""
        situations = tuple(
            Situation(title=name, probes=tuple(probes)) for name, probes in self._situations
        )
        self._situations = []
        return StepResult(number=number, title=title, situations=situations)

    # --------------------------------------------------------------------------------- one probe

    def _attempts(self, probe: Probe, to: FrontendKey) -> list[Attempt]:
        patience = _PATIENCE_S[probe.expect.outcome]

        def connect() -> list[Attempt]:
            found: list[Attempt] = []
            for number in range(probe.times):
                source = probe.bind[number % len(probe.bind)] if probe.bind else ""
                made = attempt(to, source=source, timeout_s=patience)
                found.append(msgspec.structs.replace(made, source=source))
                if sum(one.outcome is not probe.expect.outcome for one in found) == _GIVE_UP:
                    break
            return found

        return self.lab.namespace(probe.source).call(connect)

    def _explain(self, pairs: Sequence[tuple[Probe, FrontendKey]]) -> list[Explained]:
        """What the running proxy says of these very packets; nothing while it cannot be asked."""
        if not self._proxy_answers:
            return []
        packets = [{"from": self._source(probe, to), "to": str(to)} for probe, to in pairs]
        answer = self.lab.node.call(lambda: admin.ask("explain", packets=packets))
        explanations = msgspec.convert(answer["explanations"], list[Explanation])
        return [Explained(verdict=one.verdict, reason=one.reason) for one in explanations]

    def _source(self, probe: Probe, to: FrontendKey) -> str:
        if probe.bind:
            return probe.bind[0]
        host = self.lab.host(probe.source)
        return host.address6 if to.family is Family.IPV6 else host.address4

    def _result(
        self, probe: Probe, parts: Sequence[list[Attempt]], reasons: Sequence[Explained]
    ) -> ProbeResult:
        node, host = self.lab.topology.node, self.lab.host(probe.source)
        found: list[Seen] = []
        problems: list[str] = []
        for index, (to, attempts) in enumerate(zip(probe.to, parts, strict=True)):
            found.append(seen(self._source(probe, to), to, attempts))
            problems += judge(
                probe,
                found[-1],
                clients=frozenset(probe.bind or (host.address4, host.address6)),
                nodes=frozenset((node.address4, node.address6)),
                explained=reasons[index] if reasons else None,
            )
        return ProbeResult(
            source=probe.source,
            sent=_sent(probe),
            expected=str(probe.expect),
            seen=tuple(found),
            explained=tuple(reasons),
            problems=tuple(problems),
        )


def _sent(probe: Probe) -> str:
    is_udp = probe.to[0].protocol is ProtocolNumber.UDP
    noun = ("DNS query", "DNS queries") if is_udp else ("connection", "connections")
    text = f"{probe.times} {noun[probe.times > 1]}"
    if probe.bind:
        text += f" from {len(probe.bind)} addresses"
    return f"{text}, and {probe.times} over IPv6" if len(probe.to) > 1 else text


class Step(Struct, frozen=True, kw_only=True):
    """One matter that is shown."""

    title: str
    point: str
    """What there is to see, in a sentence."""
    show: Callable[[Stage], None]


def play(stage: Stage, audience: Audience, number: int, step: Step) -> StepResult:
    """Show one step from its heading to its end."""
    audience.step_begins(number, step)
    step.show(stage)
    result = stage.finish(number, step.title)
    audience.step_ends(result)
    return result
