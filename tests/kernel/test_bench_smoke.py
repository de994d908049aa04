"""The bench measures, refuses to report what went wrong, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from bench import cpu
from bench.contenders import Contender, Placement, Serving
from bench.contenders.kernel import IptablesDnat
from bench.contenders.reference import CReference
from bench.services import PORT, VIP
from bench.world import Backend, World

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 and not os.environ.get("CI"),
        reason="makes network namespaces: needs root",
    ),
]

REPOSITORY = Path(__file__).parents[2]
NAMESPACES = Path("/run/netns")


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def namespaces_of(pid: int) -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"nfqb-{pid}-*")]


def config(connections: int = 2000) -> cpu.Config:
    cpus = sorted(os.sched_getaffinity(0))
    return cpu.Config(
        connections=connections,
        rounds=1,
        seed=1,
        in_flight=256,
        rate=0,
        weights=(5, 3, 2),
        placement=Placement(sender=cpus[0], worker=cpus[-1]),
    )


def test_result_holds_costs_shares_and_provenance() -> None:
    done = bench(
        "cpu", "--contenders", "c,dnat,none", "--connections", "3000", "--rounds", "2", "-o", "json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["commit"]) == 40
    assert {"cpu", "cpus"} <= result["machine"].keys()
    assert result["config"]["seed"] == 1
    assert len(result["samples"]) == 6
    for sample in result["samples"]:
        connected = 0 if sample["contender"] == "none" else 3000
        assert sum(sample["shares"].values()) == connected
        assert sample["sent"]["connections"] == 3000
        assert sample["sent"]["cpu_ns"] > 0
        assert (sample["worker"]["run_ns"] > 0) == (sample["contender"] == "c")
    by_name = {summary["contender"]: summary for summary in result["summary"]}
    assert by_name["c"]["ratio_to_c"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert by_name["dnat"]["worker_us"] is None
    # The kernel's own NAT is done inside the sender's calls.
    assert by_name["dnat"]["sender_us"]["least"] > by_name["none"]["sender_us"]["median"]


def test_proxy_is_measured_against_the_reference() -> None:
    words = ["--contenders", "netlink,mark,c", "--connections", "3000", "--rounds", "1"]
    done = bench("cpu", *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    by_name = {summary["contender"]: summary for summary in json.loads(done.stdout)["summary"]}
    ratio = by_name["netlink"]["worker_us"]["median"] / by_name["c"]["worker_us"]["median"]
    assert by_name["netlink"]["ratio_to_c"]["median"] == pytest.approx(ratio)
    # The supervisor is a process of its own and did not handle the packets; it may not have run at all.
    supervisor = by_name["netlink"]["supervisor_us"]
    if supervisor is not None:
        assert supervisor["median"] < by_name["netlink"]["worker_us"]["median"]


def test_text_is_a_table_of_the_contenders() -> None:
    done = bench("cpu", "--contenders", "c,dnat", "--connections", "1000", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    cells = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert float(cells["c"][0]) > 0
    assert cells["dnat"][0] == "-"


class ClaimsWeights(IptablesDnat):
    """One rule to one backend, but it claims to honour the weights."""

    name: ClassVar[str] = "claims-weights"

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        return Contender.shares(self, backends)


class LosesSome(IptablesDnat):
    """Drops every tenth SYN."""

    name: ClassVar[str] = "loses-some"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        tenth = ["-m", "statistic", "--mode", "nth", "--every", "10", "--packet", "0"]
        rule = ["PREROUTING", "-d", VIP, *tenth, "-j", "DROP"]
        world.node.run("iptables", "-w", "-t", "raw", "-A", *rule)
        with super().serve(world, placement) as serving:
            yield serving


class SkipsTheQueue(IptablesDnat):
    """A kernel rule serves, and userspace claims the work."""

    name: ClassVar[str] = "skips-the-queue"
    is_queued: ClassVar[bool] = True


class TranslatesElsewhere(IptablesDnat):
    """The right backend, the wrong port."""

    name: ClassVar[str] = "translates-elsewhere"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        rule = ["PREROUTING", "-d", VIP, "-p", "tcp", "--dport", str(PORT)]
        target = ["-j", "DNAT", "--to-destination", f"{world.backends[0].address}:9"]
        world.node.run("iptables", "-w", "-t", "nat", "-A", *rule, *target)
        yield Serving()


@pytest.mark.parametrize(
    ("contender", "finding"),
    [
        (ClaimsWeights(), "10.244.1.10:8080 got 1000 SYNs, its weight says 500"),
        (LosesSome(), "900 of 1000 SYNs arrived at a backend"),
        (SkipsTheQueue(), "0 packets passed the queue for 1000 connections"),
        (TranslatesElsewhere(), "1000 entries are not translated to a backend"),
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_wrong_connections_are_found_before_a_cost_is_reported(
    contender: Contender, finding: str
) -> None:
    with pytest.raises(cpu.WrongResultError, match=finding):
        cpu.run([contender], config(connections=1000), lambda line: None)
    assert namespaces_of(os.getpid()) == []


class AnswersNothing(CReference):
    """The worker is stopped: its SYNs stay in the queue."""

    name: ClassVar[str] = "answers-nothing"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        with super().serve(world, placement) as serving:
            worker = serving.workers[0]
            os.kill(worker, signal.SIGSTOP)
            try:
                yield serving
            finally:
                os.kill(worker, signal.SIGCONT)


def test_a_worker_that_answers_nothing_ends_the_run_with_its_name() -> None:
    with pytest.raises(cpu.WrongResultError, match=r"answers-nothing.*none was answered"):
        cpu.run([AnswersNothing()], config(connections=1000), lambda line: None)
    assert namespaces_of(os.getpid()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_removes_everything(number: signal.Signals) -> None:
    words = ["cpu", "--contenders", "c", "--rounds", "1000", "--connections", "2000"]
    running = subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (workers := reference_workers(running.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert workers, "the bench did not start its worker"
        assert len(namespaces_of(running.pid)) == 3
        running.send_signal(number)
        said = running.communicate(timeout=30)[1]
    finally:
        if running.poll() is None:
            running.kill()
            running.communicate()
    assert running.returncode == 130
    assert "removed" in said
    assert namespaces_of(running.pid) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def reference_workers(bench_pid: int) -> list[int]:
    """Reference workers that run in a namespace of this bench."""
    names = namespaces_of(bench_pid)
    found: list[int] = []
    for name in names:
        pids = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        for pid in pids.stdout.split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("reference_work"):
                    found.append(int(pid))
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--contenders", "c,kube"], "no contender is named 'kube'"),
        (["--contenders", "dnat,haproxy"], "haproxy ends connections itself"),
        (["--weights", "5,-1"], "--weights '5,-1'"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_sentence(words: list[str], said: str) -> None:
    done = bench("cpu", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_compiler_is_exit_3_and_names_the_package(tmp_path: Path) -> None:
    done = bench("cpu", "--contenders", "c", PATH=str(tmp_path))
    assert done.returncode == 3
    assert "gcc" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_connections_than_conntrack_holds_is_exit_3() -> None:
    limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    done = bench("cpu", "--contenders", "c", "--connections", str(limit + 1))
    assert done.returncode == 3
    assert f"nf_conntrack_max={(limit + 1) * 5 // 4}" in done.stderr


def test_without_an_experiment_the_help_is_printed() -> None:
    done = bench()
    assert done.returncode == 0
    assert "python -m bench cpu" in done.stdout
