"""``nfqproxy doctor`` on the real kernel: a good host, and one thing wrong at a time.

Each run gets a private directory of namespace names and a mark in its environment, so that whatever
it leaves behind is seen, also beside other runs on the same machine.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.api import admin
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel.mark_users import mark_users
from nfqproxy.kernel.netns import Namespace, NamespaceGroup
from nfqproxy.kernel.queue_socket import QueueSocket
from nfqproxy.lab.topology import Topology
from nfqproxy.wire import ctnetlink
from nfqproxy.worker.conntrack import ConntrackSocket

from .rules_fixtures import state

MARK = "NFQPROXY_DOCTOR_TEST"
IDS = [
    "privileges",
    *(f"tool-{name}" for name in ("iptables", "ip6tables", "ipset", "nft", "conntrack", "ip")),
    "python",
    "netfilterqueue",
    "kernel",
    "rules",
    "nfqueue",
    "ctnetlink",
    "queue-numbers",
    "iptables-backends",
    "kube-proxy",
    "conntrack-room",
    "udp-timeout",
    "forwarding",
    "rp-filter",
    "service-route",
    "self-test",
]
ROOT_ONLY = ["rules", "nfqueue", "ctnetlink", "iptables-backends", "kube-proxy", "self-test"]


class Doctor:
    """Runs doctor in a namespace and looks for what it leaves behind."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self._namespace = namespace
        self._directory = directory
        self.mark = secrets.token_hex(8)

    def argv(self, *arguments: str, path: str = "", before: Sequence[str] = ()) -> list[str]:
        setting = [f"{MARK}={self.mark}", *([f"PATH={path}"] if path else [])]
        script = (
            "mount -t tmpfs names /run/netns || exit 99\n"
            'left=$1; shift; "$@"; status=$?; ls -A /run/netns >"$left"; exit $status'
        )
        return [
            *("unshare", "--mount", "sh", "-c", script, "sh", str(self._directory / "left")),
            *(*before, shutil.which("env") or "env", *setting),
            *(sys.executable, "-m", "nfqproxy", "doctor", *arguments),
        ]

    def run(
        self, *arguments: str, path: str = "", before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        argv = self.argv(*arguments, path=path, before=before)
        done = self._namespace.run(*argv, check=False, timeout_s=100)
        self.assert_nothing_left()
        return done

    def report(
        self,
        *arguments: str,
        ids: Sequence[str] = IDS,
        code: int,
        path: str = "",
        before: Sequence[str] = (),
    ) -> dict[str, dict[str, str]]:
        """The JSON's checks by id; every general promise about them is asserted."""
        done = self.run("-o", "json", *arguments, path=path, before=before)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr == ""
        document = json.loads(done.stdout)
        assert list(document) == ["ok", "checks"]
        assert document["ok"] is (code == 0)
        for check in document["checks"]:
            assert list(check) == ["id", "title", "status", "found", "effect", "fix"]
            assert check["found"]
            assert check["status"] in ("ok", "warn", "fail", "unknown")
            assert bool(check["effect"]) is bool(check["fix"]) is (check["status"] != "ok")
            assert "\n" not in "".join(check.values())
        assert [check["id"] for check in document["checks"]] == list(ids)
        return {check["id"]: check for check in document["checks"]}

    def assert_nothing_left(self) -> None:
        assert (self._directory / "left").read_text() == ""
        assert marked_processes(self.mark) == []


def marked_processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it ended meanwhile
    return found


def but_ok(checks: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: check["status"] for name, check in checks.items() if check["status"] != "ok"}


@pytest.fixture
def node(topology: Topology) -> Namespace:
    """The namespace of a well-kept node."""
    return topology.node.namespace


@pytest.fixture
def doctor(node: Namespace, tmp_path: Path) -> Doctor:
    return Doctor(node, tmp_path)


@contextmanager
def empty_namespace() -> Iterator[Namespace]:
    with NamespaceGroup() as group:
        group.create(["bare"])
        yield group["bare"]


def test_a_good_node_passes_and_is_not_changed(node: Namespace, doctor: Doctor) -> None:
    before = state(node.name)
    checks = doctor.report(code=0)
    assert but_ok(checks) == {}
    assert (
        "1 packet" in checks["self-test"]["found"] or "one packet" in checks["self-test"]["found"]
    )
    assert state(node.name) == before
    assert node.run("conntrack", "-L").stdout == ""


def test_text_for_people(node: Namespace, doctor: Doctor) -> None:
    node.sysctl({"net/ipv4/ip_forward": 0})
    done = doctor.run()
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("warn"))
    assert lines[place : place + 3] == [
        "warn     IP forwarding        off (net.ipv4.ip_forward)",
        "         effect               the node's own connections are served; those of pods and of"
        " other machines are not forwarded",
        "         what to do           sysctl -w net.ipv4.ip_forward=1 (keep it in /etc/sysctl.d)",
    ]
    assert lines[-1] == "The proxy can run here (21 ok, 1 warn)."
    assert done.stderr == ""


