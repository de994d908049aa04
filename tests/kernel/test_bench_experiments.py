"""Every experiment of the bench: what it yields, what it refuses, and that it leaves nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from bench.contenders import Contender, IptablesDnat, Nfqproxy, Placement, Serving
from bench.experiments import EXPERIMENTS, connections, latency, overload, requests, scaling
from bench.observation import Scale
from bench.services import VIP
from bench.stands import WrongResultError
from bench.world import Backend, World

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 and not os.environ.get("CI"),
        reason="makes network namespaces: needs root",
    ),
]

REPOSITORY = Path(__file__).parents[2]
SMOKE = Scale(
    name="smoke", rounds=1, connections=1000, services=(1, 100), workers=(1, 2), seconds=0.2
)
TINY = Scale(name="tiny", rounds=1, connections=300, services=(1,), workers=(2,), seconds=0.2)

KERNEL = {"dnat", "kube-proxy-iptables", "kube-proxy-nftables"}
RELAYS = {"haproxy", "nginx-stream"}
WORKERS = {"nfqproxy", "c"}
QUANTILES = {0.5, 0.9, 0.99, 0.999}
FLOW_UNITS = {"rate": "1/s", "path_cpu": "us", "worker_cpu": "us"}

# Of each experiment: who takes part, the metrics with their units, and what is varied.
YIELDS: dict[str, tuple[set[str], dict[str, str], dict[str, set[object]]]] = {
    "connections": (KERNEL | WORKERS, FLOW_UNITS, {"services": {1, 100}}),
    "latency": (
        KERNEL | WORKERS | RELAYS,
        {"connect": "us", "answer": "us"},
        {"services": {100}, "quantile": QUANTILES, "load": {"idle", "half"}},
    ),
    "requests": (
        KERNEL | RELAYS | {"nfqproxy"},
        {"rate": "1/s", "latency": "us", "userspace_packets": "packets"},
        {"services": {1}, "quantile": QUANTILES},
    ),
    "bulk": (KERNEL | RELAYS | {"nfqproxy"}, {"throughput": "bit/s"}, {"services": {1}}),
    "udp_flows": (KERNEL | {"nfqproxy"}, FLOW_UNITS, {"services": {100}}),
    "overload": (
        {"nfqproxy"},
        {
            "capacity": "1/s",
            "offered": "1/s",
            "by_worker": "share",
            "by_fallback": "share",
            "lost": "share",
        },
        {"factor": {2, 10}},
    ),
    "scaling": (
        {"nfqproxy"},
        {**FLOW_UNITS, "imbalance": "ratio"},
        {"workers": {1, 2}, "placement": {"own", "with the load", "shared"}},
    ),
}


def left_behind(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"nfqb-{pid}-*")]


def test_every_experiment_is_known_by_its_modules_name() -> None:
    modules = {path.stem for path in (REPOSITORY / "bench/experiments").glob("[a-z]*.py")}
    # The last two are in test_bench_run.py.
    assert set(EXPERIMENTS) == modules == {*YIELDS, "programming", "memory"}
    assert all(experiment.title for experiment in EXPERIMENTS.values())


@pytest.mark.parametrize("name", YIELDS)
def test_experiment_yields_every_metric_of_every_contender(name: str) -> None:
    said: list[str] = []
    found = EXPERIMENTS[name].run(SMOKE, said.append)
    contenders, units, varied = YIELDS[name]
    assert any("round 1 of 1" in line for line in said)
    assert left_behind(os.getpid()) == []
    seen = {(one.contender, one.metric) for one in found}
    wanted = {(who, metric) for who in contenders for metric in units}
    wanted -= {(who, "worker_cpu") for who in KERNEL}
    assert seen == wanted
    for one in found:
        assert (one.experiment, one.round, one.unit) == (name, 1, units[one.metric])
        assert set(one.parameters) <= set(varied)
        assert all(value in varied[key] for key, value in one.parameters.items())
        # A queue may just hold what comes twice as fast; nothing may be lost or leave the kernel.
        if one.metric in ("lost", "userspace_packets"):
            assert one.value == 0
        elif (one.metric, one.parameters.get("factor")) != ("by_fallback", 2):
            assert one.value > 0, one
    # Every combination once, and none twice.
    keys = [(one.contender, one.metric, *sorted(one.parameters.items())) for one in found]
    assert len(set(keys)) == len(keys)
    for key, values in varied.items():
        if key != "placement":
            assert {one.parameters[key] for one in found if key in one.parameters} == values


class ClaimsAllBackends(IptablesDnat):
    """One rule to one backend, but it claims three."""

    name: ClassVar[str] = "claims-all"

    def shares(self, backends: tuple[Backend, ...]) -> dict[str, float]:
        return Contender.shares(self, backends)


class LosesSome(IptablesDnat):
    """Drops every tenth SYN."""

    name: ClassVar[str] = "loses-some"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        tenth = ["-m", "statistic", "--mode", "nth", "--every", "10", "--packet", "0"]
        world.node.run("iptables", "-t", "raw", "-A", "PREROUTING", "-d", VIP, *tenth, "-j", "DROP")
        with super().serve(world, placement) as serving:
            yield serving


class QueuesItAll(Nfqproxy):
    """Established connections go through userspace too."""

    name: ClassVar[str] = "queues-all"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        with super().serve(world, placement) as serving:
            match = ["PREROUTING", "-d", VIP, "-p", "tcp", "!", "--syn"]
            target = ["-j", "NFQUEUE", "--queue-num", "100", "--queue-bypass"]
            world.node.run("iptables", "-t", "raw", "-A", *match, *target)
            yield serving


class UsesOneQueue(Nfqproxy):
    """Two workers, and rules that give all to the first."""

    name: ClassVar[str] = "one-queue"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        with super().serve(world, placement) as serving:
            match = ["PREROUTING", "-d", VIP, "-p", "tcp", "--syn"]
            target = ["-j", "NFQUEUE", "--queue-num", "100", "--queue-bypass"]
            world.node.run("iptables", "-t", "raw", "-I", *match, *target)
            yield serving


class HasNoFallback(Nfqproxy):
    """What the worker does not take is nobody's."""

    name: ClassVar[str] = "no-fallback"

    @contextlib.contextmanager
    def serve(self, world: World, placement: Placement) -> Iterator[Serving]:
        with super().serve(world, placement) as serving:
            world.node.run("nft", "flush", "chain", "ip", "nfqproxy", "prerouting")
            yield serving


