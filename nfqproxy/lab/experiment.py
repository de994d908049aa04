"""The values of a scenario in steps: probes, what is expected of them, what was seen, the judgement.

A step shows one matter in one or more situations; in each, probes are sent and judged.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from nfqproxy.lab.attempt import Attempt, Outcome
from nfqproxy.model import FrontendKey, Verdict

__all__ = [
    "Expectation",
    "Explained",
    "Probe",
    "ProbeResult",
    "Run",
    "Seen",
    "Situation",
    "StepResult",
    "Sticks",
    "dropped",
    "judge",
    "refused",
    "seen",
    "served",
]

_VERDICTS = {
    Outcome.SERVED: Verdict.BACKEND,
    Outcome.REFUSED: Verdict.REJECT,
    Outcome.DROPPED: Verdict.DROP,
}


class Sticks(StrEnum):
    """How a probe's connections share the expected backends."""

    NO = "no"
    """Each backend gets some."""
    YES = "yes"
    """All go to one of them."""


class Expectation(Struct, frozen=True, kw_only=True):
    """What every connection of a probe must meet."""

    outcome: Outcome
    backends: tuple[str, ...] = ()
    sticks: Sticks = Sticks.NO
    seen_as: str = ""
    """``client``: the backend sees the client's own address; ``node``: the node's; empty: not asked."""
    kept: Mapping[str, str] = {}
    """Backends that clients, by address, had before and must get again."""

    def __str__(self) -> str:
        match self.outcome:
            case Outcome.REFUSED:
                return "refused at once: ICMP port unreachable"
            case Outcome.DROPPED:
                return "silently dropped"
        names = ", ".join(self.backends)
        if self.sticks is Sticks.YES and len(self.backends) > 1:
            names = f"one of {names}, always the same"
        if self.kept:
            names += f", {len(self.kept)} clients by the one they had"
        told = {"client": ", seen as the client", "node": ", seen as the node"}
        return f"served by {names}{told.get(self.seen_as, '')}"


def served(
    *backends: str,
    seen_as: str = "",
    sticks: Sticks = Sticks.NO,
    kept: Mapping[str, str] | None = None,
) -> Expectation:
    """Every connection is served, by these backends and no others."""
    return Expectation(
        outcome=Outcome.SERVED, backends=backends, seen_as=seen_as, sticks=sticks, kept=kept or {}
    )


def refused() -> Expectation:
    """An ICMP error at once."""
    return Expectation(outcome=Outcome.REFUSED)


def dropped() -> Expectation:
    """Silence."""
    return Expectation(outcome=Outcome.DROPPED)


class Probe(Struct, frozen=True, kw_only=True):
    """New connections from one host to one frontend, in one or both families."""

    source: str
    """Short name of the host: c1, n1, pod-1-13."""
    to: tuple[FrontendKey, ...]
    """One address per family."""
    expect: Expectation
    times: int = 1
    """Connections to each."""
    bind: tuple[str, ...] = ()
    """Source addresses to use in turn; empty: the host's own choice."""


class Explained(Struct, frozen=True, kw_only=True):
    """What ``explain`` of the running proxy says of such a packet."""

    verdict: Verdict
    reason: str


class Seen(Struct, frozen=True, kw_only=True):
    """What became of a probe's connections to one address."""

    source: str
    """The client's address; one of them if it has used several."""
    to: str
    attempts: int
    outcomes: dict[str, int]
    backends: dict[str, int]
    seen_as: dict[str, int]
    """Source addresses that the backends saw."""
    problems: dict[str, int]
    by_source: dict[str, str]
    """The last backend of each client address that the probe has chosen."""


