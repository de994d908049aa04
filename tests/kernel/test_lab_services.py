"""``nfqproxy lab run services`` as a user runs it: every step, a standing lab beside it, a failure."""

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.lab import state as states
from nfqproxy.lab.services import STEPS
from nfqproxy.lab.standing import Lab
from tests.kernel.lab_process import Running, lab, namespaces
from tests.kernel.proxy import DATA_PATHS

Step = dict[str, Any]


def probes(step: Step) -> list[dict[str, Any]]:
    return [probe for situation in step["situations"] for probe in situation["probes"]]


def sum_of(probe: dict[str, Any], field: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in probe["seen"]:
        for name, count in part[field].items():
            total[name] = total.get(name, 0) + count
    return total


@pytest.fixture
def standing() -> Iterator[Lab]:
    """A standing lab that must not notice anything."""
    name = f"test-{secrets.token_hex(3)}"
    try:
        assert lab("up", "--name", name).returncode == 0
        yield Lab.attach(name)
    finally:
        states.remove(name)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_every_step_passes_beside_a_standing_lab(standing: Lab, data_path: str) -> None:
    before = standing.status()
    done = lab("run", "services", "-o", "json", "--data-path", data_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert (result["ok"], result["data_path"]) == (True, data_path)
    steps: list[Step] = result["steps"]
    assert [step["title"] for step in steps] == [step.title for step in STEPS]
    assert all(step["ok"] and all(probe["ok"] for probe in probes(step)) for step in steps)
    _look_at_what_was_seen(steps)

    after = standing.status()
    for key in ("pid", "revision", "frontends"):
        assert after[key] == before[key]
    assert [worker["packets"] for worker in after["workers"]] == [0]
    assert states.load(standing.state.name) == standing.state


def _look_at_what_was_seen(steps: list[Step]) -> None:
    """The figures themselves, whatever the program concludes from them."""
    by_title = {step["title"]: probes(step) for step in steps}
    everyone = {"pod-1-11", "pod-1-12", "pod-2-11", "pod-2-12"}
    pod, dns, node, outside = by_title["ClusterIP"]
    for probe in (pod, dns, node, outside):
        assert set(sum_of(probe, "backends")) == everyone
        assert sum_of(probe, "outcomes") == {"served": 120}
    assert sum_of(pod, "seen_as") == {"10.244.1.13": 60, "fd00:10:244:1::13": 60}
    assert sum_of(node, "seen_as") == {"192.0.2.1": 60, "2001:db8:2::1": 60}
    assert sum_of(outside, "seen_as") == {"192.0.2.1": 60, "2001:db8:2::1": 60}

    local, gone, from_pod, from_node = by_title["NodePort, externalTrafficPolicy Local"]
    assert sum_of(local, "backends") == {"pod-1-11": 60}
    assert sum_of(local, "seen_as") == {"192.0.2.10": 30, "2001:db8:2::10": 30}
    assert sum_of(gone, "outcomes") == {"dropped": 2}
    assert [each["verdict"] for each in gone["explained"]] == ["drop", "drop"]
    assert "no endpoint on this node n1" in gone["explained"][0]["reason"]
    for probe in (from_pod, from_node):
        assert sum_of(probe, "backends") == {"pod-2-11": 10}

    refusals = [sum_of(probe, "outcomes") for probe in by_title["Refusals"]]
    with_proxy, killed = refusals[:6], refusals[6:12]
    assert with_proxy == killed == [{"refused": 2}] * 5 + [{"dropped": 2}]
    assert refusals[12] == {"served": 60}

    affinity = by_title["Session affinity ClientIP"]
    first, crowd, again, _, moved, _ = (sum_of(probe, "backends") for probe in affinity)
    clients = [affinity[index]["seen"][0]["by_source"] for index in (1, 3, 5)]
    assert len(clients[0]) == 80
    assert clients[1] == clients[0]
    for client, backend in clients[0].items():
        assert clients[2][client] == backend or backend in first
    assert list(first.values()) == [30]
    assert again == first
    assert set(crowd) == everyone
    assert list(moved.values()) == [30]
    assert set(moved) != set(first)

    itself, _ = by_title["Hairpin"]
    assert sum_of(itself, "seen_as") == {"192.0.2.1": 5, "2001:db8:2::1": 5}
    health = [probe["answer"] for probe in by_title["Health-check node port"]]
    assert health[0] == "HTTP 200, localEndpoints 1"
    assert health[2] == "HTTP 503, localEndpoints 0"


def test_what_does_not_hold_is_shown_and_fails(tmp_path: Path) -> None:
    """The node keeps its IPv4 refusals to itself."""
    text = tmp_path / "stdout"
    with text.open("w") as stdout:
        running = Running("proxy:", "run", "services", "--step", "6", "--step", "8", stdout=stdout)
        rule = "iptables -I OUTPUT -p icmp --icmp-type port-unreachable -j DROP"
        subprocess.run(["ip", "netns", "exec", f"{running.prefix}n1", *rule.split()], check=True)
        assert running.wait() == 1
    assert namespaces(running.prefix) == []
    lines = [line.strip() for line in text.read_text().splitlines()]
    # Five probes that expect a refusal, with the proxy and without; IPv6 is as it should be.
    wrong = [line for line in lines if line.startswith("wrong")]
    assert len(wrong) == 10
    assert all(line.endswith(": dropped") and "[" not in line for line in wrong)
    assert sum(line.startswith("✗") for line in lines) == 10
    assert "6  Refusals       3 of 13  ✗" in lines
    assert "8  Hairpin         2 of 2  ✓" in lines
    assert lines[-1].startswith("FAIL  2 steps")
    assert lines[-1].endswith("; see step 6")
