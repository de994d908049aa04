"""Every scenario over IPv6 and by each protocol, through explain; and every name that explain tells exists.

The same twins are sent as real packets by tests/kernel/test_vectors_live.py.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from nfqproxy.kernel.rule_settings import RuleMode, RuleSettings
from nfqproxy.kernel.rule_text import render
from nfqproxy.model import Family
from tests.scenarios.test_vectors import run
from tests.scenarios.twins import FILES, Case, cases, objects

VECTORS = range(1, len(FILES) + 1)

WORDS = frozenset(
    {"kube-proxy", "load-balancer", "look-up", "time-out", "weighted-random"},
)
"""Words with a hyphen in what explain tells that are no names of rules, sets and maps."""

QUEUE = frozenset(
    {"NFQPROXY-QUEUE", "NFQPROXY-FLOWS"}
    | {f"nfqproxy-{kind}-{family}" for kind in ("frontends", "flows") for family in (4, 6)}
)
TOLD = QUEUE | {
    *("prerouting", "output", "postrouting"),
    *("slot-count", "slot-count-pod", "slot-count-node", "slot-count-external"),
    *("check-source", "guarded", "allowed-sources"),
    *(
        "refuse-input",
        "refuse-forward",
        "refuse-output",
        "refusals",
        "cluster-ips",
        "service-cidrs",
    ),
    "martians-prerouting",
}
"""All names that are told about the scenarios: what is not recognised here any more is not checked."""

_HYPHENED = re.compile(r"(?<![\w.:/-])[a-zA-Z]+(?:-[a-zA-Z0-9]+)+(?![\w:])")
_NFT = re.compile(r"\bnft (ip6? \w+)\b ([\w-]+)")
_PLAIN = re.compile(r"\b(refusals|guarded|postrouting)\b")
_HOOKED = re.compile(r"^(raw|mangle) (PREROUTING|OUTPUT)$")


KIND = {"kind": "NfqproxyConfiguration"}


def explained(
    vector: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **changes: object,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """What explain answers about every twin of a file, with ``changes`` to its configuration."""
    mine = (case for case in cases() if case.vector == vector)
    by = lambda case: (case.config, case.objects_as_in_file, case.node_addresses)  # noqa: E731
    for (config, as_in_file, addresses), group in groupby(sorted(mine, key=by), key=by):
        batch = list(group)
        packets, manifest, settings = (folder / n for n in ("packets", "objects.json", "config"))
        packets.write_text(
            "".join(json.dumps({"from": c.origin, "to": c.target}) + "\n" for c in batch)
        )
        items = objects(vector, as_in_file=as_in_file)
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        settings.write_text(json.dumps({**KIND, **json.loads(config), **changes}))
        arguments = ["explain", "--manifests", str(manifest), "--node", "n1"]
        arguments += ["--config", str(settings), "--packets", str(packets)]
        for address in addresses:
            arguments += ["--node-address", address]
        lines = run(monkeypatch, capsys, arguments).splitlines()
        yield from zip(batch, map(json.loads, lines), strict=True)


@pytest.mark.parametrize("vector", VECTORS)
def test_every_twin_is_explained_as_the_file_says(
    vector: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for case, answer in explained(vector, tmp_path, monkeypatch, capsys):
        backends = {
            (backend["address"], "node" if backend["masquerade"] else "client")
            for backend in answer["backends"]
        }
        expected = (case.verdict, set(case.backends))
        assert (answer["verdict"], backends) == expected, f"{case}: {answer['reason']}"


@cache
def rendered(family: Family, mode: RuleMode) -> dict[str, set[str]]:
    """Names in the rendered rules of one family: of the nft table's objects, of ipsets, of iptables' chains."""
    rules = render(RuleSettings(mode=mode, localhost_node_ports=mode is RuleMode.REPLACE))
    ip = "ip" if family is Family.IPV4 else "ip6"
    nft = set()
    for text in re.split(r"^(?=table )", rules.nft, flags=re.MULTILINE):
        if text.startswith(f"table {ip} nfqproxy "):
            nft |= set(re.findall(r"^\t(?:chain|map|set|counter) (\S+) \{", text, re.MULTILINE))
    tables = rules.iptables if family is Family.IPV4 else rules.ip6tables
    return {
        "nft": nft,
        "ipset": set(re.findall(rf"^create (\S+-{int(family)}) ", rules.ipset, re.MULTILINE)),
        "chains": set(re.findall(r"^:(\S+) ", tables, re.MULTILINE)),
        "hooks": {
            f"{table} {chain}"
            for table, text in re.findall(
                r"^\*(\w+)\n(.*?)^COMMIT", tables, re.DOTALL | re.MULTILINE
            )
            for chain in re.findall(r"^-[AI] (PREROUTING|OUTPUT) ", text, re.MULTILINE)
        },
    }


@pytest.mark.parametrize(("mode", "told"), [(RuleMode.REPLACE, TOLD), (RuleMode.OVERLAY, QUEUE)])
def test_every_name_that_explain_tells_is_in_the_rules(
    mode: RuleMode,
    told: frozenset[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"mode": str(mode), "steerAll": mode is RuleMode.OVERLAY}
    seen: set[str] = set()
    for vector in VECTORS:
        for case, answer in explained(vector, tmp_path, monkeypatch, capsys, **changes):
            names = rendered(case.family, mode)
            for step in [answer["reason"], *answer["steps"]]:
                hook, _, what = step.partition(": ")
                if _HOOKED.match(hook):
                    assert hook in names["hooks"], f"{case}: {step}"
                for table, name in _NFT.findall(what):
                    ip = "ip" if case.family is Family.IPV4 else "ip6"
                    assert table == f"{ip} nfqproxy", f"{case}: {step}"
                    assert name in names["nft"], f"{case}: {step}"
                    seen.add(name)
                found = {*_HYPHENED.findall(what), *_PLAIN.findall(what)} - WORDS
                assert found <= names["nft"] | names["ipset"] | names["chains"], f"{case}: {step}"
                seen |= found
    assert seen == told
