"""The real proxy as a subprocess in a node namespace: start, ask, stop, kill, clean up.

Use :class:`Proxy` as a context manager; whatever happens, its processes are gone afterwards, and when
the block fails its log is printed.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from nfqproxy.api import admin
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.affinity_file import remove_stored, store_path
from nfqproxy.kernel.counters import queue_statistics
from nfqproxy.kernel.netns import Namespace, ProcessRef, stop_processes
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Manifest, text

CLUSTER_CIDR = "10.244.0.0/16,fd00:10:244::/56"
READERS = ("netlink", "netfilterqueue")
DATA_PATHS = ("ctnetlink", "mark")
COMBINATIONS = [
    pytest.param((reader, path), id=f"{reader}-{path}") for reader in READERS for path in DATA_PATHS
]
"""Every reader on every data path, as parameters of a test or fixture."""
RUNS = [each for each in COMBINATIONS if each.values[0] != ("netfilterqueue", "mark")]
"""The same without the combination that differs from others in nothing but how a verdict is sent."""
_QUEUE_RULE = re.compile(r"^-A NFQPROXY-QUEUE -p (\w+) .* -c (\d+) \d+ -j NFQUEUE", re.MULTILINE)
_FOLLOWED = "nfqproxy: revision "
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = 20.0) -> None:
    """Poll until ``condition()`` is true; AssertionError that says ``what`` when it never is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"within {timeout_s:g} s it never became true that {what}")
        time.sleep(0.01)


