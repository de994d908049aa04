"""Putting the rules on a node and taking them off, on the real kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nfqproxy.kernel import node_rules
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings

from .rules_fixtures import inside, namespaces, require_kernel, sh, state

pytestmark = pytest.mark.kernel

BACKENDS = [IptablesBackend.NFT, IptablesBackend.LEGACY]
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def node() -> Iterator[str]:
    require_kernel()
    with namespaces("node") as names:
        yield names["node"]


@pytest.mark.parametrize("mode", list(RuleMode))
@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_twice_is_once_and_cleanup_removes_all(
    node: str, backend: IptablesBackend, mode: RuleMode
) -> None:
    if backend is IptablesBackend.LEGACY:
        # A legacy table cannot be unregistered: they exist from the start here.
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            for table in ("raw", "mangle"):
                sh(node, tool, "-t", table, "-S")
    before = state(node)
    settings = RuleSettings(mode=mode, iptables=backend)
    inside(node, lambda: node_rules.apply(settings))
    once = state(node)
    assert "NFQPROXY-QUEUE" in once[f"iptables-{backend.value}"]
    inside(node, lambda: node_rules.apply(settings))
    assert state(node) == once
    assert inside(node, node_rules.cleanup)
    assert state(node) == before
    assert inside(node, node_rules.cleanup) == []
