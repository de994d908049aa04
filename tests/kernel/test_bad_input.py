"""Bad input and a host that lacks something: one clear sentence, the right exit status, nothing changed.

Every case runs the real command in a namespace of its own with neighbours' rules, and the listings of
all rule tools, the queues and the processes of that namespace are held against those before.
"""

import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.counters import queue_statistics
from nfqproxy.kernel.netns import Namespace, NamespaceGroup
from nfqproxy.kernel.queue_socket import QueueSocket
from nfqproxy.wire import nlmsg
from tests.kernel.manifests import Manifest, Port, service, text
from tests.kernel.proxy import READERS, run_cli, wait_until
from tests.kernel.snapshot import restore_foreign, snapshot

USAGE, HOST, FAILED, INTERRUPTED = 2, 3, 1, 130
PORTS = [Port(name="http", port=80, target=8080)]


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """A namespace with neighbours' rules, shared: no test may change it."""
    with NamespaceGroup() as group:
        group.create(["node"])
        node = group["node"]
        node.ip("link set lo up")
        restore_foreign(node)
        yield node


@pytest.fixture(name="node")
def unchanged(namespace: Namespace) -> Iterator[Namespace]:
    """The namespace; afterwards its rules are as before and no process is in it."""
    before = snapshot(namespace)
    yield namespace
    assert snapshot(namespace) == before
    assert processes(namespace) == []
    assert namespace.call(queue_statistics) == {}


