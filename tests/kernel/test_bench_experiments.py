"""Every experiment of the bench: what it refuses, and that it leaves nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from bench import established
from bench.contenders import Contender, CReference, IptablesDnat, Nfqproxy, Placement, Serving
from bench.experiments import EXPERIMENTS, connections, latency, overload, packets, scaling
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
TINY = Scale(name="tiny", rounds=1, connections=300, services=(1,), workers=(2,), seconds=0.2)


def left_behind(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"nfqb-{pid}-*")]


def test_no_port_of_a_client_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel would give out these again and again; entries are counted, and c cannot replace one.
    outlast = latency.outlast

    def with_few_ports(place: World) -> None:
        outlast(place)
        place.client.sysctl({"net/ipv4/ip_local_port_range": "40000 40059"})

    monkeypatch.setattr(latency, "outlast", with_few_ports)
    monkeypatch.setattr(latency, "_CONTENDERS", (CReference, IptablesDnat))
    found = EXPERIMENTS["latency"].run(TINY, lambda line: None)
    assert {one.contender for one in found} == {"c", "dnat"}


def test_what_goes_wrong_with_one_contender_leaves_the_others_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_CONTENDERS", (IptablesDnat, LosesSome))
    monkeypatch.setattr(connections, "_VARIANTS", ())
    with pytest.raises(WrongResultError, match=r"loses-some.*270 of 300 SYNs arrived") as raised:
        EXPERIMENTS["connections"].run(replace(TINY, rounds=2), lambda line: None)
    assert {(one.contender, one.metric, one.round) for one in raised.value.kept} == {
        ("dnat", metric, number) for metric in ("rate", "path_cpu") for number in (1, 2)
    }


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
        (
            packets,
            "_CONTENDERS",
            (QueuesItAll,),
            r"queues-all.*512 packets were given to userspace",
        ),
        (packets, "_CONTENDERS", (LosesSome,), r"loses-some.*46[01] of 512 packets arrived"),
        (latency, "_CONTENDERS", (ClaimsAllBackends,), r"claims-all.*got \d+ SYNs, its weight"),
        (
            established,
            "CONTENDERS",
            (QueuesItAll,),
            r"queues-all.*\d+ packets passed the queue for",
        ),
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
    name = "requests" if module is established else module.__name__.rpartition(".")[2]
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
