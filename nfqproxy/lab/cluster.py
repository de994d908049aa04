"""A cluster in namespaces with the real proxy on its first node: built, watched, changed, removed.

What runs in its pods and which Services it has is the business of its kinds (standing.py, stage.py).
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from msgspec.structs import replace

from nfqproxy.api import admin
from nfqproxy.errors import HostError, InputError, NfqproxyError
from nfqproxy.kernel.netns import Namespace
from nfqproxy.kernel.processes import ProcessRef, postponed, stop_processes, uninterrupted
from nfqproxy.lab import state as states
from nfqproxy.lab.servers import require_programs, start_dns, start_web
from nfqproxy.lab.state import LabState
from nfqproxy.lab.topology import Pod, Topology
from nfqproxy.model import DataPath

__all__ = ["PROGRAMS", "Cluster", "Step"]

PROGRAMS = ("ip", "iptables", "ip6tables", "ipset", "nft", "conntrack", "nginx", "dnsmasq")
"""What the lab calls, curl and dig (only printed) left out."""

_PROXY_START_S = 30.0
_FOLLOW_S = 20.0
_RECOVERY_S = 15.0
_FOLLOWED = "nfqproxy: revision "
"""What the proxy logs when workers and kernel have followed a change."""

Step = Callable[[str], None]
"""Is told what is being done, in a few words."""


class Cluster:
    """Builds, uses and removes one lab. ``state`` is kept on disk as well (state.py)."""

    frontends: ClassVar[int] = 1
    """At least so many the proxy must know before it counts as serving."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.topology: Topology = state.topology()
        self.is_claimed = False
        """Whether build() has taken the name, so that there is something to remove."""

    @property
    def node(self) -> Namespace:
        """The namespace the proxy runs in."""
        return self.topology.node.namespace

    @property
    def client(self) -> Namespace:
        """The namespace of the first client."""
        return self.topology.client.namespace

    @property
    def manifest_file(self) -> Path:
        """What the proxy reads and follows."""
        return self.state.folder / "manifests.yaml"

    @property
    def proxy_log(self) -> Path:
        """Standard error of the proxy."""
        return self.state.folder / "nfqproxy.log"

    # ------------------------------------------------------------------------------- building

    def build(self, step: Step, *, proxy_seed: int | None = None) -> None:
        """Make everything; on failure or interrupt the caller removes."""
        require_programs(PROGRAMS)
        states.claim(self.state)
        self.is_claimed = True
        step(f"network: {len(list(self.topology.group))} namespaces {self.state.prefix}*")
        self.topology.build()
        self.furnish(step)
        step(f"proxy: nfqproxy run in {self.node.name}")
        self.start_proxy(proxy_seed)

    def furnish(self, step: Step) -> None:
        """Put servers into the pods and write the first manifests."""
        raise NotImplementedError

    def serve(self, pod: Pod, name: str) -> None:
        """Start nginx and dnsmasq in a pod, which answer with this name."""
        start_web(pod, self.state.folder, name=name)
        self._record()
        start_dns(pod, self.state.folder, name=name)
        self._record()

    def _record(self) -> None:
        started = [ref for member in self.topology.group for ref in member.processes()]
        others = [ref for ref in self.state.processes if ref.is_alive() and ref not in started]
        self.state = replace(self.state, processes=(*others, *started))
        states.save(self.state)

    def start_proxy(self, seed: int | None = None) -> None:
        """Start the proxy and wait until it serves; NfqproxyError with what it said if it does not."""
        command = [sys.executable, "-m", "nfqproxy", "run", "--mode", "replace"]
        command += ["--manifests", str(self.manifest_file), "--node-name", self.topology.node.name]
        command += ["--workers", str(self.state.workers), "--reader", self.state.reader]
        command += ["--data-path", self.state.data_path]
        command += self.proxy_flags()
        if seed is not None:
            command += ["--seed", str(seed)]
        # Whoever removes the lab must know of it, also in a lab that was not built by this process.
        with self.proxy_log.open("ab") as log, postponed():
            child = self.node.popen(*command, stderr=log)
            self._record()
        deadline = time.monotonic() + _PROXY_START_S
        while not self.is_serving():
            if child.poll() is not None:
                problem = f"nfqproxy run exited with status {child.returncode}"
                kind = {2: InputError, 3: HostError}.get(child.returncode, NfqproxyError)
                raise kind(f"{problem}: {self._last_log_line()}")
            if time.monotonic() >= deadline:
                raise NfqproxyError(
                    f"nfqproxy run was not ready after {_PROXY_START_S:g} s:"
                    f" {self._last_log_line()}"
                )
            time.sleep(0.02)

    def proxy_flags(self) -> list[str]:
        """Flags of ``nfqproxy run`` beside those every lab gives it."""
        return []

    # --------------------------------------------------------------------------------- the proxy

    def write_manifests(self, text: str) -> None:
        """Replace the manifest file at once, as a careful editor does."""
        fresh = self.manifest_file.with_suffix(".next")
        fresh.write_text(text)
        fresh.replace(self.manifest_file)

    def follow(self, text: str) -> None:
        """Replace the manifests by others and wait until workers and kernel have followed them."""
        before = self._log_text().count(_FOLLOWED)
        self.write_manifests(text)
        deadline = time.monotonic() + _FOLLOW_S
        while self._log_text().count(_FOLLOWED) == before:
            if time.monotonic() >= deadline:
                raise NfqproxyError(
                    f"the proxy did not follow {self.manifest_file} within {_FOLLOW_S:g} s:"
                    f" {self._last_log_line()}"
                )
            time.sleep(0.01)

    def _log_text(self) -> str:
        return self.proxy_log.read_text(errors="replace")

    def _last_log_line(self) -> str:
        lines = self._log_text().strip().splitlines()
        return lines[-1] if lines else "its log is empty"

    def status(self) -> dict[str, Any]:
        """What ``nfqproxy status -o json`` says in the node; NfqproxyError when none answers."""
        return self.node.call(lambda: admin.ask("status"))

    def is_serving(self) -> bool:
        """Whether the proxy answers, knows the Services and every worker decides."""
        try:
            now = self.status()
        except NfqproxyError:
            return False
        workers = now["workers"]
        return (
            now["frontends"] >= self.frontends
            and len(workers) == self.state.workers
            and all(worker["ready"] for worker in workers)
        )

    def use_data_path(self, data_path: DataPath) -> None:
        """Have a proxy of this data path take the place of the one that serves, if it is of the other."""
        if data_path is not self.state.data_path:
            stop_processes([ProcessRef.of(int(self.status()["pid"]))])
            self.state = replace(self.state, data_path=data_path)
            self.start_proxy()

    def kill_workers(self) -> tuple[int, ...]:
        """SIGKILL to every worker; the process ids they had."""
        pids = tuple(int(worker["pid"]) for worker in self.status()["workers"])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    def has_new_workers(self, killed: tuple[int, ...]) -> bool:
        """Whether other workers decide; waits for them for a while (a slow machine)."""
        deadline = time.monotonic() + _RECOVERY_S
        while True:
            workers = self.status()["workers"]
            if all(worker["ready"] and worker["pid"] not in killed for worker in workers):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)

    # ---------------------------------------------------------------------------------- the end

    def remove(self) -> None:
        """Remove every trace. Idempotent."""
        with uninterrupted():
            self.topology.group.stop_processes()
            states.remove_affinities(self.node)
            self.topology.close()
            states.remove(self.state.name)
