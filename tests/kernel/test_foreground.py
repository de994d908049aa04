"""At a terminal: Ctrl-C reaches the whole process group, and cleanup tells what it could not see to."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.kernel.netns import Namespace, NamespaceGroup
from tests.kernel.manifests import Port, service, text
from tests.kernel.proxy import Proxy, run_cli
from tests.kernel.snapshot import snapshot

WEB = service(
    "web",
    vips=["10.96.0.80"],
    ports=[Port(name="http", port=80, target=8080)],
    endpoints=["10.244.1.11"],
)


@pytest.fixture
def node() -> Iterator[Namespace]:
    with NamespaceGroup() as group:
        group.create(["node"])
        group["node"].ip("link set lo up")
        yield group["node"]


def host_tools(directory: Path, *left_out: str) -> Path:
    """A directory for PATH with links to the host's rule tools, some left out."""
    directory.mkdir()
    names = ["ipset", "nft", "conntrack", "ip"]
    for family in ("iptables", "ip6tables"):
        for backend in ("", "-nft", "-legacy"):
            names += [f"{family}{backend}{verb}" for verb in ("", "-save", "-restore")]
    for name in names:
        found = shutil.which(name)
        assert found is not None, f"{name} is not installed"
        if name not in left_out:
            (directory / name).symlink_to(found)
    return directory


# Presses Ctrl-C, as a terminal does, while this tool is at work; then goes on as the tool.
_PRESSES = """#!/bin/sh
while [ ! -s {group} ]; do sleep 0.01; done
kill -s INT -- -$(cat {group})
sleep 0.2
exec {real} "$@"
"""


@pytest.mark.parametrize("tool", ["ipset", "iptables-nft-restore", "nft"])
@pytest.mark.parametrize("verb", ["run", "rules apply"])
def test_ctrl_c_while_a_tool_is_at_work(
    node: Namespace, tmp_path: Path, verb: str, tool: str
) -> None:
    """The tool is not cut short; the answer is "interrupted", never a fault of the kernel."""
    before = snapshot(node)
    manifests, group = tmp_path / "services.json", tmp_path / "group"
    manifests.write_text(text(WEB))
    tools = host_tools(tmp_path / "bin", tool)
    wrapper = tools / tool
    wrapper.write_text(_PRESSES.format(group=group, real=shutil.which(tool)))
    wrapper.chmod(0o755)
    arguments = {
        "run": ("run", "--manifests", str(manifests), "--iptables", "nft"),
        "rules apply": ("rules", "apply", "--iptables", "nft"),
    }[verb]
    child = node.popen(
        *("env", f"PATH={tools}:{os.environ['PATH']}"),
        *(sys.executable, "-m", "nfqproxy", *arguments),
        stderr=subprocess.PIPE,
    )
    try:
        assert os.getpgid(child.pid) == child.pid
        group.write_text(str(child.pid))
        said = child.communicate(timeout=30)[1].decode()
    finally:
        node.stop(child)
    assert (child.returncode, said.strip()) == (130, "")
    assert snapshot(node) == before


def test_cleanup_tells_of_a_proxy_that_runs(node: Namespace) -> None:
    with Proxy(node, WEB) as proxy:
        pid = json.loads(run_cli(node, "status", "-o", "json").stdout)["pid"]
        done = run_cli(node, "cleanup", "-o", "json")
        assert done.returncode == 0
        assert json.loads(done.stdout)["removed"]
        assert done.stderr == (
            f"nfqproxy: process {pid} still runs here, now without rules:"
            " stop it, or start it again\n"
        )
        proxy.stop()
    assert run_cli(node, "cleanup").stderr == ""


def test_cleanup_does_not_claim_what_it_cannot_see(node: Namespace, tmp_path: Path) -> None:
    assert run_cli(node, "rules", "apply").returncode == 0
    tools = host_tools(tmp_path / "bin", "ipset")
    done = run_cli(node, "cleanup", env={**os.environ, "PATH": str(tools)})
    assert done.returncode == 3
    assert "removed nft table ip nfqproxy" in done.stdout
    assert "without ipset" in done.stderr
    assert "apt-get install ipset and run cleanup again" in done.stderr
    done = run_cli(node, "cleanup")
    assert done.returncode == 0
    assert "removed ipset nfqproxy-frontends-4" in done.stdout
    assert run_cli(node, "cleanup").stdout == "nothing to remove\n"
