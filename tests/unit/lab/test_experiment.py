"""The judgement of probes: what meets an expectation, and what is said of what does not."""

import pytest

from nfqproxy.lab.attempt import Attempt, Outcome
from nfqproxy.lab.experiment import (
    Expectation,
    Explained,
    Probe,
    ProbeResult,
    Run,
    Situation,
    StepResult,
    Sticks,
    dropped,
    judge,
    refused,
    seen,
    served,
)
from nfqproxy.model import FrontendKey, Protocol, Verdict

TO = FrontendKey(Protocol.TCP, "192.0.2.1", 30030)
CLIENT, NODE = "192.0.2.10", "192.0.2.1"


def answers(*backends: str, seen_as: str = CLIENT) -> list[Attempt]:
    return [
        Attempt(outcome=Outcome.SERVED, backend=backend, seen_as=seen_as) for backend in backends
    ]


FROM_TWO = [
    Attempt(outcome=Outcome.SERVED, source=f"10.0.0.{number}", backend=backend)
    for number, backend in enumerate("ab", 1)
]
REFUSED = [Attempt(outcome=Outcome.REFUSED)]
DROPPED = [Attempt(outcome=Outcome.DROPPED)]
RESET = [Attempt(outcome=Outcome.FAILED, problem="ECONNREFUSED")]


def problems(
    expect: Expectation, attempts: list[Attempt], verdict: Verdict | None = None
) -> list[str]:
    return judge(
        Probe(source="c1", to=(TO,), expect=expect),
        seen(CLIENT, TO, attempts),
        clients=frozenset([CLIENT]),
        nodes=frozenset([NODE]),
        explained=None if verdict is None else Explained(verdict=verdict, reason=""),
    )


@pytest.mark.parametrize(
    ("expect", "attempts", "verdict"),
    [
        (served("a", "b"), answers("a", "b", "a"), Verdict.BACKEND),
        (served("a", seen_as="client"), answers("a"), Verdict.BACKEND),
        (served("a", seen_as="node"), answers("a", seen_as=NODE), None),
        (served("a", "b", sticks=Sticks.YES), answers("b", "b"), None),
        (served("a", "b", kept={"10.0.0.1": "a"}), FROM_TWO, None),
        (refused(), REFUSED, Verdict.REJECT),
        (dropped(), DROPPED, Verdict.DROP),
    ],
)
def test_what_is_as_expected(
    expect: Expectation, attempts: list[Attempt], verdict: Verdict | None
) -> None:
    assert problems(expect, attempts, verdict) == []


@pytest.mark.parametrize(
    ("expect", "attempts", "problem"),
    [
        (served("a", "b"), answers("a", "a"), "b got nothing of 192.0.2.1:30030/tcp"),
        (served("a"), answers("a", "c"), "c served 192.0.2.1:30030/tcp"),
        (served("a", seen_as="client"), answers("a", seen_as=NODE), "a backend saw 192.0.2.1"),
        (served("a", seen_as="node"), answers("a"), "a backend saw 192.0.2.10"),
        (
            served("a", seen_as="node"),
            answers("a", seen_as=""),
            "no backend of 192.0.2.1:30030/tcp told the client's address",
        ),
        (
            served("a", "b", sticks=Sticks.YES),
            answers("a", "b"),
            "2 backends served 192.0.2.1:30030/tcp",
        ),
        (
            served("a", "b", kept={"10.0.0.1": "a", "10.0.0.2": "a"}),
            FROM_TWO,
            "1 of 2 clients got another backend",
        ),
        (served("a"), answers("a") + DROPPED, "1 of 2 to 192.0.2.1:30030/tcp: dropped"),
        (served("a"), REFUSED, "1 of 1 to 192.0.2.1:30030/tcp: refused"),
        (refused(), DROPPED, "1 of 1 to 192.0.2.1:30030/tcp: dropped"),
        # A reset looks the same to a socket and is none.
        (refused(), RESET, "1 of 1 to 192.0.2.1:30030/tcp: failed (ECONNREFUSED)"),
        (dropped(), answers("a"), "1 of 1 to 192.0.2.1:30030/tcp: served"),
    ],
)
def test_what_is_not(expect: Expectation, attempts: list[Attempt], problem: str) -> None:
    assert problems(expect, attempts) == [problem]


def test_explain_must_agree() -> None:
    assert problems(dropped(), DROPPED, Verdict.REJECT) == [
        "explain says reject of 192.0.2.1:30030/tcp"
    ]


def test_nothing_seen_is_no_success() -> None:
    """A step without a probe, or a run without a step, has shown nothing."""
    empty = StepResult(number=1, title="x", situations=(Situation(title="y", probes=()),))
    run = Run(
        kernel="k", cpus=1, reader="netlink", workers=1, data_path="mark", elapsed_s=0.1, steps=()
    )
    assert not empty.ok
    assert not run.ok


def test_the_document_says_what_is_wrong_at_each_level() -> None:
    right = ProbeResult(source="c1", sent="1 connection", expected="x", seen=())
    wrong = ProbeResult(source="c1", sent="1 connection", expected="x", seen=(), problems=("p",))
    steps = tuple(
        StepResult(number=n, title="t", situations=(Situation(title="s", probes=probes),))
        for n, probes in enumerate([(right,), (right, wrong)], 1)
    )
    run = Run(
        kernel="k",
        cpus=1,
        reader="netlink",
        workers=1,
        data_path="mark",
        elapsed_s=0.1,
        steps=steps,
    )
    document = run.document()
    assert document["ok"] is False
    assert [step["ok"] for step in document["steps"]] == [True, False]
    probes = document["steps"][1]["situations"][0]["probes"]
    assert [probe["ok"] for probe in probes] == [True, False]
