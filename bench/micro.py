"""Single functions, timed by pyperf in fresh processes: ``python -m bench micro``.

pyperf and not pytest-benchmark: it runs each function in several processes, so that the hash seed and
the layout of memory are sampled too, and it needs no plugin in every run of the tests. Times are wall times
of one CPU; where a function takes many items, of one item.

Preparations are made when a benchmark runs, for pyperf starts this module once per process and benchmark.
"""

import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from time import perf_counter

import pyperf

from bench.service_files import ServiceFiles, Source, vip
from bench.services import PORT
from bench.world import NODE_ADDRESS, NODE_NAME
from nfqproxy import balancers
from nfqproxy.api import channel
from nfqproxy.balancers import Balancer
from nfqproxy.control.node import NodeSettings, node_context
from nfqproxy.control.objects import Objects
from nfqproxy.control.table import ServiceTable
from nfqproxy.core import template
from nfqproxy.core.dataplane import Dataplane, QueuedPacket
from nfqproxy.core.fallback import frontend_elements
from nfqproxy.core.plan_table import plans_for_node
from nfqproxy.core.sources import SourceClasses
from nfqproxy.model import FrontendPlan, NodeContext
from nfqproxy.sources import file
from nfqproxy.wire import packet

SERVICES, ENDPOINTS = 200, 3
BATCH = 64
_SEED = 1
_POD = "10.244.1.11"
_PODS = "10.244.0.0/16"

Timed = Callable[[int], float]
"""From a number of loops to the seconds they took."""


@cache
def _objects(source: Source) -> Objects:
    with tempfile.TemporaryDirectory(prefix="nfqb-micro-") as scratch:
        return _load(_written(Path(scratch), source))


def _written(scratch: Path, source: Source) -> Path:
    files = ServiceFiles(directory=scratch, source=source, services=SERVICES, endpoints=ENDPOINTS)
    files.write(_POD)
    return files.path


def _load(path: Path) -> Objects:
    return file.load([path])


@cache
def _node() -> tuple[NodeContext, NodeSettings]:
    settings = NodeSettings(node_name=NODE_NAME, cluster_cidrs=(_PODS,))
    return node_context(_objects(Source.FILE_JSON), settings), settings


@cache
def _plans() -> tuple[FrontendPlan, ...]:
    table = ServiceTable(NODE_NAME)
    table.replace(_objects(Source.FILE_JSON))
    return tuple(plans_for_node(table.ports.values(), *_node()).values())


class _NoInterfaces:
    """Pods are told by their addresses: nobody asks."""

    def changed(self) -> bool:
        return False

    def name(self, arrival: int) -> str | None:
        return None


def _dataplane() -> Dataplane:
    return Dataplane(
        rng=random.Random(_SEED),
        classes=SourceClasses(_node()[0].pod_detector, [ip_address(NODE_ADDRESS).packed]),
        interfaces=_NoInterfaces(),
        masquerade_source=lambda backend: ip_address(NODE_ADDRESS).packed,
    )


