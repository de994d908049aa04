"""What the API conventions demand of a server, tried on nfqproxy.testing and, if one is named, on a real one.

With ``NFQPROXY_TEST_KUBECONFIG=FILE`` the same tests run against that cluster, in namespaces of random names
which each test makes and removes. Only what a real server cannot be made to do is skipped then (the fixture
``server``). Tests are coroutines; each runs in an event loop of its own.
"""

import asyncio
import inspect
import os
import secrets
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nfqproxy.testing import ApiServer, Settings
from tests.contract.api import Api, KubeConfig

TIMEOUT_S = 60

KUBECONFIG = os.environ.get("NFQPROXY_TEST_KUBECONFIG", "")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in the loop of its fixture ``runner``."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    runner: asyncio.Runner = pyfuncitem._request.getfixturevalue("runner")
    runner.run(asyncio.wait_for(pyfuncitem.obj(**arguments), TIMEOUT_S))
    return True


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of one test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def settings() -> Settings:
    """Of the server under test; a module may override it."""
    return Settings(bookmark_s=0.05, fresh_wait_s=0.05)


@pytest.fixture
def api(runner: asyncio.Runner, settings: Settings) -> Iterator[Api]:
    """A server to talk to, and an empty namespace on it."""
    stack = AsyncExitStack()

    async def set_up() -> Api:
        server = None
        if KUBECONFIG:
            config = KubeConfig.load(Path(KUBECONFIG))
        else:
            server = await stack.enter_async_context(ApiServer(settings=settings))
            config = KubeConfig(url=server.url)
        name = f"nfqproxy-test-{secrets.token_hex(4)}"
        return await stack.enter_async_context(Api(config, name, server))

    try:
        yield runner.run(set_up())
    finally:
        runner.run(stack.aclose())


@pytest.fixture
def server(api: Api) -> ApiServer:
    """The server under test itself, for what a real one cannot be made to do."""
    if api.server is None:
        pytest.skip("a real server cannot be made to do this")
    return api.server
