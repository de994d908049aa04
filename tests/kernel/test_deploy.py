"""The proxy with exactly the rights that deploy/ gives it, and without each of them.

A right that is written there and not needed fails here as one that is needed and not written. Rights do not
differ between queue readers; the data path ``mark`` uses the same tools.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.kernel.capabilities import Capability
from nfqproxy.lab.topology import Topology, topology
from tests.kernel.conftest import WEB_VIP4, WEB_VIP6, MakeTopology
from tests.kernel.manifests import Manifest, Port, service, text
from tests.kernel.proxy import Proxy, wait_until
from tests.kernel.responder import Responder
from tests.kernel.sandbox import CLEANUP, DAEMON_SET, Sandbox
from tests.kernel.snapshot import snapshot

CONTAINER = Sandbox.of_container(DAEMON_SET)
CLEANER = Sandbox.of_container(CLEANUP, "initContainers")
UNIT = Sandbox.of_unit()
SANDBOXES = {"container": CONTAINER, "unit": UNIT}
EACH_CAPABILITY = [
    pytest.param(sandbox, capability, id=f"{name}-{capability}")
    for name, sandbox in [*SANDBOXES.items(), ("cleanup", CLEANER)]
    for capability in sandbox.capabilities
]
HOST_LACKS = 3


def objects(built: Topology) -> list[Manifest]:
    """One Service with ClientIP affinity, so that there is something to write to /run/nfqproxy."""
    pods = [address for pod in built.pods_of("n1") for address in (pod.address4, pod.address6)]
    ports = [Port(port=80, target=8080)]
    found = service("web", vips=[WEB_VIP4, WEB_VIP6], ports=ports, endpoints=pods)
    found[0]["spec"]["sessionAffinity"] = "ClientIP"
    return found


@pytest.fixture(scope="module")
def built() -> Iterator[Topology]:
    with topology() as made, Responder() as responder:
        for pod in made.pods:
            responder.serve(pod.namespace, pod.name, 8080)
        yield made


def ask(built: Topology, address: str) -> str:
    """Name of the backend that answers a new connection."""

    def connect() -> str:
        with socket.create_connection((address, 80), timeout=5) as sock:
            return sock.recv(100).split()[0].decode()

    return built.client.namespace.call(connect)


def effective(pid: int) -> set[str]:
    status = Path(f"/proc/{pid}/status").read_text()
    bits = int(status.partition("CapEff:")[2].split()[0], 16)
    names = {capability.value: capability.name for capability in Capability}
    return {names.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1}


@pytest.mark.parametrize(
    ("sandbox", "backend", "data_path"),
    [
        pytest.param(CONTAINER, "nft", "ctnetlink", id="container"),
        pytest.param(CONTAINER, "nft", "mark", id="container-mark"),
        pytest.param(CONTAINER, "legacy", "ctnetlink", id="container-legacy"),
        pytest.param(UNIT, "nft", "ctnetlink", id="unit"),
    ],
)
def test_what_is_granted_is_enough(
    built: Topology, sandbox: Sandbox, backend: str, data_path: str
) -> None:
    node = built.node.namespace
    before = snapshot(node)
    flags = ("--iptables", backend)
    with Proxy(node, objects(built), *flags, data_path=data_path, before=sandbox.command) as proxy:
        for pid in (proxy.pid, *proxy.worker_pids()):
            assert effective(pid) == set(sandbox.capabilities)
            assert not os.access(f"/proc/{pid}/root/etc", os.W_OK), "its root is read-only"
        for address in (WEB_VIP4, WEB_VIP6):
            assert ask(built, address) == ask(built, address)
        assert proxy.installed() == 4
        # What happens later in its life asks for nothing more.
        proxy.wait_replaced(proxy.kill_worker())
        node.run("ipset", "flush")
        os.kill(proxy.pid, signal.SIGHUP)
        wait_until(
            lambda: WEB_VIP4 in node.run("ipset", "list", "nfqproxy-frontends-4").stdout,
            "SIGHUP puts back what was taken",
        )
        proxy.follow(objects(built)[:-1])
        records = Path(f"/proc/{proxy.pid}/root/run/nfqproxy")
        assert [file.name[:9] for file in records.iterdir()] == ["affinity-"]
        assert "will not outlive" not in proxy.log
        proxy.stop()
    cleaned = node.run(*CLEANER.command, sys.executable, "-m", "nfqproxy", "cleanup", check=False)
    assert cleaned.returncode == 0, cleaned.stderr
    after = snapshot(node)
    if backend == "legacy":
        # Tables of the legacy back end stay, empty: nobody can take them away.
        assert "NFQPROXY" not in after["iptables-legacy-save"] + after["ip6tables-legacy-save"]
        for word in ("iptables-legacy-save", "ip6tables-legacy-save"):
            before[word] = after[word]
    assert after == before


@pytest.mark.parametrize(("sandbox", "capability"), EACH_CAPABILITY)
def test_no_capability_is_granted_in_vain(
    make_topology: MakeTopology, tmp_path: Path, sandbox: Sandbox, capability: str
) -> None:
    """Without it: one sentence that names it, the exit status for a host that lacks something, no change."""
    node = (built := make_topology()).node.namespace
    manifest = tmp_path / "services.json"
    manifest.write_text(text(objects(built)))
    arguments = ["run", "--once", "--manifests", str(manifest), "--node-name", "n1"]
    program = (sys.executable, "-m", "nfqproxy")
    if sandbox is CLEANER:
        node.run(*program, *arguments)
        arguments = ["cleanup"]
    before = snapshot(node)
    less = sandbox.without_capability(capability)
    done = node.run(*less.command, *program, *arguments, check=False)
    assert done.returncode == HOST_LACKS, done.stderr
    assert f"CAP_{capability}" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot(node) == before


@pytest.mark.parametrize("sandbox", SANDBOXES.values(), ids=SANDBOXES.keys())
def test_no_path_is_writable_in_vain(
    make_topology: MakeTopology, tmp_path: Path, sandbox: Sandbox
) -> None:
    built = make_topology()
    node = built.node.namespace
    assert sandbox.directories == ("/run/nfqproxy",)
    assert sandbox.files == ("/run/xtables.lock",)
    narrow = sandbox.without_paths()
    with Proxy(node, objects(built), before=narrow.command) as proxy:
        with node.socket(socket.AF_INET, socket.SOCK_STREAM) as any_client:
            any_client.connect_ex((WEB_VIP4, 80))
        wait_until(lambda: "affinity will not outlive a restart" in proxy.log, "it says so")
    manifest = tmp_path / "services.json"
    manifest.write_text(text(objects(built)))
    done = node.run(
        *narrow.command,
        *(sys.executable, "-m", "nfqproxy", "run", "--once", "--iptables", "legacy"),
        *("--manifests", str(manifest), "--node-name", "n1"),
        check=False,
    )
    assert done.returncode != 0
    assert "/run/xtables.lock" in done.stderr