def test_by_ip_netns_exec_as_a_person_would(node: Namespace) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", node.name, sys.executable, "-m", "nfqproxy", "doctor"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("The proxy can run here (22 ok).")


def tools_without(directory: Path, *absent: str) -> Path:
    """A directory for PATH that holds the host's tools, some left out."""
    directory.mkdir()
    for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        for tool in Path(folder).glob("*"):
            if tool.name not in absent and not (directory / tool.name).is_symlink():
                (directory / tool.name).symlink_to(tool)
    return directory


def test_ipset_is_missing(doctor: Doctor, tmp_path: Path) -> None:
    path = tools_without(tmp_path / "bin", "ipset")
    checks = doctor.report(code=3, path=str(path))
    assert but_ok(checks) == {"tool-ipset": "fail", "rules": "unknown", "self-test": "unknown"}
    assert checks["tool-ipset"]["fix"] == "apt-get install ipset"
    assert checks["self-test"]["found"] == "not tried: ipset is missing"


def test_conntrack_is_missing_and_not_needed(doctor: Doctor, tmp_path: Path) -> None:
    path = tools_without(tmp_path / "bin", "conntrack")
    assert but_ok(doctor.report(code=0, path=str(path))) == {"tool-conntrack": "warn"}


def test_a_kernel_without_a_set_type(doctor: Doctor, tmp_path: Path) -> None:
    """Simulated: ipset answers as on a kernel without ip_set_hash_ipportip."""
    path = tools_without(tmp_path / "bin", "ipset")
    real = shutil.which("ipset")
    (path / "ipset").write_text(
        "#!/bin/sh\n"
        "refuse() { echo 'ipset v7.17: Kernel error received: Invalid argument' >&2; exit 1; }\n"
        'case "$*" in *hash:ip,port,ip*) refuse ;; *restore*)\n'
        '  text=$(cat); case "$text" in *hash:ip,port,ip*) refuse ;; esac\n'
        f'  printf \'%s\\n\' "$text" | {real} "$@"; exit ;;\nesac\n'
        f'exec {real} "$@"\n'
    )
    (path / "ipset").chmod(0o755)
    checks = doctor.report(code=3, path=str(path))
    assert but_ok(checks) == {"rules": "fail", "self-test": "fail"}
    assert "this kernel lacks ipset type hash:ip,port,ip" in checks["rules"]["found"]
    assert checks["rules"]["fix"].startswith("modprobe -a ")
    assert "ip_set_hash_ipportip" in checks["rules"]["fix"]
    assert "nfqproxy run ended with status 3" in checks["self-test"]["found"]


def test_conntrack_is_nearly_full(node: Namespace, doctor: Doctor) -> None:
    """A namespace cannot lower nf_conntrack_max, so its table is filled for real."""
    limit = int(node.read_sysctl("net/netfilter/nf_conntrack_max"))
    wanted = limit * 82 // 100

    def fill() -> None:
        connections = ConntrackSocket()
        vip = ip_address("203.0.113.1").packed
        try:
            for start in range(0, wanted, 256):
                batch = [
                    ctnetlink.new_entry(
                        ctnetlink.Tuple((0x0A000000 + i).to_bytes(4, "big"), vip, 17, 1024, 53),
                        dnat=None,
                        snat=None,
                        timeout_s=600,
                        seq=i - start,
                    )
                    for i in range(start, min(start + 256, wanted))
                ]
                assert connections.create(batch) == []
        finally:
            connections.close()

    node.call(fill)
    checks = doctor.report(code=0)
    assert but_ok(checks) == {"conntrack-room": "warn"}
    assert f"{wanted:,} of {limit:,} entries" in checks["conntrack-room"]["found"]
    assert f"nf_conntrack_max={limit * 2}" in checks["conntrack-room"]["fix"]


def test_the_kernel_forgets_datagrams_too_soon(node: Namespace, doctor: Doctor) -> None:
    node.sysctl({"net/netfilter/nf_conntrack_udp_timeout": 20})
    checks = doctor.report(code=3)
    assert but_ok(checks) == {"udp-timeout": "fail"}
    assert "nf_conntrack_udp_timeout=30" in checks["udp-timeout"]["fix"]


def test_the_queue_number_is_taken(node: Namespace, doctor: Doctor) -> None:
    taken = node.call(lambda: QueueSocket.bind(100, 128))
    try:
        checks = doctor.report(code=3)
        assert but_ok(checks) == {"queue-numbers": "fail"}
        assert "taken: queue 100 by netlink port" in checks["queue-numbers"]["found"]
        assert checks["queue-numbers"]["fix"].endswith("nfqproxy run --queue 101")
        checks = doctor.report("--queue", "101", code=0)
        assert but_ok(checks) == {}
        assert checks["queue-numbers"]["found"] == "queue 101 is free; other programs read 100"
    finally:
        taken.release()