def processes(namespace: Namespace) -> list[str]:
    done = subprocess.run(
        ["ip", "netns", "pids", namespace.name], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def refused(
    done: "subprocess.CompletedProcess[str]", status: int, *parts: str, lines: int = 1
) -> None:
    """It ended with this status and one sentence that holds all ``parts``."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    assert len(said) == lines, done.stderr
    assert said[-1].startswith("nfqproxy: ")
    for part in parts:
        assert part in said[-1]


def web() -> list[Manifest]:
    return service("web", vips=["10.96.0.80"], ports=PORTS, endpoints=["10.244.1.11"])


def changed(change: Callable[[list[Manifest]], object]) -> str:
    """The manifest of a good Service with one fault in it."""
    objects = web()
    change(objects)
    return text(objects)


def _weights(objects: list[Manifest]) -> None:
    objects[0]["metadata"]["annotations"] = {"nfqproxy.io/weights": '{"10.244.1.11": -1}'}


# Name -> text of the manifest, and what the answer must name beside the file.
FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", ("is empty", "put manifests in it")),
    "no-objects": ("---\n# nothing\n---\n", ("is empty",)),
    "yaml-syntax": ("kind: Service\nspec: [\n", ("line 3", "not YAML")),
    "tab": ("kind: Service\n\tspec: {}\n", ("line 2", "not YAML")),
    "not-a-mapping": ("- 1\n- 2\n", ("document 1",)),
    "binary": ("\0\1\2", ("not YAML",)),
    "port-70000": (
        changed(lambda o: o[0]["spec"]["ports"][0].update(port=70000)),
        ("Service default/web", "spec.ports[0].port", "70000", "65535"),
    ),
    "port-as-text": (
        changed(lambda o: o[0]["spec"]["ports"][0].update(port="http")),
        ("Service default/web", "spec.ports[0].port", "integer"),
    ),
    "weight": (changed(_weights), ("Service default/web", "nfqproxy.io/weights", "-1", "from 0")),
    "unknown-field": (
        changed(lambda o: o[0]["spec"].update(clustrIP="10.96.0.80")),
        ("Service default/web", "spec.clustrIP", 'did you mean "clusterIP"'),
    ),
    "wrong-family": (
        changed(lambda o: o[1]["endpoints"][0].update(addresses=["fd00::1"])),
        (
            "EndpointSlice default/web-ipv4",
            "endpoints[0].addresses[0]",
            "fd00::1",
            "addressType IPv6",
        ),
    ),
    "no-address": (
        changed(lambda o: o[1]["endpoints"][0].update(addresses=["not an address"])),
        ("EndpointSlice default/web-ipv4", "endpoints[0].addresses[0]", "not an address"),
    ),
    "unknown-annotation": (
        changed(lambda o: o[0]["metadata"].update(annotations={"nfqproxy.io/weigths": "{}"})),
        ("Service default/web", "nfqproxy.io/weigths", "nfqproxy.io/weights"),
    ),
    "twice": (text([*web(), web()[0]]), ("Service default/web", "twice")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_manifest(node: Namespace, tmp_path: Path, fault: str) -> None:
    content, parts = FAULTS[fault]
    file = tmp_path / "services.yaml"
    file.write_text(content)
    refused(run_cli(node, "run", "--manifests", str(file)), USAGE, f"{file}: ", *parts)


def test_good_manifest_beside_a_faulty_one(node: Namespace, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text(web()))
    (tmp_path / "b.yaml").write_text("{")
    done = run_cli(node, "run", "--manifests", str(tmp_path), "--once")
    refused(done, USAGE, str(tmp_path / "b.yaml"), "line ")


@pytest.mark.parametrize("kind", ["missing", "empty-directory", "a-socket"])
def test_manifests_that_cannot_be_read(node: Namespace, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    expected = {
        "missing": "no such file or directory; give the path",
        "empty-directory": "holds no *.yaml, *.yml, *.json; put a manifest there",
        "a-socket": "is no regular file; give a manifest file",
    }
    if kind == "empty-directory":
        path.mkdir()
    elif kind == "a-socket":
        os.mkfifo(path)
    refused(run_cli(node, "run", "--manifests", str(path)), USAGE, f"{path}: ", expected[kind])


def test_unreadable_file(node: Namespace, tmp_path: Path) -> None:
    """Root reads everything, so the file is one whose read the kernel refuses: a process's memory."""
    done = run_cli(node, "run", "--manifests", "/proc/self/mem")
    refused(done, USAGE, "/proc/self/mem: cannot be read: input/output error; give the path")


FLAGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no-manifests": ((), ("--manifests",)),
    "workers": (("--workers", "0"), ("--workers", "0 is not within 1..64")),
    "queue": (("--queue", "70000"), ("--queue", "70000 is not within 0..65535")),
    "queue-and-workers": (("--queue", "65535", "--workers", "2"), ("--queue", "0..65534")),
    "queue-length": (("--queue-length", "0"), ("--queue-length", "0 is not within 1..")),
    "cluster-cidr": (
        ("--cluster-cidr", "10.244.0.0/33"),
        ("--cluster-cidr", "10.244.0.0/33", "10.244.0.0/16"),
    ),
    "mark-mask": (("--mark-mask", "0x3"), ("--mark-mask", "0x3 is no mask of 3 to 32 bits")),
    "mark-mask-word": (("--mark-mask", "bits"), ("--mark-mask", '"bits" is no number', "0x3f7f")),
    "node-address": (("--node-address", "n1"), ("--node-address", '"n1" is no IP address')),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_out_of_range(node: Namespace, tmp_path: Path, flags: str) -> None:
    arguments, parts = FLAGS[flags]
    file = tmp_path / "services.json"
    file.write_text(text(web()))
    manifests = () if flags == "no-manifests" else ("--manifests", str(file))
    refused(run_cli(node, "run", *manifests, *arguments), USAGE, *parts)


CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown-field": ("wrokers: 2\n", ("wrokers", 'did you mean "workers"')),
    "wrong-type": ("workers: many\n", ("workers", "integer")),
    "out-of-range": ("firstQueue: 70000\n", ("firstQueue", "70000", "65535")),
    "mask-of-two-bits": ("markMask: 0x3000\n", ("markMask", "0x3000", "3 to 32 bits", "0x3f7f")),
    "mask-as-text": ('markMask: "0x3f7f"\n', ("markMask", "integer")),
    "wrong-data-path": ("dataPath: marks\n", ("dataPath", '"marks"', '"mark"')),
    "wrong-choice": ("mode: overlord\n", ("mode", "overlord", "overlay")),
    "wrong-kind": ("kind: Deployment\n", ("kind", "NfqproxyConfiguration")),
    "bad-cidr": ("clusterCIDR: 10.244.0.0\n/16", ("line ",)),
    "empty": ("", ("NfqproxyConfiguration",)),
    "syntax": ("mode: [\n", ("line 2",)),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_faulty_configuration(node: Namespace, tmp_path: Path, config: str) -> None:
    content, parts = CONFIGS[config]
    file = tmp_path / "config.yaml"
    file.write_text(content)
    refused(run_cli(node, "run", "--config", str(file)), USAGE, f"{file}: ", *parts)


# Leaves root after the modules are loaded, so that it works wherever the project lies.
_AS_NOBODY = """
import os, sys
import nfqproxy.cli.rules, nfqproxy.cli.run, nfqproxy.cli.status
from nfqproxy.cli.main import main
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.argv = ["nfqproxy", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--manifests", "services.json"),
        ("run", "--manifests", "services.json", "--once"),
        ("rules", "apply"),
        ("cleanup",),
    ],
    ids=" ".join,
)
def test_without_root(node: Namespace, arguments: tuple[str, ...]) -> None:
    done = node.run(sys.executable, "-c", _AS_NOBODY, *arguments, check=False)
    refused(done, HOST, "root", "run as root")


def test_status_without_a_proxy(node: Namespace) -> None:
    for output in ("text", "json"):
        done = run_cli(node, "status", "-o", output)
        refused(done, FAILED, "no nfqproxy runs", "start one with nfqproxy run")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory for PATH with the host's tools as links, for a test to take from."""
    directory = tmp_path / "bin"
    directory.mkdir()
    names = ["ipset", "nft", "conntrack", "ip"]
    for family in ("iptables", "ip6tables"):
        for backend in ("", "-nft", "-legacy"):
            names += [f"{family}{backend}{verb}" for verb in ("", "-save", "-restore")]
    for name in names:
        found = shutil.which(name)
        assert found is not None, f"{name} is not installed"
        (directory / name).symlink_to(found)
    return directory


@pytest.mark.parametrize(
    ("tool", "package"), [("ipset", "ipset"), ("nft", "nftables"), ("ip6tables", "iptables")]
)
def test_missing_tool(
    node: Namespace, tools: Path, tmp_path: Path, tool: str, package: str
) -> None:
    for link in tools.iterdir():
        if link.name.split("-")[0] == tool:
            link.unlink()
    file = tmp_path / "services.json"
    file.write_text(text(web()))
    env = {**os.environ, "PATH": str(tools)}
    for arguments in (("run", "--manifests", str(file)), ("rules", "apply")):
        done = run_cli(node, *arguments, env=env)
        refused(done, HOST, tool, f"not installed; apt-get install {package}")


@pytest.mark.parametrize("reader", READERS)
def test_queue_number_taken(node: Namespace, tmp_path: Path, reader: str) -> None:
    file = tmp_path / "services.json"
    file.write_text(text(web()))
    taken = node.call(lambda: QueueSocket.bind(101, 128))
    try:
        done = run_cli(
            *(node, "run", "--manifests", str(file), "--reader", reader, "--workers", "2")
        )
    finally:
        taken.handle.close()
    refused(done, FAILED, "queue 101", "taken", "--queue")


_NO_NFQUEUE = """#!/bin/sh
# iptables of a kernel without xt_NFQUEUE: what nf_tables answers to a rule with an unknown target.
text=$(cat)
case "$text" in
*NFQUEUE*) echo "Warning: Extension NFQUEUE revision 0 not supported, missing kernel module?" >&2
    echo "{name}: line 9: RULE_APPEND failed (No such file or directory): rule in chain X" >&2
    exit 4 ;;
esac
printf '%s\\n' "$text" | exec {real} "$@"
"""


def test_kernel_without_the_nfqueue_target(node: Namespace, tools: Path, tmp_path: Path) -> None:
    """Simulated: the restore commands refuse NFQUEUE rules in the words of a kernel without it."""
    for name in ("iptables-nft", "ip6tables-nft", "iptables", "ip6tables"):
        link = tools / f"{name}-restore"
        real = shutil.which(link.name)
        link.unlink()
        link.write_text(_NO_NFQUEUE.replace("{name}", link.name).replace("{real}", str(real)))
        link.chmod(0o755)
    file = tmp_path / "services.json"
    file.write_text(text(web()))
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    for arguments in (
        ("run", "--manifests", str(file), "--iptables", "nft"),
        ("rules", "apply", "--iptables", "nft"),
    ):
        done = run_cli(node, *arguments, env=env)
        refused(done, HOST, "NFQUEUE", "modprobe", "xt_NFQUEUE")


@pytest.mark.parametrize(
    ("code", "status", "part"),
    [
        (errno.EINVAL, HOST, "modprobe nfnetlink_queue"),
        (errno.EBUSY, FAILED, "taken"),
    ],
)
def test_kernel_that_refuses_a_queue(
    node: Namespace, monkeypatch: pytest.MonkeyPatch, code: int, status: int, part: str
) -> None:
    """A kernel without nfnetlink_queue answers a bind with EINVAL; here the answer is forged."""
    real = nlmsg.ack

    def forged(message: nlmsg.Message) -> nlmsg.Ack:
        return dataclasses.replace(real(message), errno=code)

    monkeypatch.setattr(nlmsg, "ack", forged)
    with pytest.raises(NfqproxyError) as caught:
        node.call(lambda: QueueSocket.bind(100, 128))
    assert caught.value.exit_code == status
    assert part in str(caught.value)


def _admin_socket_is_bound(node: Namespace) -> bool:
    table = node.call(lambda: Path("/proc/thread-self/net/unix").read_text())
    return "@nfqproxy-admin" in table


_PHASES: dict[str, Callable[[Namespace], object]] = {
    "manifests are read": _admin_socket_is_bound,
    "a worker is started": lambda node: len(processes(node)) > 1,
    "a queue is bound": lambda node: node.call(queue_statistics),
}


@pytest.mark.parametrize("phase", _PHASES)
def test_interrupt_during_start(namespace: Namespace, tmp_path: Path, phase: str) -> None:
    """Ctrl-C (SIGINT): either nothing was changed yet, or the start ran through and was stopped."""
    before = snapshot(namespace)
    file = tmp_path / "services.json"
    objects = [
        item
        for n in range(1, 251)
        for item in service(
            f"s{n}", vips=[f"10.96.1.{n}"], ports=PORTS, endpoints=["10.244.1.11", "10.244.1.12"]
        )
    ]
    file.write_text(text(objects))
    child = namespace.popen(
        *[sys.executable, "-m", "nfqproxy", "run", "--manifests", str(file), "--workers", "2"],
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: child.poll() is not None or _PHASES[phase](namespace), phase)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=30)[1].decode()
        assert "Traceback" not in said
        assert processes(namespace) == []
        assert namespace.call(queue_statistics) == {}
        if child.returncode == INTERRUPTED:
            assert snapshot(namespace) == before
        else:
            assert child.returncode == 0, said
            assert re.search(r"^nfqproxy: stopped; ", said, re.MULTILINE)
            assert run_cli(namespace, "cleanup").returncode == 0
            assert snapshot(namespace) == before
    finally:
        namespace.stop(child)


def test_interrupt_right_after_the_start(node: Namespace, tmp_path: Path) -> None:
    """While modules are loaded: no traceback either."""
    file = tmp_path / "services.json"
    file.write_text(text(web()))
    child = node.popen(
        *[sys.executable, "-m", "nfqproxy", "run", "--manifests", str(file)], stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: _loaded_msgspec(child.pid) or child.poll() is not None, "modules load")
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=30)[1].decode()
    finally:
        node.stop(child)
    assert child.returncode == INTERRUPTED
    assert said.strip() == ""


def _loaded_msgspec(pid: int) -> bool:
    """The compiled part of msgspec is mapped: the program's own modules are being loaded."""
    try:
        return "msgspec" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
