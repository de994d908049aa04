"""The command line without privileges: usage errors, help, rendering, exit statuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nfqproxy import __version__
from nfqproxy.errors import HostError, KernelError, ManifestError, NfqproxyError

RunCli = Callable[..., tuple[int, str, str]]

VERBS = (
    *("run", "lab", "rules", "rules render", "rules apply", "cleanup", "doctor", "status"),
    *("import", "reconcile", "lab up", "lab run", "lab run spread", "lab run services", "lab down"),
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_an_example(cli: RunCli, verb: str) -> None:
    status, out, err = cli(*verb.split(), "--help")
    assert (status, err) == (0, "")
    assert f"Usage: nfqproxy {verb}" in out
    assert re.search(rf"Example: (sudo )?nfqproxy {verb.split()[0]}", out)


def test_help_lists_every_command(cli: RunCli) -> None:
    status, out, _ = cli("--help")
    assert status == 0
    for verb in ("run", "lab", "rules", "cleanup", "doctor", "status", "reconcile"):
        assert f"\n  {verb} " in out


def test_help_lists_scenarios_and_steps(cli: RunCli) -> None:
    _, out, _ = cli("lab", "run", "--help")
    assert "[SCENARIO [OPTIONS]]\n" in out
    assert re.search(r"^Scenarios:\n  services +Node ports, policies, affinity", out, re.MULTILINE)
    assert re.search(r"^  spread +Weights, latency", out, re.MULTILINE)
    _, out, _ = cli("lab", "run", "services", "--help")
    assert re.search(r"^ +6  Refusals$", out, re.MULTILINE)


def test_version(cli: RunCli) -> None:
    assert cli("--version") == (0, f"nfqproxy, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["clean"], "No such command 'clean'. Did you mean 'cleanup'?"),
        (
            ["frobnicate"],
            "There are run, lab, rules, cleanup, doctor, explain, import, status, reconcile, bench.",
        ),
        (["run", "--manifest"], "--manifest"),
        (["run", "--nonsense"], "--nonsense"),
        (["run", "--workers", "two"], "'two' is not a valid integer"),
        (["run", "--mode", "overlord"], "'overlord' is not one of 'replace', 'overlay'"),
        (["run", "--reader", "pcap"], "'pcap' is not one of 'netlink', 'netfilterqueue'"),
        (["run", "extra"], "unexpected extra argument (extra)"),
        (["status", "-o", "yaml"], "'yaml' is not one of 'text', 'json'"),
        (["rules", "remove"], "No such command 'remove'. There are apply, render."),
        (["lab", "run", "servces"], "No such scenario 'servces'. Did you mean 'services'?"),
        (["lab", "run", "x"], "No such scenario 'x'. There are services, spread."),
        (["lab", "run", "services", "--step", "11"], "11 is not in the range 1<=x<=10"),
        (["lab", "run", "services", "--pause", "-o", "json"], "--pause waits for a reader"),
        (["lab", "run", "services", "--name", "x"], "--name"),
        (
            ["lab", "run", "--queries", "5", "services"],
            "--queries does not count in front of services",
        ),
        (["lab", "--weights", "1:1", "up"], "give it after nfqproxy lab up"),
        (["rules", "render", "--iptables", "ebtables"], "'ebtables' is not one of"),
    ],
    ids=" ".join,
)
def test_usage_errors(cli: RunCli, arguments: Sequence[str], part: str) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("Usage: nfqproxy")
    assert part in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "0"], "--workers: 0 is not within 1..64"),
        (["--workers", "65"], "--workers: 65 is not within 1..64"),
        (["--queue", "-1"], "--queue: -1 is not within 0..65535"),
        (["--queue", "65535", "--workers", "2"], "--queue: 65535 is not within 0..65534"),
    ],
)
def test_flags_out_of_range(cli: RunCli, arguments: Sequence[str], text: str) -> None:
    assert cli("rules", "render", *arguments) == (2, "", f"nfqproxy: {text}\n")


def test_rules_render_prints_what_the_tools_read(cli: RunCli) -> None:
    status, text, err = cli("rules", "render", "--workers", "2", "--queue", "7")
    assert (status, err) == (0, "")
    assert "--queue-balance 7:8 --queue-bypass" in text
    status, document, _ = cli("rules", "render", "--workers", "2", "--queue", "7", "-o", "json")
    assert status == 0
    sections = json.loads(document)
    assert list(sections) == [
        "ipset -exist restore",
        "iptables-restore --noflush",
        "ip6tables-restore --noflush",
        "nft -f -",
    ]
    for command, section in sections.items():
        assert f"# --- {command}\n{section.rstrip()}\n" in text


def test_rules_render_differs_by_mode(cli: RunCli) -> None:
    replace = json.loads(cli("rules", "render", "-o", "json")[1])
    overlay = json.loads(cli("rules", "render", "-o", "json", "--mode", "overlay")[1])
    assert {command for command in replace if replace[command] != overlay[command]} == {"nft -f -"}


def test_rules_render_heeds_a_configuration_file_and_flags_win(cli: RunCli, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "detectLocalMode: BridgeInterface\nworkers: 2\n"
        "detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}\n"
    )
    _, text, _ = cli("rules", "render", "--config", str(file), "--workers", "3")
    assert 'iifname "cni0" goto class-pod' in text
    assert "veth" not in text  # that of a detector that is not in use
    assert "--queue-balance 100:102" in text
    file.write_text("detectLocalMode: BridgeInterface\n")
    status, _, err = cli("rules", "render", "--config", str(file))
    assert status == 2
    assert f"{file}: detectLocal.bridgeInterface" in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ManifestError("is empty; fill it", file="a.yaml"), 2),
        (HostError("ipset is not installed; apt-get install ipset"), 3),
        (KernelError("bind queue 5", 16), 1),
        (NfqproxyError("no nfqproxy runs here; start one"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_one_line_and_an_exit_status(
    cli: RunCli, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    from nfqproxy.cli import status as status_command

    def fail(verb: str) -> None:
        raise error

    monkeypatch.setattr(status_command.admin, "ask", fail)
    got, out, err = cli("status")
    assert (got, out) == (status, "")
    expected = "" if isinstance(error, KeyboardInterrupt) else f"nfqproxy: {error}"
    assert err.strip() == expected


def test_status_prints_the_document_as_it_is(cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    from nfqproxy.cli import status as status_command

    document = {
        "version": "1",
        "pid": 7,
        "mode": "replace",
        "data_path": "mark",
        "marks": {"mask": "0x7", "backends": 1, "backends_without_mark": 2},
        "node": "n1",
        "revision": 3,
        "services": 2,
        "frontends": 4,
        "source_error": "a.yaml: is empty",
        "workers": [
            {
                "pid": 8,
                "queue": 100,
                "reader": "netlink",
                "ready": False,
                "packets": 0,
                "installed": 0,
                "cpu_s": 0.0,
                "counters": {"reused": 5},
                "restarts": 1,
                "last_error": "process 6 ended with signal 9",
            }
        ],
    }
    monkeypatch.setattr(status_command.admin, "ask", lambda verb: document)
    assert json.loads(cli("status", "-o", "json")[1]) == document
    shown = cli("status")[1]
    for part in (
        "mode replace, data path mark",
        "2 backends have no mark",
        "markMask, now 0x7",
        "0 packets marked",
        "revision 3",
        "the last good state serves: a.yaml: is empty",
        "queue 100: worker 8 (netlink), not ready",
        "reused 5",
        "1 restarts, the last because process 6 ended with signal 9",
    ):
        assert part in shown


def test_module_and_script_are_the_same_command() -> None:
    script = Path(sys.executable).with_name("nfqproxy")
    outputs = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [sys.executable, "-m", "nfqproxy", "rules", "render"],
            [str(script), "rules", "render"],
        )
    }
    assert len(outputs) == 1
    assert "NFQPROXY-QUEUE" in outputs.pop()


def test_a_terminal_without_utf_8_is_no_traceback() -> None:
    """The text of an answer may hold what the terminal cannot show."""
    script = (
        "import sys; from nfqproxy.cli import main as it, status;"
        "status.admin.ask = lambda verb: {'greek': '\u03c7\u00b2'};"
        "status._show = lambda document: print(document['greek'], 'shown');"
        "sys.argv = ['nfqproxy', 'status']; it.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "?? shown\n", "")


def test_a_configuration_that_is_not_there(cli: RunCli, tmp_path: Path) -> None:
    status, _, err = cli("run", "--config", str(tmp_path / "none.yaml"))
    assert status == 2
    assert err.endswith("no such file or directory; give the path of a configuration file\n")


def test_a_closed_pipe_is_no_traceback() -> None:
    """``nfqproxy rules render | head -1``."""
    child = subprocess.Popen(
        [sys.executable, "-m", "nfqproxy", "rules", "render"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    said = child.stderr.read().decode()
    child.stderr.close()
    child.wait()
    assert "Traceback" not in said
    assert said == ""
