"""explain from the command line: usage, bulk, errors, exit statuses; the answers are tested elsewhere."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.cli import explain as explain_command
from nfqproxy.cli import main as command_line
from nfqproxy.errors import NfqproxyError

RunCli = Callable[..., tuple[int, str, str]]
FIELDS = ["verdict", "frontend", "client", "policy", "backends", "reason", "steps"]
POD = ["--from", "10.244.1.9", "--to", "10.96.0.10:80/tcp"]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nfqproxy", "explain", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, said.out, said.err

    return run


def service(number: int) -> list[dict[str, Any]]:
    name, address = f"s{number}", f"10.96.{number // 250}.{number % 250 + 1}"
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"clusterIP": address, "ports": [{"name": "http", "port": 80}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [f"10.244.{number % 250}.{n}"]} for n in (1, 2, 3)],
        },
    ]


@pytest.fixture
def manifests(tmp_path: Path) -> str:
    file = tmp_path / "services.json"
    items = [item for number in range(300) for item in service(number)]
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return str(file)


def test_help_has_an_example_that_works(cli: RunCli, manifests: str) -> None:
    status, out, _ = cli("--help")
    assert status == 0
    (example,) = re.findall(r"Example: nfqproxy explain (.*?)\n\n", out + "\n\n", re.DOTALL)
    arguments = " ".join(example.split("Options:")[0].split()).replace("services.yaml", manifests)
    assert cli(*arguments.split(), "-o", "json")[0] == 0


def test_json_has_the_fields_of_the_contract_in_their_order(cli: RunCli, manifests: str) -> None:
    status, out, err = cli("--manifests", manifests, "--node", "n1", *POD, "-o", "json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert list(document) == FIELDS
    assert document["frontend"] == {
        "kind": "ClusterIP",
        "namespace": "default",
        "service": "s9",
        "port_name": "http",
    }
    fields = ["address", "port", "weight", "probability", "masquerade", "node"]
    assert [list(backend) for backend in document["backends"]] == [fields] * 3
    assert document["backends"][0]["node"] is None


def test_ten_thousand_packets(cli: RunCli, manifests: str, tmp_path: Path) -> None:
    packets = [
        {"from": f"10.244.{n % 250}.9", "to": f"10.96.{n % 300 // 250}.{n % 300 % 250 + 1}:80/tcp"}
        for n in range(10_000)
    ]
    file = tmp_path / "packets.jsonl"
    file.write_text("".join(json.dumps(packet) + "\n" for packet in packets))
    arguments = ("--manifests", manifests, "--node", "n1")
    status, out, _ = cli(*arguments, "--packets", str(file))
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["frontend"]["service"] for a in answers] == [f"s{n % 300}" for n in range(10_000)]
    piped = cli(*arguments, "--packets", "-", stdin=file.read_text())
    assert piped[:2] == (0, out)


BAD_LINES = {
    "nonsense": "the line is not JSON",
    "[]": "the line is no JSON object",
    "{}": 'field "from" is missing',
    '{"from": "10.0.0.1"}': 'field "to" is missing',
    '{"from": 1, "to": "10.0.0.1:80/tcp"}': 'field "from" must be a string',
    '{"form": "10.0.0.1", "to": "x"}': 'unknown field "form", did you mean "from"?',
    '{"from": "10.0.0.1", "to": "10.0.0.1:80"}': "names no protocol",
    '{"from": "nobody", "to": "10.0.0.1:80/tcp"}': "is not an IP address",
}


def test_bad_lines_have_their_answer_at_their_place(cli: RunCli, manifests: str) -> None:
    good = json.dumps({"from": POD[1], "to": POD[3]})
    text = "\n".join(line for bad in BAD_LINES for line in (good, bad, "")) + "\n"
    status, out, _ = cli("--manifests", manifests, "--node", "n1", "--packets", "-", stdin=text)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 2
    assert len(answers) == 2 * len(BAD_LINES)
    assert {answer["verdict"] for answer in answers[::2]} == {"backend"}
    for answer, problem in zip(answers[1::2], BAD_LINES.values(), strict=True):
        assert list(answer) == ["error"]
        assert problem in answer["error"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give --from and --to, or --packets"),
        (["--from", "10.0.0.1"], "give --from and --to, or --packets"),
        ([*POD, "--packets", "-"], "leave out --from and --to"),
        (["--packets", "-", "-o", "text"], "leave out -o text"),
        (["--packets", "/nowhere"], "No such file"),
        (["--mode", "sideways", *POD], "'sideways' is not one of"),
    ],
)
def test_wrong_usage(cli: RunCli, arguments: list[str], problem: str) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert problem in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--node", "n1", *POD], "give --manifests or --iptables-save, or leave them all out"),
        (["--manifests", "/nowhere.yaml", *POD], "/nowhere.yaml"),
        (["--manifests", "MANIFESTS", "--cluster-cidr", "x", *POD], "--cluster-cidr: "),
        (["--manifests", "MANIFESTS", "--node-address", "x", *POD], "--node-address: "),
        (["--manifests", "MANIFESTS", "--from", "x", "--to", "y"], "is not an IP address"),
    ],
)
def test_bad_input(cli: RunCli, manifests: str, arguments: list[str], problem: str) -> None:
    status, out, err = cli(*(manifests if each == "MANIFESTS" else each for each in arguments))
    assert (status, out) == (2, "")
    assert problem in err
    assert len(err.splitlines()) == 1


def test_flags_win_over_the_file_and_the_file_may_name_manifests(
    cli: RunCli, manifests: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"kind: NfqproxyConfiguration\nmanifests: [{manifests}]\nclusterCIDR: 192.0.2.0/24\n"
    )
    arguments = ["--config", str(config), "--node", "n1", *POD, "-o", "json"]
    assert json.loads(cli(*arguments)[1])["client"] == "external"
    assert json.loads(cli(*arguments, "--cluster-cidr", "10.244.0.0/16")[1])["client"] == "pod"


def test_a_node_that_the_manifests_do_not_know_is_told(cli: RunCli, tmp_path: Path) -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}
    file = tmp_path / "objects.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [node, *service(9)]}))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nfqproxy",
            "explain",
            "--manifests",
            str(file),
            "--node",
            "n7",
            *POD,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the manifests have no Node n7, only n1" in done.stderr
    assert done.stdout.startswith("10.244.1.9 -> 10.96.0.10:80/tcp: backend\n")


def test_the_running_proxy_is_asked_in_portions(
    cli: RunCli, manifests: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []
    sample = json.loads(cli("--manifests", manifests, "--node", "n1", *POD, "-o", "json")[1])

    def ask(verb: str, **arguments: Any) -> dict[str, Any]:
        assert verb == "explain"
        asked.append(arguments["packets"])
        return {"explanations": [sample] * len(arguments["packets"])}

    monkeypatch.setattr(explain_command.admin, "ask", ask)
    lines = json.dumps({"from": "10.244.1.9%cni0", "to": "10.96.0.10:80/tcp"}) + "\n"
    status, out, _ = cli("--packets", "-", stdin=lines * 450)
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [sample] * 450
    assert [len(portion) for portion in asked] == [200, 200, 50]
    assert asked[0][0] == {"from": "10.244.1.9%cni0", "to": "10.96.0.10:80/tcp"}


def test_a_refusal_of_the_running_proxy(cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(verb: str, **arguments: Any) -> dict[str, Any]:
        raise NfqproxyError("the running nfqproxy answered: no")

    monkeypatch.setattr(explain_command.admin, "ask", ask)
    assert cli(*POD) == (1, "", "nfqproxy: the running nfqproxy answered: no\n")
