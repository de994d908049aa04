"""The lab's network: everybody reaches everybody in both families, and nothing stays behind."""

import itertools
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nfqproxy.errors import HostError, InputError, KernelError
from nfqproxy.kernel.netns import NETNS_DIR, NamespaceGroup
from nfqproxy.kernel.processes import ProcessRef, stop_processes
from nfqproxy.lab.topology import Topology, TopologySpec, build_topology, topology

from .conftest import MakeTopology, Ping


def names_with(prefix: str) -> list[str]:
    return [entry.name for entry in NETNS_DIR.iterdir() if entry.name.startswith(prefix)]


def test_everybody_reaches_everybody(make_topology: MakeTopology, ping: Ping) -> None:
    built = make_topology(clients=2, pods=(2, 1))
    hosts = [*built.clients, *built.nodes, *built.pods]
    unreachable = [
        (a.name, address)
        for a, b in itertools.product(hosts, hosts)
        for address in (b.address4, b.address6)
        if not ping(a.namespace, address)
    ]
    assert len(hosts) == 7
    assert unreachable == []


def test_the_node_has_a_route_for_an_address_nobody_owns(session_topology: Topology) -> None:
    for vip in ("10.96.0.1", "fd00:10:96::1"):
        route = session_topology.node.namespace.run("ip", "route", "get", vip).stdout
        assert "dev eth0" in route


def test_the_node_uses_its_primary_address_towards_pods(session_topology: Topology) -> None:
    node, pod = session_topology.node, session_topology.pods[0]
    for family, target, source in (
        (socket.AF_INET, pod.address4, node.address4),
        (socket.AF_INET6, pod.address6, node.address6),
    ):
        with node.namespace.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            assert probe.getsockname()[0] == source


@pytest.mark.parametrize("family", [4, 6])
def test_hairpin_path(topology: Topology, family: int) -> None:
    """A pod reaches itself through a virtual address when the node translates both addresses."""
    pod, node = topology.pods[0], topology.node
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    address = pod.address4 if family == 4 else pod.address6
    vip = "10.96.0.7" if family == 4 else "fd00:10:96::7"
    at = f"{address}:8080" if family == 4 else f"[{address}]:8080"
    tables = "iptables" if family == 4 else "ip6tables"
    node.namespace.run(
        *f"{tables} -t nat -A PREROUTING -d {vip} -p tcp --dport 80 -j DNAT --to {at}".split()
    )
    node.namespace.run(*f"{tables} -t nat -A POSTROUTING -o pod11 -j MASQUERADE".split())
    with pod.namespace.socket(kind, socket.SOCK_STREAM) as server:
        server.bind((address, 8080))
        server.listen()
        server.settimeout(5.0)
        with pod.namespace.socket(kind, socket.SOCK_STREAM) as client:
            client.settimeout(5.0)
            client.connect((vip, 80))
            accepted, peer = server.accept()
            with accepted:
                accepted.sendall(b"hairpin")
                assert client.recv(100) == b"hairpin"
    assert peer[0] == (node.address4 if family == 4 else node.address6)


def test_nothing_stays_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), topology(pods=(1,)) as built:  # noqa: PT012
        prefix = built.group.prefix
        child = built.client.namespace.popen("sleep", "600")
        assert len(names_with(prefix)) == 4
        _ = 1 // 0
    assert names_with(prefix) == []
    assert child.returncode == -signal.SIGTERM


def test_nothing_stays_after_a_failed_build() -> None:
    """A namespace of the same name exists already, so the build fails midway."""
    with NamespaceGroup() as group:
        group.create(["n1"])
        with pytest.raises(HostError, match="ip -batch"):
            build_topology(TopologySpec(), prefix=group.prefix)
    assert names_with(group.prefix) == []


def test_children_of_children_are_killed_too() -> None:
    """A shell that ignores SIGTERM, and what it started in the background."""
    with topology(clients=1, pods=(0,)) as built:
        shell = built.client.namespace.popen(
            "sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait; wait", stdout=subprocess.PIPE
        )
        assert shell.stdout is not None
        grandchild = ProcessRef.of(int(shell.stdout.readline()))
        assert grandchild.is_alive()
        built.client.namespace.stop(shell, grace_s=0.2)
    assert shell.returncode == -signal.SIGKILL
    assert not grandchild.is_alive()


def test_a_process_with_a_reused_pid_is_not_touched() -> None:
    with topology(clients=1, pods=(0,)) as built:
        child = built.client.namespace.popen("sleep", "600")
        ref = ProcessRef.of(child.pid)
        stranger = ProcessRef(ref.pid, ref.start_ticks - 1)
        stop_processes([stranger], grace_s=0.1)
        assert ref.is_alive()


def test_an_interrupt_removes_everything() -> None:
    """SIGINT while a program holds a topology."""
    program = textwrap.dedent(
        """
        import time
        from nfqproxy.lab.topology import topology
        with topology(pods=(1,)) as built:
            built.client.namespace.popen("sleep", "600")
            print(built.group.prefix, flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout is not None
        prefix = child.stdout.readline().strip()
        assert len(names_with(prefix)) == 4
        child.send_signal(signal.SIGINT)
        child.wait(20)
    assert names_with(prefix) == []


def test_errors_name_the_problem(session_topology: Topology) -> None:
    namespace = session_topology.client.namespace
    with pytest.raises(HostError, match="no-such-program is not installed"):
        namespace.run("no-such-program")
    with pytest.raises(HostError, match=r"exited 1.*192\.0\.2\.300|192\.0\.2\.300"):
        namespace.ip("addr add 192.0.2.300/24 dev eth0")
    with pytest.raises(KernelError, match="no/such/key"):
        namespace.sysctl({"no/such/key": 1})
    with pytest.raises(HostError, match=r"nothing answers at 192\.0\.2\.1 port 9"):
        namespace.wait_for_port("192.0.2.1", 9, timeout_s=0.1)
    with pytest.raises(InputError, match="1 to 9 nodes"):
        build_topology(TopologySpec(pods=()))


def test_sysctls_belong_to_the_namespace(session_topology: Topology) -> None:
    node, client = session_topology.node.namespace, session_topology.client.namespace
    assert node.read_sysctl("net/ipv4/ip_forward") == "1"
    assert client.read_sysctl("net/ipv4/ip_forward") == "0"
    assert node.read_sysctl("net/ipv4/conf/eth0/rp_filter") == "2"
    assert node.read_sysctl("net/netfilter/nf_conntrack_tcp_timeout_established") == "86400"


def test_this_process_never_changes_its_own_namespace(session_topology: Topology) -> None:
    before = Path("/proc/self/ns/net").readlink()
    inside = session_topology.client.namespace.call(
        lambda: Path("/proc/thread-self/ns/net").readlink()
    )
    assert inside != before
    assert Path("/proc/self/ns/net").readlink() == before
    assert session_topology.client.namespace.path.stat().st_ino == int(str(inside).strip("net:[]"))


def test_a_dead_server_ends_the_wait(session_topology: Topology) -> None:
    namespace = session_topology.client.namespace
    child = namespace.popen("sh", "-c", "exit 3")
    started = time.monotonic()
    with pytest.raises(HostError, match="exited with status 3"):
        namespace.wait_for_port("192.0.2.10", 81, timeout_s=60.0, process=child)
    assert time.monotonic() - started < 30.0
