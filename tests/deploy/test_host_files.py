"""Dockerfile and systemd unit, by the validators that exist for them."""

import re
import shutil
from pathlib import Path

import pytest

from nfqproxy.sources import config
from tests.deploy import tools

UNIT = "nfqproxy.service"
SYSTEMD = tools.DEPLOY / "systemd"
EXPOSURE = 25
"""Of 100; systemd-analyze security. 24 is user id 0 with network administration on the host's network."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with the unit, the targets it names and the programs it calls."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    shutil.copy(SYSTEMD / UNIT, units)
    for target in ("sysinit", "basic", "shutdown", "network-pre", "multi-user"):
        (units / f"{target}.target").write_text("[Unit]\nDescription=stand-in\n")
    for command in re.findall(r"^Exec\w+=\+?(\S+)", (SYSTEMD / UNIT).read_text(), re.MULTILINE):
        program = tmp_path / command.lstrip("/")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
    return tmp_path


def test_systemd_understands_the_unit(root: Path) -> None:
    # It warns of unknown keys on stderr alone.
    done = tools.run("systemd-analyze", "verify", "--man=no", f"--root={root}", UNIT)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_key_is_found(root: Path) -> None:
    unit = root / "etc/systemd/system" / UNIT
    unit.write_text(unit.read_text().replace("KillMode=", "KilMode="))
    done = tools.run("systemd-analyze", "verify", "--man=no", f"--root={root}", UNIT)
    assert "KilMode" in done.stderr


def test_the_unit_is_narrow(root: Path) -> None:
    options = ("--offline=yes", f"--threshold={EXPOSURE}", "--no-pager")
    done = tools.run("systemd-analyze", "security", *options, f"--root={root}", UNIT)
    assert done.returncode == 0, done.stdout


def test_the_program_reads_the_configuration_of_the_unit() -> None:
    assert config.load(SYSTEMD / "config.yaml").manifests == ("/etc/nfqproxy/manifests",)
    assert "--config /etc/nfqproxy/config.yaml\n" in (SYSTEMD / UNIT).read_text()


def test_hadolint_has_nothing_to_say() -> None:
    done = tools.run("hadolint", "Dockerfile")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_image_gets_what_it_copies_and_no_more() -> None:
    """The build context holds exactly the sources of the COPY lines."""
    text = (tools.DEPLOY / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY ((?!--from).*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    ignore = (tools.DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*"
    assert {word.removeprefix("!") for word in ignore if word.startswith("!")} == copied
    assert all((tools.ROOT / name).exists() for name in copied)


def test_the_image_has_the_tools_that_the_program_calls() -> None:
    from nfqproxy.kernel.commands import PACKAGES

    text = (tools.DEPLOY / "Dockerfile").read_text()
    installed = set(re.findall(r"--no-install-recommends (.*) \\", text)[-1].split())
    # conntrack is for people; the proxy speaks to the kernel itself.
    assert installed == {"python3"} | set(PACKAGES.values()) - {"conntrack"}