@pytest.mark.parametrize(
    ("module", "attribute", "broken", "finding"),
    [
        (connections, "_CONTENDERS", (LosesSome,), r"loses-some.*270 of 300 SYNs arrived"),
        (latency, "_CONTENDERS", (ClaimsAllBackends,), r"claims-all.*got \d+ SYNs, its weight"),
        (requests, "CONTENDERS", (QueuesItAll,), r"queues-all.*\d+ packets passed the queue for"),
        (requests, "CONTENDERS", (ClaimsAllBackends,), r"claims-all.*:8080 got 0 packets"),
        (overload, "Nfqproxy", HasNoFallback, r"no-fallback.*of 6144 SYNs arrived"),
        (scaling, "Nfqproxy", UsesOneQueue, r"one-queue.*the workers got \[0, 300\]"),
    ],
)
def test_a_broken_contender_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    attribute: str,
    broken: object,
    finding: str,
) -> None:
    monkeypatch.setattr(module, attribute, broken)
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(WrongResultError, match=finding):
        EXPERIMENTS[name].run(TINY, lambda line: None)
    assert left_behind(os.getpid()) == []


def test_interrupt_in_the_middle_of_a_load_removes_everything() -> None:
    program = (
        "from bench.contenders import Haproxy, IptablesDnat;"
        "from bench.experiments import EXPERIMENTS, latency; from bench.observation import Scale;"
        "latency._CONTENDERS = (Haproxy, IptablesDnat);"
        "EXPERIMENTS['latency'].run(Scale(name='long', rounds=9, connections=500, services=(1,),"
        " workers=(1,), seconds=9.0), lambda line: print(line, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stdout
            for line in running.stdout:
                if "round 1" in line:
                    break
            else:
                pytest.fail(f"it ended: {running.communicate()[1]}")
            deadline = time.monotonic() + 20
            while not (clients := processes("calls")) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert clients
            assert left_behind(running.pid)
            running.send_signal(signal.SIGINT)
            _output, errors = running.communicate(timeout=30)
        finally:
            running.kill()
    assert "KeyboardInterrupt" in errors
    assert left_behind(running.pid) == []
    assert not clients & processes("calls")


def processes(program: str) -> set[int]:
    """Pids that run a C program of the bench's."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/exe"):
        with contextlib.suppress(OSError):
            if link.readlink().name.startswith(f"{program}-"):
                found.add(int(link.parent.name))
    return found
