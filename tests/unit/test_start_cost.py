"""What makes the start quick and the processes small, each kept from coming back unseen."""

import gc
import subprocess
import sys

import pytest

from nfqproxy.control.objects import EndpointSlice, Service, ServicePortSpec, SliceEndpoint
from nfqproxy.model import (
    Action,
    Backend,
    CandidateSet,
    Endpoint,
    Family,
    FrontendKey,
    Protocol,
    Verdict,
)

VALUES = [
    Backend(address="10.244.1.1", port=80),
    Endpoint(address="10.244.1.1", port=80),
    SliceEndpoint(address="10.244.1.1"),
    ServicePortSpec(name="http", port=80),
    FrontendKey(Protocol.TCP, "10.96.0.1", 80),
    Action(verdict=Verdict.BACKEND),
    CandidateSet(backends=(Backend(address="10.244.1.1", port=80),)),
    Service(namespace="default", name="web"),
    EndpointSlice(namespace="default", name="web-1", service="web", family=Family.IPV4),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_the_collector_does_not_walk_the_tables(value):
    assert not gc.is_tracked(value)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        # What only some commands or some Services need.
        (
            "nfqproxy.cli.run",
            ("aiohttp", "kubernetes", "rich", "nfqproxy.core.explain", "nfqproxy.lab"),
        ),
        ("nfqproxy.sources.kubernetes.source", ("aiohttp", "kubernetes")),
        ("nfqproxy.worker.process", ("nfqproxy.kernel.commands", "nfqproxy.kernel.rule_text")),
    ],
)
def test_modules_that_are_not_loaded_at_the_start(module, unwanted):
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = done.stdout.split()
    assert module in loaded
    assert not set(unwanted) & set(loaded)
