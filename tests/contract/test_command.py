"""``python -m nfqproxy.testing``: output, exit codes, and what it says to wrong input."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

COMMAND = [sys.executable, "-m", "nfqproxy.testing"]
SERVICE = "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80}]}}\n"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_a_kubeconfig_and_serves_until_it_is_told_to_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(SERVICE)
    with subprocess.Popen(
        [*COMMAND, f"--manifests={file}", "--no-tls", "--token=abc"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            said = child.stderr.readline()
            assert said.startswith("nfqproxy: 1 objects at http://127.0.0.1:")
        finally:
            child.send_signal(number)
        config = yaml.safe_load(child.stdout.read())
        assert child.stderr.read() == ""
    assert child.returncode == 0
    assert config["clusters"][0]["cluster"]["server"] == said.split()[-1]
    assert config["users"][0]["user"] == {"token": "abc"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SERVICE + "---\n" + SERVICE, "m.yaml: Service default/web: is given twice; remove one"),
        (SERVICE.replace("80", "eighty"), "m.yaml: Service default/web: Service in version"),
        (SERVICE.replace("web", "W_W"), 'Invalid value: "W_W"'),
        ("hello\n", "m.yaml: is no Kubernetes object"),
        ("a: [\n", "m.yaml: line 2, column 1: not YAML"),
        ("{kind: Service, apiVersion: v1}\n", "m.yaml: Service: metadata: has no metadata"),
    ],
)
def test_a_bad_manifest_is_told_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    done = run("--manifests", str(tmp_path / "m.yaml"), "--no-tls")
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fault=cuts=1"], 'there is no fault "cuts"; there are cut,'),
        (["--fault=cut"], "--fault cut: give KIND=RATE, such as cut=0.1"),
        (["--fault=cut=2"], "fault cut: 2.0 is no probability; give 0 to 1"),
        (["--manifests=/nonexistent.yaml"], "/nonexistent.yaml: cannot be read"),
        (
            ["--kubeconfig=/nonexistent/kubeconfig"],
            "--kubeconfig /nonexistent/kubeconfig: cannot be",
        ),
        (["--port=70000"], "70000 is not in the range"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(arguments: list[str], told: str) -> None:
    done = run("--no-tls", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_served_is_passed_over(tmp_path: Path) -> None:
    """A whole application's manifests may be given; lists are unfolded."""
    file = tmp_path / "m.yaml"
    other = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}"
    file.write_text(f"{{apiVersion: v1, kind: List, items: [{other}, {SERVICE.strip()}]}}\n")
    with subprocess.Popen(
        [*COMMAND, f"--manifests={file}", "--no-tls"], stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        try:
            assert child.stderr.readline().endswith("apps/v1 Deployment is not served\n")
            assert "1 objects at" in child.stderr.readline()
        finally:
            child.terminate()