@cache
def _batch() -> list[QueuedPacket]:
    """SYNs from different ports to different Services."""
    return [
        (number, 0, _syn(vip(number * SERVICES // BATCH), 40_000 + number))
        for number in range(BATCH)
    ]


def _syn(destination: str, source_port: int) -> bytes:
    addresses = ip_address("10.244.2.9").packed, ip_address(destination).packed
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 7, 0x4000, 64, 6, 0, *addresses)
    return head + struct.pack("!HHIIBBHHH", source_port, PORT, 1, 0, 0x50, 2, 64240, 0, 0)


def _repeated(function: Callable[[], object], loops: int) -> float:
    steps = range(loops)
    start = perf_counter()
    for _ in steps:
        function()
    return perf_counter() - start


@cache
def _balancer(weights: tuple[int, ...]) -> Balancer:
    balancer = balancers.create("weighted-random")
    balancer.update(weights, random.Random(_SEED))
    return balancer


def _pick(weights: tuple[int, ...]) -> Timed:
    return lambda loops: _repeated(_balancer(weights).pick, loops)


def _update(loops: int) -> float:
    balancer, rng = balancers.create("weighted-random"), random.Random(_SEED)
    weights = tuple(range(1, 101))
    return _repeated(lambda: balancer.update(weights, rng), loops)


def _parse_headers(loops: int) -> float:
    syn = _batch()[0][2]
    return _repeated(lambda: packet.parse(syn), loops)


@cache
def _loaded_dataplane() -> Dataplane:
    dataplane = _dataplane()
    dataplane.upsert(_plans())
    return dataplane


def _assemble(loops: int) -> float:
    dataplane, batch = _loaded_dataplane(), _batch()
    entries, _ = dataplane.assemble(batch)
    assert len(entries) == BATCH, "every SYN of the batch must become an entry"
    return _repeated(lambda: dataplane.assemble(batch), loops)


def _template(loops: int) -> float:
    frontend = ip_address(vip(0)).packed, PORT
    backend = ip_address(_POD).packed, 8080
    return _repeated(
        lambda: template.build(
            protocol=6, frontend=frontend, backend=backend, masquerade_source=None
        ),
        loops,
    )


def _compile(loops: int) -> float:
    plans = _plans()
    dataplane = _dataplane()
    return _repeated(lambda: dataplane.upsert(plans), loops)


def _read(source: Source) -> Timed:
    def timed(loops: int) -> float:
        with tempfile.TemporaryDirectory(prefix="nfqb-micro-") as scratch:
            path = _written(Path(scratch), source)
            return _repeated(lambda: _load(path), loops)

    return timed


def _table(loops: int) -> float:
    objects = _objects(Source.FILE_JSON)
    return _repeated(lambda: ServiceTable(NODE_NAME).replace(objects), loops)


def _plan(loops: int) -> float:
    table = ServiceTable(NODE_NAME)
    table.replace(_objects(Source.FILE_JSON))
    return _repeated(lambda: plans_for_node(table.ports.values(), *_node()), loops)


def _encode(loops: int) -> float:
    message = channel.Plans(
        revision=1, is_whole=True, pod_detector=_node()[0].pod_detector, upserts=_plans()
    )
    return _repeated(lambda: channel.encode(message), loops)


def _fallback(loops: int) -> float:
    plans = _plans()
    return _repeated(lambda: [frontend_elements(plan) for plan in plans], loops)


BENCHMARKS: dict[str, tuple[Timed, int]] = {
    # Name -> what is timed, and how many items one loop handles.
    "pick, 3 equal weights": (_pick((1, 1, 1)), 1),
    "pick, weights 5:3:2": (_pick((5, 3, 2)), 1),
    "pick, 100 weights": (_pick(tuple(range(1, 101))), 1),
    "balancer update, 100 weights": (_update, 1),
    "parse headers of a SYN": (_parse_headers, 1),
    "assemble, per packet of a batch of 64": (_assemble, BATCH),
    "build a message template": (_template, 1),
    "compile plans, per frontend": (_compile, SERVICES),
    "read a YAML directory, per Service": (_read(Source.DIRECTORY), SERVICES),
    "read one YAML file, per Service": (_read(Source.FILE), SERVICES),
    "read one JSON file, per Service": (_read(Source.FILE_JSON), SERVICES),
    "service table, per Service": (_table, SERVICES),
    "plans, per Service": (_plan, SERVICES),
    "encode plans for a worker, per frontend": (_encode, SERVICES),
    "fallback elements, per frontend": (_fallback, SERVICES),
}


def main() -> None:
    """pyperf's command line, and ``--only WORD``."""

    def pass_on(command: list[str], arguments: object) -> None:
        command += ["--only", str(getattr(arguments, "only", ""))]

    runner = pyperf.Runner(program_args=("-m", "bench.micro"), add_cmdline_args=pass_on)
    runner.argparser.add_argument(
        "--only", default="", help="only benchmarks whose name holds this text"
    )
    only = runner.parse_args().only
    chosen = {name: how for name, how in BENCHMARKS.items() if only in name}
    if not chosen:
        raise SystemExit(f"no benchmark's name holds {only!r}: there are {', '.join(BENCHMARKS)}")
    for name, (timed, items) in chosen.items():
        runner.bench_time_func(name, timed, inner_loops=items)


if __name__ == "__main__":
    main()
