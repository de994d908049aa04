"""``bench run`` with the experiments on the whole program: real connections, and nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.experiments import programming
from bench.observation import Scale
from bench.proxy_node import ProxyNode, WrongConnectionError, proxy_node
from bench.service_files import ServiceFiles, Source

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 and not os.environ.get("CI"),
        reason="makes network namespaces: needs root",
    ),
]

REPOSITORY = Path(__file__).parents[2]
TINY = Scale(name="tiny", rounds=1, connections=1, services=(20,), workers=(1,), seconds=0.1)


def start(output: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "bench", "run", *words, "--profile", "smoke", "-o", str(output)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_of(pid: int) -> list[str]:
    """Namespaces of a bench that are still there."""
    return [path.name for path in Path("/run/netns").glob(f"nfqb-{pid}-*")]


def test_ctrl_c_removes_everything(tmp_path: Path) -> None:
    running = start(tmp_path / "result.json", "--experiments", "programming,memory")
    try:
        deadline = time.monotonic() + 30
        while not (proxies := proxies_of(running.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        # Not SIGKILL: that would leave what is under test here.
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert proxies, "the bench did not start the proxy"
    assert running.returncode == 130
    assert "removed" in said
    assert left_of(running.pid) == []
    assert not [pid for pid in proxies if Path(f"/proc/{pid}").exists()]
    assert not (tmp_path / "result.json").exists()


def proxies_of(bench_pid: int) -> list[str]:
    """Proxies in the node namespace of a bench."""
    found: list[str] = []
    for name in left_of(bench_pid):
        if name.endswith("-n1"):
            done = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            found += [pid for pid in done.stdout.split() if is_proxy(pid)]
    return found


def is_proxy(pid: str) -> bool:
    try:
        return b"nfqproxy" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def node() -> Iterator[ProxyNode]:
    with proxy_node() as built:
        yield built


def test_a_change_that_does_not_come_is_no_time(
    node: ProxyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programming, "_CHANGE_LIMIT_S", 0.3)
    # What is put in place is what was there: the endpoint stays where it is.
    same = ServiceFiles.prepare_change
    monkeypatch.setattr(
        ServiceFiles,
        "prepare_change",
        lambda files, pod, others: same(files, others, others=others),
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        pytest.raises(WrongConnectionError, match="still go to the old endpoint"),
    ):
        programming._changes(node, files(scratch), 1, lambda line: None)


def test_a_service_that_leads_elsewhere_is_no_first_sync(node: ProxyNode) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wrong = files(scratch)
        wrong.write(node.pods[1])
        with (
            node.proxy(wrong.path) as running,
            pytest.raises(WrongConnectionError, match="came to pod 1, not 0"),
        ):
            running.wait_connected(wrong.probes[0], 0, within_s=30)


def files(scratch: str) -> ServiceFiles:
    return ServiceFiles(directory=Path(scratch), source=Source.FILE_JSON, services=3, endpoints=2)
