"""explain asked of the running proxy, and held to what conntrack then shows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.kernel.netns import Namespace
from tests.kernel.proxy import DATA_PATHS, run_cli
from tests.kernel.responder import ask_tcp, ask_udp
from tests.kernel.world import (
    NODE4,
    NODE6,
    NODE_PORT,
    OUTSIDE4,
    REMOTE4,
    REMOTE6,
    SELF4,
    SELF6,
    World,
    world,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=DATA_PATHS)
def running(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(data_path=request.param) as built:
        yield built


def explain(node: Namespace, source: str, destination: str) -> dict[str, Any]:
    done = run_cli(node, "explain", "--from", source, "--to", destination, "-o", "json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def entry(steps: list[str], protocol: str) -> str:
    """The predicted conntrack entry as a pattern: what is unknown matches a number."""
    (line,) = (
        text for step in steps if (text := step.partition(": ")[2]).startswith(f"{protocol} ")
    )
    head, tuples = line.split(" src=", 1)
    assert head.split()[0] == protocol
    pattern = re.escape(f"src={tuples}").replace(r"\?", r"\d+")
    return pattern.replace(re.escape("[UNREPLIED] "), r"(\[UNREPLIED\] )?")


CASES = {
    "pod to ClusterIP": ("pod", REMOTE4, 80, "tcp"),
    "hairpin": ("pod", SELF4, 80, "tcp"),
    "pod to no pod": ("pod", OUTSIDE4, 80, "tcp"),
    "node to ClusterIP": ("node", REMOTE4, 80, "udp"),
    "client to ClusterIP": ("client", SELF4, 80, "udp"),
    "pod, IPv6": ("pod", REMOTE6, 80, "tcp"),
    "hairpin, IPv6": ("pod", SELF6, 80, "udp"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_entry_is_the_one_foretold(running: World, case: str) -> None:
    who, address, port, protocol = CASES[case]
    six = ":" in address
    client = running.topology.client
    namespace, source = {
        "pod": (running.pod.namespace, running.pod.address6 if six else running.pod.address4),
        "node": (running.node, NODE6 if six else NODE4),
        "client": (client.namespace, client.address6 if six else client.address4),
    }[who]
    target = f"[{address}]:{port}/{protocol}" if six else f"{address}:{port}/{protocol}"
    answer = explain(running.node, source, target)
    assert answer["verdict"] == "backend"
    (backend,) = answer["backends"]
    ask = ask_udp if protocol == "udp" else ask_tcp
    seen = ask(namespace, address, port).client
    # The node's masqueraded address may be the one it had.
    assert backend["masquerade"] == (seen != source or who == "node")
    pattern = entry(answer["steps"], protocol)
    # The running proxy knows its routes: nothing but ports is left open.
    assert r"dst=\d+" not in pattern
    assert f"dst={re.escape(seen)}" in pattern
    family = "ipv6" if six else "ipv4"
    listing = running.node.run("conntrack", "-L", "-f", family, "-p", protocol).stdout
    assert re.search(pattern, listing), f"{pattern}\n{listing}"


def test_many_packets_and_a_bad_one(running: World, tmp_path: Path) -> None:
    pod = running.pod.address4
    lines = [
        {"from": pod, "to": f"{REMOTE4}:80/tcp"},
        {"from": pod, "to": f"{NODE4}:{NODE_PORT}/udp"},
    ]
    many = tmp_path / "packets.jsonl"
    many.write_text("\n".join([*map(json.dumps, lines * 300), "{}"]))
    done = run_cli(running.node, "explain", "--packets", str(many))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2
    assert len(answers) == 601
    assert "error" in answers[-1]
    frontends = [answer["frontend"]["kind"] for answer in answers[:-1]]
    assert frontends == ["ClusterIP", "NodePort"] * 300


def test_what_the_proxy_does_not_serve_is_told_too(running: World) -> None:
    answer = explain(running.node, running.pod.address4, "203.0.113.200:80/tcp")
    assert (answer["verdict"], answer["frontend"]) == ("pass", None)


def test_without_a_proxy_there_is_nobody_to_ask(running: World) -> None:
    done = run_cli(
        running.topology.client.namespace,
        "explain",
        "--from",
        "10.0.0.1",
        "--to",
        "10.0.0.2:80/tcp",
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no nfqproxy runs in this network namespace" in done.stderr