def test_both_iptables_back_ends_hold_rules(node: Namespace, doctor: Doctor) -> None:
    for tool in ("iptables-nft", "iptables-legacy"):
        node.run(tool, "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT")
    checks = doctor.report(code=0)
    assert but_ok(checks) == {"iptables-backends": "warn"}
    assert "1 rules in the nft back end and 1 in the legacy" in checks["iptables-backends"]["found"]


def test_no_route_for_services(tmp_path: Path) -> None:
    with empty_namespace() as bare:
        bare.ip("link set lo up")
        doctor = Doctor(bare, tmp_path)
        checks = doctor.report(code=0)
        assert but_ok(checks) == {"forwarding": "warn", "service-route": "warn"}
        assert "10.96.0.1: Network is unreachable" in checks["service-route"]["found"]
        checks = doctor.report("--service-cidr", "10.43.0.0/16", code=3)
        assert but_ok(checks) == {"forwarding": "warn", "service-route": "fail"}
        # A route for the Services alone is enough.
        bare.ip(
            "link add d0 type veth peer name d1",
            *("link set d0 up", "link set d1 up", "route add 10.43.0.0/16 dev d0"),
        )
        checks = doctor.report("--service-cidr", "10.43.0.0/16", code=0)
        assert but_ok(checks) == {"forwarding": "warn"}


def test_strict_reverse_path_filter(node: Namespace, doctor: Doctor) -> None:
    # The kernel takes the larger of the two, so loose (2) on the device would win.
    node.sysctl({"net/ipv4/conf/eth0/rp_filter": 0, "net/ipv4/conf/all/rp_filter": 1})
    checks = doctor.report(code=0)
    assert but_ok(checks) == {"rp-filter": "warn"}
    assert "net.ipv4.conf.eth0.rp_filter=2" in checks["rp-filter"]["fix"]


@pytest.mark.parametrize("where", ["iptables", "nft"])
def test_kube_proxy_is_here(node: Namespace, doctor: Doctor, where: str) -> None:
    assert but_ok(doctor.report("--mode", "overlay", code=0)) == {"kube-proxy": "warn"}
    if where == "iptables":
        node.run("iptables", "-t", "nat", "-N", "KUBE-SERVICES")
    else:
        node.run("nft", "add", "table", "ip", "kube-proxy")
    assert but_ok(doctor.report(code=0)) == {"kube-proxy": "warn"}
    assert but_ok(doctor.report("--mode", "overlay", code=0)) == {}


def test_packet_marks_of_others(node: Namespace, doctor: Doctor) -> None:
    """Only the data path that uses marks asks; kube-proxy's and Calico's bits are not in the way."""
    rule = ("-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--set-xmark")
    node.run("iptables", *rule, "0x4000/0x4000")
    node.run("ip6tables-legacy", *rule, "0x10000/0xffff0000")
    ids = [each for each in IDS if each not in ("ctnetlink", "udp-timeout")]
    ids.insert(ids.index("conntrack-room"), "packet-marks")
    assert but_ok(doctor.report("--data-path", "mark", code=0, ids=ids)) == {
        "iptables-backends": "warn"
    }
    assert node.call(mark_users)[0].bits == 0x4000
    node.run("ip", "-6", "rule", "add", "fwmark", "0x10/0x10", "lookup", "9")
    node.run("nft", "add table inet x { chain c { meta mark & 0x20 == 0x20 accept; }; }")
    assert {user.where.split()[0]: user.bits for user in node.call(mark_users)} == {
        "iptables-nft-save": 0x4000,
        "ip6tables-legacy-save": 0xFFFF0000,
        "nft": 0x20,
        "ip": 0x10,
    }
    checks = doctor.report("--data-path", "mark", code=0, ids=ids)
    assert checks["packet-marks"]["status"] == "warn"
    assert "nft table inet x" in checks["packet-marks"]["found"]
    assert "--mark-mask 0x3f4f" in checks["packet-marks"]["fix"]


def test_beside_a_running_proxy(node: Namespace, doctor: Doctor, tmp_path: Path) -> None:
    """The queue is ours then, and the running proxy is not disturbed."""
    manifest = tmp_path / "services.yaml"
    manifest.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n"
        "spec: {clusterIP: 10.96.0.80, ports: [{port: 80}]}\n"
    )
    proxy = node.popen(sys.executable, "-m", "nfqproxy", "run", "--manifests", str(manifest))
    status = wait_for_status(node)
    before = without_counters(node)
    checks = doctor.report(code=0)
    assert but_ok(checks) == {}
    assert checks["queue-numbers"]["found"] == (
        f"queue 100: read by the nfqproxy that runs here, process {status['pid']}"
    )
    assert without_counters(node) == before
    assert proxy.poll() is None


