"""What a real kube-proxy wrote for services.yaml, read back: the same decisions for every packet.

Every case of tests/kernel/twin_cases.py is explained by the manifests and by what is read from the rules
(over import, and as a source). What may differ is in :func:`known` alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.proxy import CLUSTER_CIDR
from tests.kernel.snapshot import SHARED_DATA, shared, shared_objects
from tests.kernel.test_kube_proxy import AS_IPTABLES
from tests.kernel.twin_cases import BOUND_VIP, NODE, SECOND, Case, cases
from tests.unit.conftest import RunCli

Answers = dict[Case, dict[str, Any]]
NODE_FLAGS = [text for address in NODE.values() for text in ("--node-address", address)]
DUMPS = [str(SHARED_DATA / f"kube-proxy-1.30-{tool}.save") for tool in ("iptables", "ip6tables")]


@pytest.fixture
def dumps() -> list[str]:
    for name in DUMPS:
        shared(Path(name).name)
    return DUMPS


def imported(cli: RunCli, *arguments: str) -> str:
    status, out, err = cli("import", *arguments, "--node-name", "n1")
    assert (status, err) == (0, "")
    return out


def explained(cli: RunCli, folder: Path, *options: str) -> Answers:
    found: Answers = {}
    packets = folder / "packets"
    for is_bound in (False, True):
        asked = [case for case in cases(shared_objects()) if case.is_vip_bound is is_bound]
        lines = [json.dumps({"from": case.source, "to": str(case.packet)}) for case in asked]
        packets.write_text("\n".join(lines))
        extra = [*SECOND.values(), *([BOUND_VIP] if is_bound else [])]
        more = [text for address in extra for text in ("--node-address", address)]
        status, out, err = cli(
            "explain", "--node", "n1", "--packets", str(packets), *options, *more
        )
        assert (status, err) == (0, "")
        found |= dict(zip(asked, map(json.loads, out.splitlines()), strict=True))
    assert len(found) > 500
    return found


def decision(answer: dict[str, Any]) -> dict[str, Any]:
    """What a client or an endpoint can tell; rules do not say on which node an endpoint is."""
    backends = [
        {name: value for name, value in backend.items() if name != "node"}
        for backend in answer["backends"]
    ]
    fields = ("verdict", "frontend", "client", "policy")
    return {name: answer[name] for name in fields} | {"backends": backends}


def assert_same(theirs: Answers, ours: Answers) -> None:
    wrong = [
        f"{case}\n    manifests: {theirs[case]}\n    rules: {ours[case]}"
        for case in theirs
        if decision(theirs[case]) != decision(ours[case])
    ]
    assert not wrong, f"{len(wrong)} of {len(theirs)}:\n" + "\n".join(wrong)
    nodes = {
        (backend["node"], own["node"])
        for case in theirs
        for backend, own in zip(theirs[case]["backends"], ours[case]["backends"], strict=True)
    }
    # Right where policy Local makes the rules tell, unknown elsewhere, never wrong.
    assert nodes == {("n1", "n1"), ("n1", None), ("n2", None)}


@pytest.mark.parametrize("source", ["import", "iptables-save"])
def test_the_rules_decide_as_the_manifests_do(
    cli: RunCli, dumps: list[str], tmp_path: Path, source: str
) -> None:
    given = ["--cluster-cidr", CLUSTER_CIDR]
    theirs = explained(cli, tmp_path, "--manifests", str(SHARED_DATA / "services.yaml"), *given)
    if source == "import":
        file = tmp_path / "imported.yaml"
        file.write_text(imported(cli, *dumps, *NODE_FLAGS))
        ours = explained(cli, tmp_path, "--manifests", str(file), *given)
    else:
        flags = [text for name in dumps for text in ("--iptables-save", name)]
        ours = explained(cli, tmp_path, *flags, *given, *NODE_FLAGS)
    assert_same(theirs, ours)


def test_the_configuration_of_the_rules_decides_as_kube_proxy_was_configured(
    cli: RunCli, dumps: list[str], tmp_path: Path
) -> None:
    config, theirs_config = tmp_path / "ours.yaml", tmp_path / "theirs.yaml"
    config.write_text(imported(cli, *dumps, "-o", "config"))
    theirs_config.write_text(json.dumps(AS_IPTABLES | {"clusterCIDR": CLUSTER_CIDR}))
    manifests = ["--manifests", str(SHARED_DATA / "services.yaml")]
    file = tmp_path / "imported.json"
    file.write_text(imported(cli, *dumps, *NODE_FLAGS, "-o", "json"))
    assert_same(
        explained(cli, tmp_path, *manifests, "--config", str(theirs_config)),
        explained(cli, tmp_path, "--manifests", str(file), "--config", str(config)),
    )