def seen(source: str, to: FrontendKey, attempts: Sequence[Attempt]) -> Seen:
    """Count them."""
    return Seen(
        source=source,
        to=str(to),
        attempts=len(attempts),
        outcomes=_counts(one.outcome.value for one in attempts),
        backends=_counts(one.backend for one in attempts if one.backend),
        seen_as=_counts(one.seen_as for one in attempts if one.seen_as),
        problems=_counts(one.problem for one in attempts if one.problem),
        by_source={one.source: one.backend for one in attempts if one.source},
    )


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def judge(
    probe: Probe,
    part: Seen,
    *,
    clients: frozenset[str],
    nodes: frozenset[str],
    explained: Explained | None,
) -> list[str]:
    """What is wrong, a clause each; nothing when the expectation is met.

    ``clients`` are the client's own addresses, ``nodes`` those of the node with the proxy.
    """
    expect = probe.expect
    problems = []
    for name, count in part.outcomes.items():
        if name != expect.outcome:
            why = f" ({', '.join(part.problems)})" if part.problems and name == "failed" else ""
            problems.append(f"{count} of {part.attempts} to {part.to}: {name}{why}")
    if expect.outcome is Outcome.SERVED and not problems:
        problems += _misplaced(expect, part)
        own = {"client": clients, "node": nodes}.get(expect.seen_as)
        strangers = sorted(set(part.seen_as) - own) if own is not None else []
        if strangers:
            problems.append(f"a backend saw {', '.join(strangers)}")
        if own is not None and not part.seen_as:
            problems.append(f"no backend of {part.to} told the client's address")
    if explained is not None and explained.verdict is not _VERDICTS[expect.outcome]:
        problems.append(f"explain says {explained.verdict} of {part.to}")
    return problems


def _misplaced(expect: Expectation, part: Seen) -> list[str]:
    problems = []
    strangers = sorted(set(part.backends) - set(expect.backends))
    if strangers:
        problems.append(f"{', '.join(strangers)} served {part.to}")
    if expect.sticks is Sticks.YES:
        if len(part.backends) > 1:
            problems.append(f"{len(part.backends)} backends served {part.to}")
    else:
        missing = [name for name in expect.backends if name not in part.backends]
        if missing:
            problems.append(f"{', '.join(missing)} got nothing of {part.to}")
    moved = [client for client, name in expect.kept.items() if part.by_source.get(client) != name]
    if moved:
        problems.append(f"{len(moved)} of {len(expect.kept)} clients got another backend")
    return problems


class ProbeResult(Struct, frozen=True, kw_only=True):
    """One probe and its judgement; also of what is no probe of a Service (a health check)."""

    source: str
    sent: str
    """``60 connections``."""
    expected: str
    seen: tuple[Seen, ...]
    answer: str = ""
    """What came back, where it is no backend's name."""
    explained: tuple[Explained, ...] = ()
    """In the order of ``seen``; empty when the proxy was not asked."""
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is as expected."""
        return not self.problems

    def total(self, field: str) -> dict[str, int]:
        """Counts of one field of ``seen`` over all addresses."""
        counts: Counter[str] = Counter()
        for part in self.seen:
            counts.update(getattr(part, field))
        return dict(sorted(counts.items()))


class Situation(Struct, frozen=True, kw_only=True):
    """What holds while these probes are sent."""

    title: str
    probes: tuple[ProbeResult, ...]


class StepResult(Struct, frozen=True, kw_only=True):
    """One step."""

    number: int
    title: str
    situations: tuple[Situation, ...]

    @property
    def probes(self) -> tuple[ProbeResult, ...]:
        """Of all situations."""
        return tuple(probe for each in self.situations for probe in each.probes)

    @property
    def ok(self) -> bool:
        """Whether all is as expected, and something was looked at."""
        return bool(self.probes) and all(probe.ok for probe in self.probes)


class Run(Struct, frozen=True, kw_only=True):
    """All steps."""

    kernel: str
    cpus: int
    reader: str
    workers: int
    data_path: str
    elapsed_s: float
    steps: tuple[StepResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every step is."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    @property
    def connections(self) -> int:
        """Attempts in all."""
        return sum(
            part.attempts for step in self.steps for probe in step.probes for part in probe.seen
        )

    def document(self) -> Mapping[str, Any]:
        """The run as JSON has it, ``ok`` with everything that can be right or wrong."""
        whole: dict[str, Any] = msgspec.to_builtins(self)
        for step, step_document in zip(self.steps, whole["steps"], strict=True):
            step_document["ok"] = step.ok
            written = [one for each in step_document["situations"] for one in each["probes"]]
            for probe, probe_document in zip(step.probes, written, strict=True):
                probe_document["ok"] = probe.ok
        return whole | {"ok": self.ok}
