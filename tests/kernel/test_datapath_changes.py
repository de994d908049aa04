"""What changes under a running proxy: endpoints, weights, broken manifests, the node's address.

A manifest that is refused never comes to a data path: that test runs once.
"""

import json
from collections import Counter

import pytest

from nfqproxy.lab.topology import Topology
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Endpoint, Manifest, Port, service
from tests.kernel.proxy import DATA_PATHS, RUNS, Proxy, run_cli, wait_until
from tests.kernel.responder import Connection, ask_tcp, ask_udp, new_flow

VIP4, VIP6 = "10.96.0.80", "fd00:10:96::80"
BALANCED = ("198.51.100.7", "2001:db8:51::7")
PORTS = (
    Port(name="tcp", port=80, target=8080),
    Port(name="udp", port=80, target=8080, protocol="UDP"),
)


def web(built: Topology, *weights: int) -> list[Manifest]:
    """The Service with the first pods as endpoints, one for each weight."""
    chosen = built.pods[: len(weights)]
    addresses = [(pod.address4, pod.address6) for pod in chosen]
    return service(
        "web",
        vips=[VIP4, VIP6],
        ports=PORTS,
        endpoints=[address for pair in addresses for address in pair],
        weights={a: w for pair, w in zip(addresses, weights, strict=True) for a in pair},
    )


def who_answers(built: Topology, vip: str, count: int = 40) -> Counter[str]:
    namespace = built.client.namespace
    names = Counter(ask_tcp(namespace, vip, 80).name for _ in range(count))
    # New flows: one that conntrack knows stays with its backend.
    names.update(ask_udp(namespace, vip, 80).name for _ in range(count))
    return names


def restart_worker(proxy: Proxy) -> None:
    killed = proxy.kill_worker()

    def is_replaced() -> bool:
        (worker,) = proxy.status()["workers"]
        return bool(worker["ready"]) and worker["pid"] != killed

    wait_until(is_replaced, "another worker is ready")


def test_a_table_of_several_messages(cluster: Topology) -> None:
    """All of it is the worker's, also after its restart: the fallback decides none of these."""
    pod = cluster.pods[0]
    vips = [f"10.96.{number >> 8}.{number & 255}" for number in range(256, 956)]
    objects = [
        each
        for number, vip in enumerate(vips)
        for each in service(f"web-{number}", vips=[vip], ports=PORTS[:1], endpoints=[pod.address4])
    ]
    client = cluster.client.namespace
    with Proxy(cluster.node.namespace, objects) as proxy:
        for _ in range(2):
            for vip in (vips[0], vips[249], vips[250], vips[-1]):
                assert ask_tcp(client, vip, 80).name == pod.name
            assert proxy.installed() == 4
            assert proxy.counters() == {}
            restart_worker(proxy)


@pytest.mark.parametrize("run", RUNS)
def test_changed_endpoints_and_weights_are_followed(
    cluster: Topology, run: tuple[str, str]
) -> None:
    reader, data_path = run
    one, two, three = (pod.name for pod in cluster.pods)
    node, client = cluster.node.namespace, cluster.client.namespace
    with Proxy(
        node, web(cluster, 1, 0), "--seed", "7", reader=reader, data_path=data_path
    ) as proxy:
        held = [Connection(client, vip, 80) for vip in (VIP4, VIP6)]
        try:
            assert {connection.answer.name for connection in held} == {one}
            assert set(who_answers(cluster, VIP4)) == {one}
            # Weights turned round, a third endpoint.
            proxy.follow(web(cluster, 0, 1, 1))
            for vip in (VIP4, VIP6):
                assert set(who_answers(cluster, vip)) == {two, three}
            # The first endpoint leaves altogether: its connections go on, new ones do not reach it.
            proxy.follow(web(cluster, 1, 1, 1)[:1] + _without(web(cluster, 1, 1, 1)[1:], 0))
            for vip in (VIP4, VIP6):
                assert set(who_answers(cluster, vip)) == {two, three}
            for connection in held:
                assert connection.echo("still here") == "still here"
            # A Service that goes is not served any more, one that comes is.
            proxy.follow(
                service(
                    "other", vips=["10.96.0.90"], ports=PORTS, endpoints=[cluster.pods[2].address4]
                )
            )
            assert ask_tcp(client, "10.96.0.90", 80).name == three
            with pytest.raises(TimeoutError):
                ask_tcp(client, VIP4, 80, timeout_s=0.2)
            for connection in held:
                assert connection.echo("and on") == "and on"
        finally:
            for connection in held:
                connection.socket.close()
        proxy.stop()


def load_balanced(built: Topology, **spec: object) -> list[Manifest]:
    """UDP on load-balancer addresses; the only endpoint is said to be on another node."""
    pod = built.pods[0]
    found = service(
        "balanced",
        vips=[VIP4, VIP6],
        ports=[PORTS[1]],
        endpoints=[Endpoint(address=a, node="n2") for a in (pod.address4, pod.address6)],
    )
    found[0]["spec"] |= {"type": "LoadBalancer", **spec}
    found[0]["status"] = {"loadBalancer": {"ingress": [{"ip": ip} for ip in BALANCED]}}
    return found


