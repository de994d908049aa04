"""Resident memory of the supervisor and of a worker, with all Services in use.

Read after every Service has had a connection, for a worker prepares what a connection needs when it
meets the first: the workers must have made an entry for each. ``rss`` is what the process holds
(VmRSS, proc_pid_status(5): shared pages of the interpreter included), ``peak`` the most it ever held.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.bars import NFQPROXY
from bench.experiments.programming import SYNC_ENDPOINTS, most
from bench.observation import Observation, Scale
from bench.process import memory
from bench.proxy_node import ProxyNode, Running, proxy_node
from bench.service_files import ServiceFiles, Source, vip

_SYNC_LIMIT_S, _COUNT_LIMIT_S = 120.0, 20.0
_FIELDS = {"rss": "VmRSS", "peak": "VmHWM"}


class Memory:
    """At the least and the most Services, from a directory and, where time is asked for, an API server."""

    name = "memory"
    title = "How much memory do the processes hold?"

    def run(self, scale: Scale, progress: Callable[[str], None]) -> list[Observation]:
        """See :class:`bench.observation.Experiment`."""
        found: list[Observation] = []
        rounds = max(1, scale.rounds // 3)  # it hardly differs from start to start
        with proxy_node() as node, tempfile.TemporaryDirectory(prefix="nfqb-") as scratch:
            sources = [Source.DIRECTORY]
            if scale.name == "full":
                sources.append(Source.KUBERNETES)
            numbers = sorted({scale.services[0], most(scale)})
            for services, source in itertools.product(numbers, sources):
                files = ServiceFiles(
                    directory=Path(tempfile.mkdtemp(dir=scratch)),
                    source=source,
                    services=services,
                    endpoints=SYNC_ENDPOINTS,
                )
                files.write(node.pods[0])
                for number in range(1, rounds + 1):
                    progress(
                        f"round {number} of {rounds}: {services:,} Services from a {source.value}"
                    )
                    found += [
                        Observation(
                            experiment=self.name,
                            contender=NFQPROXY,
                            metric=metric,
                            unit="bytes",
                            value=value,
                            round=number,
                            parameters={
                                "services": services,
                                "endpoints": services * SYNC_ENDPOINTS,
                                "source": source.value,
                            },
                        )
                        for metric, value in _measure(node, files).items()
                    ]
        return found


def _measure(node: ProxyNode, files: ServiceFiles) -> dict[str, int]:
    with node.served(files) as server, node.proxy(files.path, server) as running:
        for probe in files.probes:
            running.wait_connected(probe, 0, within_s=_SYNC_LIMIT_S)
        before = _installed(running)
        for number in range(files.services):
            node.touch(vip(number))
        deadline = time.monotonic() + _COUNT_LIMIT_S
        while (made := _installed(running) - before) < files.services:
            running.raise_unless(
                time.monotonic() < deadline,
                f"{files.services} Services had a connection, the workers made {made} entries",
            )
            time.sleep(0.1)
        worker = int(str(running.workers()[0]["pid"]))
        return {
            f"{who}_{what}": memory(pid, field)
            for who, pid in (("supervisor", running.pid), ("worker", worker))
            for what, field in _FIELDS.items()
        }


def _installed(running: Running) -> int:
    return sum(int(str(worker["installed"])) for worker in running.workers())
