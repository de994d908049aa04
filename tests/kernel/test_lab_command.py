"""``nfqproxy lab`` as a user runs it: results, exit codes, and that nothing ever stays behind."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.api import admin
from nfqproxy.kernel.affinity_file import store_path
from nfqproxy.kernel.netns import Namespace
from nfqproxy.kernel.processes import ProcessRef
from nfqproxy.lab import state as states
from tests.kernel.lab_process import LAB, Running, lab, namespaces
from tests.kernel.proxy import DATA_PATHS

SMALL = ["--connections", "600", "--queries", "600"]
# So that a run cannot end before a signal reaches it, however busy the machine.
LONG = ["--connections", "20000", "--queries", "20000"]


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a standing lab that no other test has; removed if the test did not."""
    own = f"test-{secrets.token_hex(3)}"
    yield own
    states.remove(own)


@pytest.mark.parametrize("reader", ["netlink", "netfilterqueue"])
def test_the_lab_passes(reader: str) -> None:
    """The main job in one run; the full size is the README's command."""
    done = lab("-o", "json", "--reader", reader, *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["ok"] is True
    assert all(check["ok"] for check in result["checks"])
    assert [spread["queued"] for spread in result["spreads"]] == [600, 200, 600]
    assert [spread["per_flow"] for spread in result["spreads"]] == [1.0, 1.0, 1.0]
    assert all(spread["failed"] == 0 for spread in result["spreads"])
    assert {latency["connect_us"]["samples"] for latency in result["latencies"]} == {1000}
    assert result["source_kept"] is True
    kill = result["kill"]
    assert len(kill["killed"]) == 1
    assert (kill["tcp"]["failed"], kill["dns"]["failed"], kill["held"]["failed"]) == (0, 0, 0)
    assert kill["fallback_tcp"] > 0
    assert all("dst=10.96.0." in line for line in result["conntrack"])


def test_a_standing_lab(name: str) -> None:
    up = lab("up", "--name", name, "--weights", "1:0", "-o", "json")
    assert up.returncode == 0, up.stderr
    made = json.loads(up.stdout)
    state = states.load(name)
    assert state is not None
    assert len(namespaces(state.prefix)) == 5
    assert len(state.processes) == 5
    assert all(ref.is_alive() for ref in state.processes)

    # The printed commands work as they are.
    for what in ("a connection", "over IPv6", "from a pod", "from the node", "a DNS query"):
        said = subprocess.run(
            made["commands"][what], shell=True, capture_output=True, text=True, check=True
        ).stdout
        assert "backend-1" in said, what
    for what in ("the connections", "the proxy", "what is queued", "its log"):
        subprocess.run(made["commands"][what], shell=True, capture_output=True, check=True)

    again = lab("up", "--name", name)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith(f"nfqproxy: a lab named {name} stands already")

    # The second run has the proxy replaced.
    for data_path in DATA_PATHS:
        ran = lab("run", "--name", name, "-o", "json", *SMALL, "--data-path", data_path)
        assert ran.returncode == 0, ran.stderr + ran.stdout
        result = json.loads(ran.stdout)
        assert result["data_path"] == data_path
        assert [
            (part["backend"], part["answers"]) for part in result["spreads"][0]["backends"]
        ] == [
            ("backend-1", 600),
            ("backend-2", 0),
        ]
        # By the rule's counters; a SYN may have been sent again.
        assert all(spread["queued"] >= spread["flows"] > 0 for spread in result["spreads"])
        kill = result["kill"]
        assert 0 < kill["fallback_tcp"] < kill["tcp"]["attempts"]
        assert Namespace(made["node"]).call(lambda: admin.ask("status"))["data_path"] == data_path
    state = states.load(name)
    assert state is not None
    assert len(state.processes) == 5
    assert all(ref.is_alive() for ref in state.processes)

    down = lab("down", "--name", name)
    assert (down.returncode, down.stdout) == (0, f"removed: {name}\n")
    assert namespaces(state.prefix) == []
    assert not any(ref.is_alive() for ref in state.processes)
    assert not state.folder.exists()
    again = lab("down", "--name", name)
    assert again.returncode == 0
    assert again.stdout == f"nothing to remove: no lab named {name} stands\n"


REFUSALS = ["run", "services", "--step", "6"]


@pytest.mark.parametrize(
    ("moment", "number", "arguments"),
    [
        ("network:", signal.SIGINT, SMALL),
        ("servers:", signal.SIGINT, SMALL),
        ("proxy:", signal.SIGINT, LONG),
        ("proxy:", signal.SIGTERM, LONG),
        ("SIGKILL to worker", signal.SIGINT, LONG),
        ("network:", signal.SIGINT, REFUSALS),
        ("step 6:", signal.SIGINT, REFUSALS),
        # While the scenario has killed the proxy, before it has started another.
        ("the same with workers and supervisor killed", signal.SIGTERM, REFUSALS),
    ],
)
def test_an_interrupt_removes_everything(
    moment: str, number: signal.Signals, arguments: list[str]
) -> None:
    running = Running(moment, *arguments)
    folders = [one for one in states.names() if one.startswith("once-")]
    own = [one for one in folders if (s := states.load(one)) and s.prefix == running.prefix]
    assert len(own) == 1
    state = states.load(own[0])
    assert running.end(number) == 130
    assert running.prefix
    assert namespaces(running.prefix) == []
    assert own[0] not in states.names()
    assert state is not None
    assert not any(ref.is_alive() for ref in state.processes)


def test_down_removes_what_a_killed_run_left(name: str) -> None:
    running = Running("proxy:", *SMALL)
    # Until the proxy is known to the state file.
    deadline = time.monotonic() + 20.0
    left = None
    while time.monotonic() < deadline and (left is None or len(left.processes) < 7):
        found = [states.load(one) for one in states.names()]
        left = next((s for s in found if s is not None and s.prefix == running.prefix), None)
    assert left is not None
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    assert namespaces(running.prefix) != []
    done = lab("down", "--name", name)
    assert done.returncode == 0
    assert left.name in done.stdout
    assert namespaces(running.prefix) == []
    assert not any(ref.is_alive() for ref in left.processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_affinity_records_go_with_the_lab(name: str, number: signal.Signals) -> None:
    running = Running("step 8:", "run", "services", "--step", "7", "--step", "8")
    file = Namespace(f"{running.prefix}n1").call(store_path)
    assert file.exists()
    running.end(number)
    if number == signal.SIGKILL:
        assert file.exists()
        assert lab("down", "--name", name).returncode == 0
    assert not file.exists()


def test_down_leaves_a_lab_at_work_alone() -> None:
    running = Running("proxy:", *SMALL)
    try:
        assert lab("down", "--all").returncode == 0
        assert namespaces(running.prefix) != []
        assert running.child.poll() is None
    finally:
        assert running.end(signal.SIGINT) == 130


def test_a_shell_of_the_user_survives_down(name: str) -> None:
    up = lab("up", "--name", name, "-o", "json")
    assert up.returncode == 0, up.stderr
    client = json.loads(up.stdout)["client"]
    with subprocess.Popen(["ip", "netns", "exec", client, "sleep", "600"]) as shell:
        try:
            ref = ProcessRef.of(shell.pid)
            assert lab("down", "--name", name).returncode == 0
            assert client not in namespaces("nfqp-")
            assert ref.is_alive()
        finally:
            shell.kill()


def test_without_root() -> None:
    """As nobody; the program is loaded first, since nobody may not be able to read it."""
    program = (
        "import os, sys, nfqproxy.cli.lab, nfqproxy.cli.main as m;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.argv[0] = 'nfqproxy'; m.main()"
    )
    for arguments in ([], ["up"], ["run"], ["run", "services"], ["down"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "lab", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3
        assert done.stdout == ""
        assert done.stderr == (
            "nfqproxy: the lab makes network namespaces, which needs root:"
            " run it as root (sudo nfqproxy lab)\n"
        )


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    for program in ("ip", "iptables", "ip6tables", "ipset", "nft", "conntrack"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    done = subprocess.run(
        LAB,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    assert done.returncode == 3
    assert done.stderr == (
        "nfqproxy: nginx, dnsmasq not found; install with: apt-get install dnsmasq-base"
        " nginx-light\n"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--weights", "5"], "2 to 9 weights"),
        (["--weights", "0:0"], "2 to 9 weights"),
        (["--weights", "5:-1"], "2 to 9 weights"),
        (["--weights", "a:b"], "2 to 9 weights"),
        (["--connections", "0"], "--connections"),
        (["--reader", "other"], "--reader"),
        (["run", "spread", "--data-path", "marks"], "'marks' is not one of 'ctnetlink', 'mark'"),
        (["up", "--name", "../x"], "letters, digits and hyphens"),
    ],
)
def test_wrong_usage(arguments: list[str], problem: str) -> None:
    done = lab(*arguments)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_run_without_a_lab(name: str) -> None:
    done = lab("run", "--name", name)
    assert done.returncode == 1
    assert f"no lab named {name} stands" in done.stderr