SHUT_OUT = (
    {"externalTrafficPolicy": "Local"},
    {"loadBalancerSourceRanges": ["10.9.0.0/16", "2001:db8:99::/64"]},
)


@pytest.mark.parametrize("data_path", DATA_PATHS)
def test_a_udp_flow_outlives_a_change_that_shuts_new_ones_out(
    cluster: Topology, data_path: str
) -> None:
    """Also after a silence, when the set of known flows has forgotten it and conntrack has not."""
    node, client = cluster.node.namespace, cluster.client.namespace
    with Proxy(node, load_balanced(cluster), data_path=data_path) as proxy:
        for is_alive in (True, False):
            if not is_alive:
                proxy.lose_workers()
            for change in SHUT_OUT:
                with (
                    new_flow(client, BALANCED[0], 80) as four,
                    new_flow(client, BALANCED[1], 80) as six,
                ):
                    for flow in (four, six):
                        flow.send(b"before")
                        assert flow.recv(200).endswith(b"before")
                    proxy.follow(load_balanced(cluster, **change))
                    if data_path == "ctnetlink":  # by marks, conntrack alone knows
                        for name in ("nfqproxy-flows-4", "nfqproxy-flows-6"):
                            node.run("ipset", "flush", name)
                    for flow in (four, six):
                        flow.send(b"after")
                        assert flow.recv(200).endswith(b"after")
                for address in BALANCED:
                    with pytest.raises(TimeoutError):
                        ask_udp(client, address, 80, timeout_s=0.2)
                proxy.follow(load_balanced(cluster))


def _without(slices: list[Manifest], index: int) -> list[Manifest]:
    for item in slices:
        del item["endpoints"][index]
    return slices


def test_a_broken_manifest_leaves_the_last_good_state(cluster: Topology) -> None:
    one, two, _ = (pod.name for pod in cluster.pods)
    node = cluster.node.namespace
    with Proxy(node, web(cluster, 1, 0)) as proxy:
        assert proxy.status()["source_error"] is None
        bad = web(cluster, 0, 1)
        bad[0]["spec"]["ports"][0]["port"] = 70000
        broken = {
            "line 1": "{",
            "spec.ports[0].port": json.dumps({"apiVersion": "v1", "kind": "List", "items": bad}),
        }
        for field, content in broken.items():
            proxy.write_text(content)
            wait_until(
                lambda field=field: field in (proxy.status()["source_error"] or ""),
                f"status names {field}",
            )
            assert str(proxy.manifest) in proxy.status()["source_error"]
            assert proxy.status()["revision"] == 1
            assert set(who_answers(cluster, VIP4, 10)) == {one}
        shown = run_cli(node, "status")
        assert shown.returncode == 0
        assert "the last good state serves" in shown.stdout
        assert "spec.ports[0].port" in shown.stdout
        assert proxy.log.count("spec.ports[0].port") == 1
        # The fault is mended by other contents, ...
        proxy.follow(web(cluster, 0, 1))
        assert proxy.status()["source_error"] is None
        assert set(who_answers(cluster, VIP4, 10)) == {two}
        # ... and by the same contents as before.
        proxy.write_text("{")
        wait_until(lambda: proxy.status()["source_error"], "status names the fault")
        proxy.write(web(cluster, 0, 1))
        wait_until(lambda: proxy.status()["source_error"] is None, "the fault is forgotten")
        assert set(who_answers(cluster, VIP4, 10)) == {two}


@pytest.mark.parametrize("run", RUNS)
def test_masquerade_follows_the_nodes_address(cluster: Topology, run: tuple[str, str]) -> None:
    reader, data_path = run
    node, client = cluster.node.namespace, cluster.client.namespace
    fresh4, fresh6 = "192.0.2.7", "2001:db8:2::7"
    with Proxy(node, web(cluster, 1, 1, 1), reader=reader, data_path=data_path) as proxy:
        for vip, address in ((VIP4, "192.0.2.1"), (VIP6, "2001:db8:2::1")):
            assert ask_tcp(client, vip, 80).client == address
            assert ask_tcp(node, vip, 80).client == address
        node.ip(
            "addr del 192.0.2.1/24 dev eth0",
            "addr del 2001:db8:2::1/64 dev eth0",
            f"addr add {fresh4}/24 dev eth0",
            f"addr add {fresh6}/64 dev eth0 nodad",
            "route replace default via 192.0.2.254",
            "route replace ::/0 via 2001:db8:2::254",
        )
        client.ip(f"route replace default via {fresh4}", f"route replace ::/0 via {fresh6}")
        # A round trip through the worker's event loop: it has met the kernel's events then.
        proxy.status()
        before = proxy.queued()
        for vip, address in ((VIP4, fresh4), (VIP6, fresh6)):
            for _ in range(5):
                assert ask_tcp(client, vip, 80).client == address
                assert ask_udp(client, vip, 80).client == address
                assert ask_tcp(node, vip, 80).client == address
        after = proxy.queued()
        assert [
            after[family, protocol] - before[family, protocol]
            for family in Family
            for protocol in (Protocol.TCP, Protocol.UDP)
        ] == [10, 5, 10, 5]
        assert proxy.counters() == {}
