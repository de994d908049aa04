"""Every scenario file beside this one, through the command line as a user gives it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nfqproxy.cli import main as command_line

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.yaml"))


def scenario(file: Path) -> dict[str, Any]:
    first = next(iter(yaml.safe_load_all(file.read_text())))
    assert first["kind"] == "Scenario"
    return dict(first)


CASES = [
    pytest.param(file, scenario(file)["node"], packet, id=f"{file.stem}-{index}")
    for file in FILES
    for index, packet in enumerate(scenario(file)["packets"])
]


def arguments(file: Path, node: str, packet: dict[str, Any], config: Path) -> list[str]:
    config.write_text(json.dumps({"kind": "NfqproxyConfiguration", **packet["config"]}))
    found = ["explain", "--manifests", str(file), "--node", node, "--config", str(config)]
    for address in packet.get("nodeAddresses", []):
        found += ["--node-address", address]
    return found


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["nfqproxy", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    return said.out


def test_all_vectors_are_here() -> None:
    assert [scenario(file)["vector"] for file in FILES] == list(range(1, 43))


@pytest.mark.parametrize(("file", "node", "packet"), CASES)
def test_scenario(
    file: Path,
    node: str,
    packet: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = arguments(file, node, packet, tmp_path / "config.yaml")
    asked = ["--from", packet["from"], "--to", packet["to"]]
    answer = json.loads(run(monkeypatch, capsys, [*common, *asked, "-o", "json"]))
    expected = packet["expect"]
    frontend = answer["frontend"]
    seen = {
        f"{backend['address']}:{backend['port']}": "node" if backend["masquerade"] else "client"
        for backend in answer["backends"]
    }
    assert (answer["verdict"], answer["client"], answer["policy"], seen) == (
        expected["verdict"],
        expected["client"],
        expected["policy"],
        expected["backends"],
    )
    assert (frontend and frontend["kind"]) == expected["frontend"]
    if frontend is not None:
        assert (frontend["namespace"], frontend["service"]) == ("default", "s")
    if seen:
        chance = 1 / len(seen)
        assert [backend["probability"] for backend in answer["backends"]] == [chance] * len(seen)
    told = "\n".join([answer["reason"], *answer["steps"]])
    for part in expected.get("says", []):
        assert part in told
    # The story says the same, in lines that may be wrapped.
    story = run(monkeypatch, capsys, [*common, *asked])
    assert story.splitlines()[0].endswith(f": {answer['verdict']}")
    flat = " ".join(story.split())
    assert " ".join(answer["reason"].split()) in flat
    for step in answer["steps"]:
        assert " ".join(step.partition(": ")[2].split()) in flat
    for address in expected["backends"]:
        assert address in story


def test_all_packets_of_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bulk answer is line for line the single one."""
    file = next(file for file in FILES if file.stem.startswith("vector-13"))
    packets = [p for p in scenario(file)["packets"] if "mode" not in p["config"]]
    common = arguments(file, "n1", packets[0], tmp_path / "config.yaml")
    (tmp_path / "packets").write_text(
        "".join(json.dumps({"from": p["from"], "to": p["to"]}) + "\n" for p in packets)
    )
    lines = run(monkeypatch, capsys, [*common, "--packets", str(tmp_path / "packets")])
    bulk = [json.loads(line) for line in lines.splitlines()]
    assert [answer["verdict"] for answer in bulk] == [p["expect"]["verdict"] for p in packets]
    for packet, answer in zip(packets, bulk, strict=True):
        asked = ["--from", packet["from"], "--to", packet["to"], "-o", "json"]
        assert json.loads(run(monkeypatch, capsys, [*common, *asked])) == answer