def run_cli(
    namespace: Namespace,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> "subprocess.CompletedProcess[str]":
    """``nfqproxy ARGUMENTS`` in a namespace, to its end; the exit status is the caller's to check."""
    return namespace.run(
        sys.executable,
        *["-m", "nfqproxy", *arguments],
        check=False,
        env=None if env is None else dict(env),
        timeout_s=timeout_s,
    )


class Proxy:
    """``nfqproxy run`` in ``namespace``, with ``objects`` in one manifest file that it follows.

    ``source``: flags that say where its Services come from instead. With ``kubeconfig`` it follows the API
    server named there, which is to serve the manifest file.
    """

    def __init__(
        self,
        namespace: Namespace,
        objects: Sequence[Manifest],
        *flags: str,
        node_name: str = "n1",
        cluster_cidr: str = CLUSTER_CIDR,
        reader: str = "netlink",
        data_path: str = "ctnetlink",
        mode: str = "replace",
        workers: int = 1,
        source: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "nfqproxy"),
        before: Sequence[str] = (),
        kubeconfig: Path | None = None,
    ) -> None:
        self.namespace = namespace
        self._directory = tempfile.TemporaryDirectory(prefix="nfqproxy-test-")
        # An interpreter of its own, by which it also starts its workers: see lose_workers().
        self._python = Path(self._directory.name, "python")
        self._python.symlink_to(sys.executable)
        self._program = program
        # A command that becomes the one it is given, such as setpriv.
        self._before = before
        self._env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(env or {})}
        self._log = Path(self._directory.name, "log")
        self.manifest = Path(self._directory.name, "services.json")
        self.write(objects)
        source = source or ("--manifests", str(self.manifest))
        if kubeconfig is not None:
            source = ("--kubeconfig", str(kubeconfig))
        self._arguments = ["run", *source, "--node-name", node_name]
        if cluster_cidr:
            self._arguments += ["--cluster-cidr", cluster_cidr]
        self._queue_table = "raw" if data_path == "ctnetlink" else "mangle"
        self._arguments += ["--reader", reader, "--data-path", data_path, "--mode", mode]
        self._arguments += ["--workers", str(workers), *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[ProcessRef] = set()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            print(f"--- log of nfqproxy\n{self.log}")
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            print(f"--- log of nfqproxy\n{self.log}")
        self.close()

    @property
    def log(self) -> str:
        """What it has written to stdout and stderr, over all starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until all its workers decide packets."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        with self._log.open("ab") as log:
            self._process = self.namespace.popen(
                *self._before,
                str(self._python),
                *self._program,
                *self._arguments,
                stdout=log,
                stderr=log,
                env=self._env,
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until status answers and says that every worker is ready."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(
                    f"nfqproxy ended with status {self._process.returncode}:\n{self.log}"
                )
            try:
                workers = self.status()["workers"]
            except NfqproxyError:
                workers = []
            if workers and all(worker["ready"] for worker in workers):
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"nfqproxy was not ready in time:\n{self.log}")
            time.sleep(0.01)

    def status(self) -> dict[str, Any]:
        """What ``nfqproxy status -o json`` prints, asked in this process."""
        document = self.namespace.call(lambda: admin.ask("status"))
        # Remembered for close(): workers are sessions of their own.
        self._seen.update(ProcessRef.of(w["pid"]) for w in document["workers"] if w["pid"])
        return document

    def worker_pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [worker["pid"] for worker in self.status()["workers"] if worker["pid"]]

    def packets(self) -> int:
        """Packets that the present workers have read from their queues."""
        return sum(worker["packets"] for worker in self.status()["workers"])

    def installed(self) -> int:
        """Connections that the present workers have translated."""
        return sum(worker["installed"] for worker in self.status()["workers"])

    def counters(self) -> dict[str, int]:
        """What the workers count as out of the ordinary, summed over them."""
        total: dict[str, int] = {}
        for worker in self.status()["workers"]:
            for name, count in worker["counters"].items():
                total[name] = total.get(name, 0) + count
        return total

    def queued(self) -> dict[tuple[Family, Protocol], int]:
        """Packets that each queue rule has matched since the rules were put in, by iptables' listing."""
        found: dict[tuple[Family, Protocol], int] = {}
        for family, tool in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables")):
            listing = self.namespace.run(
                tool, *["-t", self._queue_table, "-S", "NFQPROXY-QUEUE", "-v"]
            ).stdout
            for protocol, packets in _QUEUE_RULE.findall(listing):
                found[family, Protocol[protocol.upper()]] = int(packets)
        return found

    def write(self, objects: Sequence[Manifest]) -> None:
        """Replace the manifest file at once, as a careful editor does."""
        self.write_text(text(objects))

    def write_text(self, content: str) -> None:
        """Replace the manifest file by any text."""
        fresh = self.manifest.with_suffix(".next")
        fresh.write_text(content)
        fresh.replace(self.manifest)

    def follow(self, objects: Sequence[Manifest]) -> None:
        """Replace the manifest (it must differ) and wait until workers and kernel follow it."""
        # Logged when the change is through; status counts a revision as soon as the workers have it.
        before = self.log.count(_FOLLOWED)
        self.write(objects)
        wait_until(lambda: self.log.count(_FOLLOWED) > before, "the new manifest is followed")

    def stop(self) -> None:
        """SIGTERM; it must exit 0 and leave no worker behind."""
        self.status()
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(_STOP_TIMEOUT_S)
        assert status == 0, f"exit status {status} after SIGTERM:\n{self.log}"
        left = [ref.pid for ref in self._seen if ref.is_alive()]
        assert not left, f"workers {left} outlived the proxy:\n{self.log}"

    def kill_worker(self) -> int:
        """SIGKILL the first worker; returns the pid it had."""
        pid = self.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def waiting(self) -> dict[int, int]:
        """Packets that wait for a verdict, by queue."""
        found = self.namespace.call(queue_statistics)
        return {number: queue.waiting for number, queue in sorted(found.items())}

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Inside the block the workers do not run: what is queued waits together."""
        workers = self.worker_pids()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)

    def wait_replaced(self, killed: int) -> None:
        """Wait until every worker decides, none of them the killed one."""
        wait_until(
            lambda: all(
                worker["ready"] and worker["pid"] != killed for worker in self.status()["workers"]
            ),
            "a new worker is ready",
        )

    def lose_workers(self) -> None:
        """SIGKILL all workers and let none come back; the supervisor goes on following the manifest."""
        self._python.unlink()
        for pid in self.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.worker_pids() == [], "the supervisor has noticed")
        assert self.namespace.call(queue_statistics) == {}, "somebody still reads the queue"

    def kill(self) -> None:
        """SIGKILL the supervisor and its workers, all at once as an out-of-memory killer might."""
        victims = [self.pid, *self.worker_pids()]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(_STOP_TIMEOUT_S)
        wait_until(lambda: not any(ref.is_alive() for ref in self._seen), "the workers are gone")

    def cleanup(self) -> str:
        """``nfqproxy cleanup``, which must exit 0; returns its output."""
        done = run_cli(self.namespace, "cleanup")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End every process of it that is left and remove its files. Idempotent."""
        if self._process is not None:
            self.namespace.stop(self._process)
        stop_processes(sorted(self._seen, key=lambda ref: ref.pid))
        self.namespace.call(lambda: remove_stored(store_path()))
        self._directory.cleanup()