def without_counters(node: Namespace) -> dict[str, str]:
    """Rules and sets; the counters of the rules go on while the proxy runs."""
    counter = re.compile(r"packets \d+ bytes \d+")
    return {name: counter.sub("", text) for name, text in state(node.name).items()}


def wait_for_status(node: Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        try:
            return node.call(lambda: admin.ask("status"))
        except NfqproxyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def test_without_root(doctor: Doctor) -> None:
    # Only to read the program itself, wherever it is installed; no right over the network.
    before = (
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    )
    checks = doctor.report(code=3, before=before)
    assert but_ok(checks) == {"privileges": "fail"} | dict.fromkeys(ROOT_ONLY, "unknown")
    assert checks["privileges"]["fix"] == "run it as root: sudo nfqproxy doctor"
    assert all("root" in checks[name]["fix"] for name in ROOT_ONLY)


def test_root_without_the_right_over_the_network(doctor: Doctor) -> None:
    checks = doctor.report(code=3, before=("setpriv", "--bounding-set=-net_admin"))
    assert checks["privileges"]["status"] == "fail"
    assert "CAP_NET_ADMIN" in checks["privileges"]["found"]
    assert checks["nfqueue"]["status"] != "ok"
    assert checks["self-test"]["status"] != "ok"


def test_root_without_raw_sockets(doctor: Doctor) -> None:
    checks = doctor.report(code=3, before=("setpriv", "--bounding-set=-net_raw"))
    assert checks["privileges"]["status"] == "fail"
    assert "CAP_NET_RAW" in checks["privileges"]["found"]
    # It is no invention: the rules do not load.
    assert checks["rules"]["status"] == "fail"
    assert "CAP_NET_RAW" in checks["rules"]["found"]


def test_a_container_that_cannot_make_namespaces(doctor: Doctor) -> None:
    checks = doctor.report(code=3, before=("setpriv", "--bounding-set=-sys_admin"))
    assert but_ok(checks) == {
        "privileges": "warn",
        **dict.fromkeys(["rules", "nfqueue", "ctnetlink", "self-test"], "unknown"),
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["nfqproxy.lab.echo", "nfqproxy.worker", "nfqproxy run"])
def test_an_interrupt_leaves_nothing(
    node: Namespace, doctor: Doctor, number: signal.Signals, moment: str
) -> None:
    """Sent in mid-test, as soon as a certain process of it is there."""
    before = state(node.name)
    shell = node.popen(*doctor.argv("-o", "json"), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(moment in line for line in marked_processes(doctor.mark)):
        assert shell.poll() is None
        assert time.monotonic() < deadline
    signal_doctor(doctor.mark, number)
    shell.wait(60)
    assert shell.returncode == 128 + number
    assert shell.stdout is not None
    assert shell.stdout.read() == b""
    doctor.assert_nothing_left()
    assert state(node.name) == before


def parent_of(pid: int) -> int:
    """Parent process id; 0 when the process has gone."""
    stat = read(Path(f"/proc/{pid}/stat"))
    return int(stat.rpartition(b")")[2].split()[1]) if stat else 0


def signal_doctor(mark: str, number: signal.Signals) -> None:
    """Signal the one process of this run whose command line says so."""
    pids = [
        int(process.parent.name)
        for process in Path("/proc").glob("[0-9]*/cmdline")
        if b"nfqproxy\0doctor" in read(process)
        and f"{MARK}={mark}".encode() in read(process.parent / "environ")
    ]
    # A child between fork and exec still bears doctor's command line.
    pids = [pid for pid in pids if parent_of(pid) not in pids]
    assert len(pids) == 1
    os.kill(pids[0], number)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_wrong_flag_is_one_sentence(doctor: Doctor, node: Namespace) -> None:
    done = node.run(
        sys.executable, "-m", "nfqproxy", "doctor", "--service-cidr", "ten", check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'nfqproxy: --service-cidr: "ten" is no network; write it like 10.96.0.0/12\n'
    )
    done = node.run(sys.executable, "-m", "nfqproxy", "doctor", "--queue", "70000", check=False)
    assert done.returncode == 2
    assert "70000" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_service_network_of_a_family_that_is_switched_off(tmp_path: Path) -> None:
    with empty_namespace() as bare:
        bare.ip("link set lo up")
        bare.sysctl({"net/ipv6/conf/all/disable_ipv6": 1})
        checks = Doctor(bare, tmp_path).report("--service-cidr", "fd00:10:96::/112", code=3)
        assert checks["service-route"]["status"] == "fail"
        assert checks["self-test"]["status"] == "ok"
