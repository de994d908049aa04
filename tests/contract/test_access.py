"""Who is let in, and what is denied: tokens, client certificates, TLS, refusals per resource."""

import asyncio
import ssl
from pathlib import Path

import aiohttp
import pytest

from nfqproxy.testing import Access, ApiServer, Settings, kubeconfig, write_kubeconfig
from nfqproxy.testing.certificates import Certificates, make_certificates
from tests.contract.api import Api, KubeConfig, names, service

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"), user="carol")


async def test_without_a_known_token_nobody_is_let_in() -> None:
    async with (
        ApiServer(access=Access({"secret": "proxy"})) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            async with session.get("/api/v1/services", headers=headers) as response:
                assert response.status == 401
                status = await response.json()
            assert (status["kind"], status["reason"]) == ("Status", "Unauthorized")
        async with session.get("/api/v1/services", headers=TOKEN) as response:
            assert response.status == 200
        # A token that is taken away no longer counts.
        server.access.tokens.clear()
        server.access.tokens["other"] = "proxy"
        async with session.get("/api/v1/services", headers=TOKEN) as response:
            assert response.status == 401


async def test_a_denied_verb_is_forbidden(api: Api, server: ApiServer) -> None:
    await api.create("services", service("a"))
    server.access.deny(verb="list", plural="services")
    refused = await api.call("GET", api.path("services"))
    assert refused.status == 403
    assert refused.body["reason"] == "Forbidden"
    assert refused.body["message"] == (
        'services is forbidden: User "system:anonymous" cannot list resource "services" in API group "" '
        f'in the namespace "{api.namespace}"'
    )
    everywhere = await api.call("GET", "/api/v1/services")
    assert everywhere.body["message"].endswith("at the cluster scope")
    # Other verbs and resources, and other users' denials, are not meant.
    assert (await api.call("GET", api.path("services", "a"))).status == 200
    assert (await api.call("GET", api.path("endpointslices"))).status == 200
    server.access.deny(user="somebody")
    assert (await api.call("GET", api.path("endpointslices"))).status == 200
    server.access.allow(verb="list", plural="services")
    assert names(await api.list("services")) == ["a"]
    server.access.deny(plural="services/status")
    status = {"status": {"loadBalancer": {}}}
    headers = {"Content-Type": "application/merge-patch+json"}
    path = api.path("services", "a")
    assert (await api.call("PATCH", path + "/status", status, headers=headers)).status == 403
    assert (await api.call("PATCH", path, status, headers=headers)).status == 200


async def test_an_open_watch_outlives_a_denial(api: Api, server: ApiServer) -> None:
    async with api.watch("services") as watch:
        server.access.deny(verb="watch")
        assert (await api.call("GET", api.path("services"), watch=1)).status == 403
        await api.create("services", service("a"))
        assert (await watch.next())["type"] == "ADDED"


@pytest.mark.parametrize("with_certificate", [False, True], ids=["token", "certificate"])
def test_a_client_with_the_kubeconfig_is_let_in(
    runner: asyncio.Runner, certificates: Certificates, tmp_path: Path, with_certificate: bool
) -> None:
    runner.run(_is_let_in(certificates, tmp_path, with_certificate))


async def _is_let_in(certificates: Certificates, tmp_path: Path, with_certificate: bool) -> None:
    settings = Settings(bookmark_s=0.05)
    access = Access({"secret": "proxy"})
    async with ApiServer(certificates=certificates, access=access, settings=settings) as server:
        assert server.url.startswith("https://127.0.0.1:")
        server.access.deny(user="carol" if with_certificate else "proxy", verb="delete")
        file = tmp_path / "kubeconfig"
        write_kubeconfig(file, server, with_certificate=with_certificate)
        assert file.stat().st_mode & 0o777 == 0o600
        async with Api(KubeConfig.load(file), "somewhere", server) as api:
            await api.create("services", service("a"))
            async with api.watch("services") as watch:
                assert (await watch.next())["type"] == "ADDED"
            # It is known who it is.
            refused = await api.call("DELETE", api.path("services", "a"))
            assert refused.status == 403
            assert f'User "{"carol" if with_certificate else "proxy"}"' in refused.body["message"]


async def test_tls_without_trust_is_no_way_in(certificates: Certificates) -> None:
    async with ApiServer(certificates=certificates) as server:
        async with aiohttp.ClientSession(server.url) as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get("/version")
        trusting = aiohttp.TCPConnector(ssl=certificates.client_context())
        async with (
            aiohttp.ClientSession(server.url, connector=trusting) as session,
            session.get("/version") as response,
        ):
            assert response.status == 200


async def test_a_certificate_of_another_authority_is_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    stranger = make_certificates(tmp_path)
    async with ApiServer(certificates=certificates) as server:
        trust = ssl.create_default_context(cafile=str(certificates.authority))
        trust.load_cert_chain(stranger.client, stranger.client_key)
        connector = aiohttp.TCPConnector(ssl=trust)
        async with aiohttp.ClientSession(server.url, connector=connector) as session:
            with pytest.raises((aiohttp.ClientError, OSError)):
                await session.get("/version")


async def test_a_kubeconfig_without_tls_or_token() -> None:
    async with ApiServer(host="::1") as server:
        config = kubeconfig(server)
        assert config["clusters"][0]["cluster"] == {"server": f"http://[::1]:{server.port}"}
        assert config["users"][0]["user"] == {}
