"""Supervisor and workers over time: restarts, reloads, refusals of the kernel, and what they leave.

That no connection is lost by a death is test_failures.py; here it is whether the proxy comes back to
its full strength by itself. No packet is looked at, so one data path will do; what SIGHUP puts back on the
other is in test_mark_path.py.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.netns import ProcessRef
from nfqproxy.lab.topology import Topology
from tests.kernel.conftest import WEB_VIP4, MakeTopology
from tests.kernel.manifests import Manifest, Port, service
from tests.kernel.proxy import Proxy, wait_until
from tests.kernel.test_failures import load, running

OTHER_VIP4 = "10.96.0.84"


def web(built: Topology, *extra_vips: str) -> list[Manifest]:
    """Service web, and one more for each further address; all on TCP port 80."""
    pods = [pod.address4 for pod in built.pods_of("n1")]
    objects: list[Manifest] = []
    for number, vip in enumerate((WEB_VIP4, *extra_vips)):
        ports = [Port(port=80, target=8080)]
        objects += service(f"web-{number}", vips=[vip], ports=ports, endpoints=pods)
    return objects


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def members(proxy: Proxy) -> str:
    return proxy.namespace.run("ipset", "list", "nfqproxy-frontends-4").stdout


def test_each_of_several_workers_is_replaced(make_topology: MakeTopology) -> None:
    """A worker must not hold its sibling's queue open, or the sibling can never be replaced."""
    with running(make_topology(), workers=3) as proxy:
        before = descriptors(proxy.pid)
        for round_ in range(2):
            for index in range(3):
                killed = proxy.worker_pids()[index]
                os.kill(killed, signal.SIGKILL)

                def is_replaced(index: int = index, killed: int = killed) -> bool:
                    worker = proxy.status()["workers"][index]
                    return worker["ready"] and worker["pid"] not in (None, killed)

                wait_until(is_replaced, f"worker {index} was replaced, round {round_}")
        with load(proxy.namespace) as flood:
            flood.reach(20)
        assert "taken by another program" not in proxy.log
        # Neither descriptors nor zombies pile up.
        wait_until(lambda: descriptors(proxy.pid) <= before, "all descriptors were given back")
        assert children(proxy.pid) == set(proxy.worker_pids())


def test_a_supervisor_that_was_held_up_keeps_its_workers(make_topology: MakeTopology) -> None:
    """A paused virtual machine, or a long computation: the workers answered, nobody listened."""
    with running(make_topology(), workers=2) as proxy:
        workers = proxy.worker_pids()
        os.kill(proxy.pid, signal.SIGSTOP)
        time.sleep(7)
        os.kill(proxy.pid, signal.SIGCONT)
        time.sleep(1.5)  # longer than the time between two looks at a worker
        assert proxy.worker_pids() == workers
        assert "does not answer" not in proxy.log


def test_a_change_that_the_kernel_refuses_is_tried_again(topology: Topology) -> None:
    """Somebody deletes our table, a change fails; no second change is needed to mend it."""
    with Proxy(topology.node.namespace, web(topology)) as proxy:
        proxy.namespace.run("nft", "delete", "table", "ip", "nfqproxy")
        proxy.write(web(topology, OTHER_VIP4))
        wait_until(lambda: "did not take a change" in proxy.log, "the failure is told")
        wait_until(
            lambda: proxy.status()["frontends"] == 2 and OTHER_VIP4 in members(proxy),
            "the change was made after all",
        )
        listing = proxy.namespace.run("nft", "list", "map", "ip", "nfqproxy", "slot-count").stdout
        assert WEB_VIP4 in listing
        assert OTHER_VIP4 in listing


def test_sighup_puts_back_what_others_took(topology: Topology) -> None:
    with Proxy(topology.node.namespace, web(topology)) as proxy:
        node = proxy.namespace
        node.run("ipset", "flush")
        node.run("iptables", "-t", "raw", "-F")
        node.run("nft", "flush", "map", "ip", "nfqproxy", "slot-count")
        for _ in range(20):
            os.kill(proxy.pid, signal.SIGHUP)

        def is_back() -> bool:
            maps = node.run("nft", "list", "map", "ip", "nfqproxy", "slot-count").stdout
            rules = node.run("iptables", "-t", "raw", "-S").stdout
            queues = "-j NFQUEUE" in rules and "-A PREROUTING" in rules
            return WEB_VIP4 in members(proxy) and WEB_VIP4 in maps and queues

        wait_until(is_back, "sets, rules and maps are back")
        assert proxy.status()["workers"][0]["restarts"] == 0


def test_sighup_during_the_start_is_not_fatal(topology: Topology) -> None:
    proxy = Proxy(topology.node.namespace, web(topology))
    admin_socket = "@nfqproxy-admin"

    def is_listening() -> bool:
        return admin_socket in topology.node.namespace.call(
            lambda: Path("/proc/thread-self/net/unix").read_text()
        )

    process = proxy.namespace.popen(
        sys.executable, "-m", "nfqproxy", "run", "--manifests", str(proxy.manifest)
    )
    try:
        wait_until(is_listening, "it has begun")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: proxy.status()["workers"][0]["ready"], "it runs")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        proxy.namespace.stop(process)
        proxy.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_while_a_worker_is_being_replaced(
    make_topology: MakeTopology, number: signal.Signals
) -> None:
    """No worker outlives the proxy, and none has to be killed for it."""
    with running(make_topology()) as proxy:
        worker = proxy.kill_worker()
        wait_until(
            lambda: children(proxy.pid) - {worker},
            "a new worker process has begun",
        )
        replacements = [ProcessRef.of(pid) for pid in children(proxy.pid)]
        os.kill(proxy.pid, number)
        os.kill(proxy.pid, number)
        wait_until(lambda: not ProcessRef.of(proxy.pid).is_alive(), "the proxy has ended")
        assert not [ref for ref in replacements if ref.is_alive()]
        assert "killing it" not in proxy.log
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_sent_again_and_again_ends_it_cleanly(
    topology: Topology, number: signal.Signals
) -> None:
    """Up to its last moment: exit status 0, not "killed by a signal" after all work was done."""
    proxy = Proxy(topology.node.namespace, web(topology))
    arguments = ["run", "--manifests", str(proxy.manifest)]
    process = proxy.namespace.popen(sys.executable, "-m", "nfqproxy", *arguments)

    def is_ready() -> bool:
        try:
            return bool(proxy.status()["workers"][0]["ready"])
        except (NfqproxyError, IndexError):
            return False

    try:
        wait_until(is_ready, "it runs")
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.001)
        assert process.returncode == 0
    finally:
        proxy.namespace.stop(process)
        proxy.close()
