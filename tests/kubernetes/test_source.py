"""The Kubernetes source against a real HTTP server that keeps the API's rules, and breaks what they allow."""

import asyncio
import json
import logging
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from nfqproxy.control.objects import Service
from nfqproxy.errors import InputError
from nfqproxy.sources.kubernetes.client import Access as Reached
from nfqproxy.sources.kubernetes.client import TimeOuts
from nfqproxy.sources.kubernetes.source import KubernetesSource
from nfqproxy.testing import Access, ApiServer, Fault, Settings, kubeconfig, write_kubeconfig
from nfqproxy.testing.certificates import make_certificates
from nfqproxy.testing.resources import RESOURCES, by_plural
from tests.kernel.manifests import Manifest, Port, service
from tests.kubernetes.follower import HASTY, NODE, QUICK, Follower, following, held, run, until

PORT = Port(port=80, target=8080)


def web(name: str, last: int, *, endpoint: str = "10.244.1.11", **options: Any) -> list[Manifest]:
    return service(name, vips=[f"10.96.0.{last}"], ports=[PORT], endpoints=[endpoint], **options)


def node(name: str, zone: str = "z1") -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }


def cidr(text: str) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [text]},
    }


def apply(server: ApiServer, *objects: Manifest) -> None:
    for each in objects:
        server.apply(each)


BY_KIND = {resource.kind: resource for resource in RESOURCES}


def events(server: ApiServer) -> list[dict[str, Any]]:
    return [version.parsed() for version in server.store.all(BY_KIND["Event"])]


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[ApiServer]:
    """A server with the Node, a ServiceCIDR and seven Services, more than two pages."""
    async with ApiServer(seed=1, **options) as server:
        apply(server, node(NODE), cidr("10.96.0.0/16"))
        for number in range(1, 8):
            apply(server, *web(f"s{number}", number))
        yield server


async def agree(follower: Follower, server: ApiServer) -> None:
    await until(
        lambda: follower.cluster.ports == held(server), "the table equals what the server holds"
    )


async def watched(server: ApiServer, plural: str = "services") -> None:
    await until(lambda: server.watches[plural], f"{plural} are watched")


def test_all_kinds_are_followed(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server:
            apply(server, node("n2"))
            async with following(server, tmp_path) as follower:
                assert follower.cluster.ports == held(server)
                surroundings = follower.cluster.surroundings
                assert [each.name for each in surroundings.nodes] == [NODE]
                assert surroundings.service_cidrs[0].cidrs == ("10.96.0.0/16",)
                apply(server, *web("s8", 8), *web("s1", 1, endpoint="10.244.1.12"))
                server.discard("Service", "s2")
                server.discard("EndpointSlice", "s3-ipv4")
                apply(server, node(NODE, "z2"), cidr("10.97.0.0/16"))
                await agree(follower, server)
                assert "s8" in follower.services
                await until(
                    lambda: (
                        [
                            *(each.labels.values() for each in follower.cluster.surroundings.nodes),
                            *(each.cidrs for each in follower.cluster.surroundings.service_cidrs),
                        ]
                        and follower.cluster.surroundings.service_cidrs[0].cidrs
                        == ("10.97.0.0/16",)
                        and "z2" in follower.cluster.surroundings.nodes[0].labels.values()
                    ),
                    "Node and ServiceCIDR have changed",
                )
                assert follower.source.last_error is None

    run(work())


def test_all_nodes_where_their_pod_networks_count(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server:
            apply(server, node("n2"))
            async with following(server, tmp_path, all_nodes=True) as follower:
                assert [each.name for each in follower.cluster.surroundings.nodes] == [NODE, "n2"]

    run(work())


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
)
def test_what_another_proxy_claims_is_not_even_sent(tmp_path: Path, label: str) -> None:
    async def work() -> None:
        async with serving() as server:
            apply(server, *web("other", 99, labels={label: "x"}))
            async with following(server, tmp_path) as follower:
                assert "other" not in [each.name for each in follower.first.services]
                apply(server, *web("s1", 1, labels={label: "x"}))
                await until(lambda: "s1" not in follower.services, "it is given up")
                apply(server, *web("s1", 1))
                await agree(follower, server)
                assert "s1" in follower.services

    run(work())


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            # The first list is from the cache, which knows no pages; a new one is not.
            before = server.requests["list", "services"]
            await follower.source.reload()
            await until(lambda: server.requests["list", "services"] >= before + 3, "three pages")
            await agree(follower, server)

    run(work())


def test_a_cut_watch_goes_on_where_it_was(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            await watched(server)
            lists = server.requests["list", "services"]
            server.faults.force(Fault.CUT, 3, only=["services"])
            for number in range(1, 8):
                apply(server, *web(f"s{number}", number + 20))
                await asyncio.sleep(0.01)
            await agree(follower, server)
            assert server.faults.counts[Fault.CUT] == 3
            assert server.requests["list", "services"] == lists

    run(work())


@pytest.mark.parametrize("as_http", [True, False])
def test_a_version_that_is_gone_is_listed_anew_and_nothing_is_dropped(
    tmp_path: Path, as_http: bool, caplog: Any
) -> None:
    async def work() -> None:
        settings = Settings(expired_as_http=as_http)
        async with serving(settings=settings) as server:
            always = held(server).keys()
            async with following(server, tmp_path, always=always) as follower:
                await watched(server)
                await server.stop()
                apply(server, *web("s9", 9))
                server.store.reopen()
                await server.start()
                await agree(follower, server)
                assert "s9" in follower.services
                assert follower.missed == []

    run(work())
    assert "410" not in caplog.text, "it is no trouble"


@pytest.mark.parametrize("by_bookmark", [True, False])
def test_a_watch_goes_on_after_what_was_told_last(tmp_path: Path, by_bookmark: bool) -> None:
    """The version at which it began is gone meanwhile."""

    async def work() -> None:
        settings = Settings(bookmark_s=0.05 if by_bookmark else 60.0)
        async with serving(settings=settings) as server, following(server, tmp_path) as follower:
            await watched(server)
            watches, lists = (server.requests[verb, "services"] for verb in ("watch", "list"))
            if by_bookmark:
                apply(server, node(NODE, "z9"))  # not a Service
                await asyncio.sleep(0.2)
            else:
                apply(server, *web("s1", 21))
                await agree(follower, server)
            server.store.compact()
            server.faults.force(Fault.END, 1, only=["services"])
            apply(server, *web("s2", 22))
            await until(lambda: server.requests["watch", "services"] > watches, "it goes on")
            apply(server, *web("s3", 23))
            await agree(follower, server)
            assert server.requests["list", "services"] == lists

    run(work())


def test_a_continue_token_that_expires(tmp_path: Path, caplog: Any) -> None:
    async def work() -> None:
        async with serving() as server:
            always = held(server).keys()
            async with following(server, tmp_path, always=always) as follower:
                server.discard("EndpointSlice", "s7-ipv4")
                await agree(follower, server)
                follower.missed.clear()
                follower._always = tuple(name for name in always if name.service != "s7")
                server.faults.force(Fault.EXPIRE, 1, only=["services"])
                await follower.source.reload()
                await until(lambda: server.faults.counts[Fault.EXPIRE], "a token has expired")
                apply(server, *web("s9", 9))
                await agree(follower, server)
                assert follower.missed == []

    run(work())
    assert "410" not in caplog.text, "it is no trouble"


def test_nothing_is_known_before_every_kind_is(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        access = Access()
        access.deny(plural="endpointslices")
        async with serving(access=access) as server:
            write_kubeconfig(tmp_path / "kubeconfig", server)
            source = KubernetesSource(
                Reached(kubeconfig=str(tmp_path / "kubeconfig")),
                node_name=NODE,
                pace=QUICK,
                time_outs=HASTY,
            )
            start = asyncio.ensure_future(source.start())
            try:
                await until(
                    lambda: server.requests["list", "endpointslices"] > 3, "it is asked again"
                )
                await watched(server)
                assert not start.done()
                assert "403" in (source.last_error or "")
                access.allow(plural="endpointslices")
                objects = await start
                assert len(objects.services) == len(objects.endpoint_slices) == 7
                await until(lambda: source.last_error is None, "all is well")
            finally:
                await source.close()

    run(work())
    errors = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(errors) == 1, "said once, however often it is tried"
    assert "list endpointslices" in errors[0]
    assert "nothing is programmed before all is known" in errors[0]


def test_a_server_without_service_cidrs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("networking.k8s.io", "servicecidrs")
    resource = by_plural[key]
    monkeypatch.delitem(by_plural, key)

    async def work() -> None:
        async with ApiServer() as server:
            apply(server, *web("s1", 1))
            async with following(server, tmp_path) as follower:
                assert follower.services == {"s1"}
                assert follower.source.last_error is None
                by_plural[key] = resource
                apply(server, cidr("10.96.0.0/16"))
                await until(
                    lambda: follower.cluster.surroundings.service_cidrs, "an upgrade is noticed"
                )

    run(work())


def test_service_cidrs_that_may_not_be_read(tmp_path: Path) -> None:
    async def work() -> None:
        access = Access()
        access.deny(plural="servicecidrs")
        async with serving(access=access) as server, following(server, tmp_path) as follower:
            assert follower.cluster.ports == held(server)
            assert "servicecidrs" in (follower.source.last_error or "")

    run(work())


def test_the_last_state_serves_while_the_server_is_away(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        async with (
            serving() as server,
            following(server, tmp_path, always=held(server).keys()) as follower,
        ):
            await watched(server)
            await server.stop()
            await until(lambda: follower.source.last_error, "it is noticed")
            await asyncio.sleep(0.3)  # some attempts
            assert follower.missed == []
            apply(server, *web("s9", 9))
            await server.start()
            await agree(follower, server)
            await until(lambda: follower.source.last_error is None, "all is well")
            assert follower.missed == []

    run(work())
    told = [each.getMessage() for each in caplog.records]
    assert any("what was known last serves" in each for each in told)
    assert "API server: all is followed again" in told


def test_a_server_that_comes_back_from_a_backup(tmp_path: Path) -> None:
    """Its versions are lower than what is known, and a watch from there would tell nothing."""

    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            for number in range(1, 8):
                apply(server, *web(f"s{number}", number + 50))
            await agree(follower, server)
            await server.stop()
            await until(
                lambda: "Connection refused" in (follower.source.last_error or ""), "it is away"
            )
            async with ApiServer(port=server.port) as restored:
                apply(restored, node(NODE), *web("s1", 1), *web("s2", 2))
                await agree(follower, restored)
                assert follower.services == {"s1", "s2"}

    run(work())


def test_a_server_that_has_gone_silent(tmp_path: Path) -> None:
    """The connection stands and nothing comes: neither event nor end."""

    async def work() -> None:
        async with serving() as server:
            relay = Relay(server.port)
            async with relay.listening():
                config = kubeconfig(server)
                config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{relay.port}"
                (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
                time_outs = TimeOuts(connect_s=2.0, answer_s=0.3, watch_s=0.3)
                async with following(
                    server, tmp_path, time_outs=time_outs, always=held(server).keys()
                ) as follower:
                    await watched(server)
                    relay.passes.clear()
                    apply(server, *web("s9", 9))
                    await until(
                        lambda: "silent" in (follower.source.last_error or ""), "it is noticed"
                    )
                    assert "s9" not in follower.services
                    relay.passes.set()
                    await agree(follower, server)
                    assert follower.missed == []

    run(work())


class Relay:
    """Between client and server, as a network that stops to carry while ``passes`` is not set."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self.passes = asyncio.Event()
        self.passes.set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        tasks: set[asyncio.Task[None]] = set()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            others = await asyncio.open_connection("127.0.0.1", self._to)
            for source, sink in ((reader, others[1]), (others[0], writer)):
                tasks.add(asyncio.create_task(self._carry(source, sink)))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self.passes.wait()
                sink.write(data)
        finally:
            sink.close()


def test_one_bad_object_does_not_stop_the_others(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            await watched(server)
            good = follower.cluster.ports.copy()
            # What no server would take is put behind its back.
            resource = BY_KIND["EndpointSlice"]
            version = server.store.get(resource, "default", "s1-ipv4")
            assert version is not None
            value = version.parsed()
            value["ports"][0]["port"] = "http"
            server.store.put(resource, value)
            apply(server, *web("s9", 9))
            await until(lambda: "s9" in follower.services, "the others are followed")
            s1 = next(name for name in good if name.service == "s1")
            assert follower.cluster.ports[s1] == good[s1], "its last good version serves"
            assert "s1-ipv4" in (follower.source.last_error or "")
            # Also through a new list.
            before = server.requests["watch", "endpointslices"]
            await follower.source.reload()
            await until(lambda: server.requests["watch", "endpointslices"] > before, "listed anew")
            assert follower.cluster.ports[s1] == good[s1]
            await until(lambda: events(server), "an Event is written")
            apply(server, *web("s1", 1, endpoint="10.244.1.13"))
            await agree(follower, server)
            assert follower.source.last_error is None
            (event,) = events(server)
            assert event["involvedObject"]["kind"] == "EndpointSlice"
            assert event["involvedObject"]["name"] == "s1-ipv4"
            assert event["involvedObject"]["uid"] == version.parsed()["metadata"]["uid"]
            assert event["reason"] == "InvalidObject"
            assert event["type"] == "Warning"

    run(work())
    told = [each.getMessage() for each in caplog.records]
    assert (
        "API server: EndpointSlice default/s1-ipv4: ports[0].port: must be an integer, not a string;"
        " the last good version stays in force" in told
    )
    assert "API server: EndpointSlice default/s1-ipv4: good again, or gone" in told


def test_a_bad_annotation_leaves_its_last_good_value(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server:
            apply(server, *web("s1", 1, weights={"10.244.1.11": 5}))
            async with following(server, tmp_path) as follower:
                await watched(server)
                s1 = next(name for name in follower.cluster.ports if name.service == "s1")
                weights = lambda: [e.weight for e in follower.cluster.ports[s1].endpoints]  # noqa: E731
                assert weights() == [5]
                # The rest of the object is followed all the same.
                apply(server, *web("s1", 77, weights={"10.244.1.11": -5}))
                await until(
                    lambda: follower.cluster.ports[s1].cluster_ip == "10.96.0.77", "it has moved"
                )
                assert weights() == [5]
                await until(lambda: events(server), "an Event is written")
                (event,) = events(server)
                assert event["reason"] == "InvalidAnnotation"
                assert "nfqproxy.io/weights" in event["message"]
                apply(server, *web("s1", 77, weights={"10.244.1.11": 7}))
                await until(lambda: weights() == [7], "the mended value is in force")
                assert follower.source.last_error is None
            # Without a last good value there is none.
            apply(server, *web("s1", 77, weights={"10.244.1.11": -5}))
            async with following(server, tmp_path) as follower:
                assert [e.weight for e in follower.cluster.ports[s1].endpoints] == [1]

    run(work())


def test_events_that_repeat_are_counted_up(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            for count in range(1, 4):
                follower.source.warn("default", "s1", "FailedToStartServiceHealthcheck", "in use")
                await until(
                    lambda count=count: [each["count"] for each in events(server)] == [count],
                    f"it is counted {count}",
                )
            # They do not live for ever.
            (event,) = events(server)
            server.discard("Event", event["metadata"]["name"], "default")
            follower.source.warn("default", "s1", "FailedToStartServiceHealthcheck", "in use")
            await until(lambda: [each["count"] for each in events(server)] == [1], "a new one")

    run(work())


def test_one_object_cannot_flood_the_server_with_events(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving() as server, following(server, tmp_path) as follower:
            for number in range(60):
                follower.source.warn("default", "s1", "Odd", f"message {number}")
            follower.source.warn("default", "s2", "Odd", "last")
            await until(
                lambda: any(each["message"] == "last" for each in events(server)), "the last one"
            )
            about = [each for each in events(server) if each["involvedObject"]["name"] == "s1"]
            assert len(about) == 11
            combined = [each for each in about if each["message"].startswith("(combined from")]
            assert [each["count"] for each in combined] == [15]

    run(work())


@pytest.mark.parametrize("is_renewed", [True, False])
def test_credentials_that_are_refused_are_read_again(tmp_path: Path, is_renewed: bool) -> None:
    async def work() -> None:
        access = Access({"first": "proxy"})
        async with serving(access=access) as server, following(server, tmp_path) as follower:
            await watched(server)
            access.tokens.clear()
            access.tokens["second"] = "proxy"
            if is_renewed:
                write_kubeconfig(tmp_path / "kubeconfig", server)
            await server.restart(is_compacted=False)
            apply(server, *web("s9", 9))
            if is_renewed:
                await agree(follower, server)
                await until(lambda: follower.source.last_error is None, "all is well")
            else:
                await until(lambda: "401" in (follower.source.last_error or ""), "it is told")
                assert "check the credentials" in (follower.source.last_error or "")
                assert len(follower.services) == 7

    run(work())


@pytest.mark.parametrize("with_certificate", [True, False])
def test_tls(tmp_path: Path, with_certificate: bool) -> None:
    async def work() -> None:
        directory = tmp_path / "certificates"
        directory.mkdir()
        certificates = make_certificates(directory)
        access = Access({"secret": "proxy"})
        async with serving(certificates=certificates, access=access) as server:
            write_kubeconfig(tmp_path / "kubeconfig", server, with_certificate=with_certificate)
            async with following(server, tmp_path) as follower:
                apply(server, *web("s9", 9))
                await agree(follower, server)

    run(work())


def test_an_exec_plugin_gives_the_token(tmp_path: Path) -> None:
    async def work() -> None:
        access = Access({"from-plugin": "proxy"})
        async with serving(access=access) as server:
            plugin = tmp_path / "plugin"
            answer = {
                "apiVersion": "client.authentication.k8s.io/v1",
                "kind": "ExecCredential",
                "status": {"token": "from-plugin"},
            }
            plugin.write_text(f"#!{sys.executable}\nprint('''{json.dumps(answer)}''')\n")
            plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
            config = kubeconfig(server)
            config["users"][0]["user"] = {
                "exec": {"apiVersion": answer["apiVersion"], "command": str(plugin)}
            }
            (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
            async with following(server, tmp_path) as follower:
                assert len(follower.services) == 7

    run(work())


def test_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.aio.config import incluster_config

    async def work() -> None:
        certificates = make_certificates(tmp_path)
        access = Access({"of-the-pod": "system:serviceaccount:kube-system:nfqproxy"})
        async with serving(certificates=certificates, access=access) as server:
            token = tmp_path / "token"
            token.write_text("of-the-pod")
            monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
            monkeypatch.setattr(
                incluster_config, "SERVICE_CERT_FILENAME", str(certificates.authority)
            )
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
            source = KubernetesSource(Reached(), node_name=NODE, pace=QUICK, time_outs=HASTY)
            try:
                objects = await source.start()
            finally:
                await source.close()
            assert len([each for each in objects.services if isinstance(each, Service)]) == 7

    run(work())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "the kubeconfig cannot be read: No such file or directory"),
        ("", "cannot be used as a kubeconfig"),
        ("[1, 2]", "cannot be used as a kubeconfig"),
        ("clusters: {", "cannot be used as a kubeconfig"),
        ("current-context: x\ncontexts: []\n", "Expected object with name x"),
    ],
)
def test_a_bad_kubeconfig_is_told_in_one_sentence(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)

    async def work() -> None:
        source = KubernetesSource(Reached(kubeconfig=str(path)), node_name=NODE)
        try:
            await source.start()
        finally:
            await source.close()

    with pytest.raises(InputError) as caught:
        run(work())
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_pod_no_service_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    async def work() -> None:
        source = KubernetesSource(Reached(), node_name=NODE)
        try:
            await source.start()
        finally:
            await source.close()

    with pytest.raises(InputError, match=r"--in-cluster: .*give --kubeconfig FILE"):
        run(work())


def test_a_wrong_node_name_is_told(tmp_path: Path, caplog: Any) -> None:
    async def work() -> None:
        async with ApiServer() as server:
            apply(server, node("other"))
            async with following(server, tmp_path):
                pass

    run(work())
    assert f"there is no Node {NODE}; give this node's name with --node-name" in caplog.text
