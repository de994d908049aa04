"""A small cluster with a running proxy, shared by the data-path tests of a module.

Node n1 runs the proxy and has pods 10.244.1.11 to .13; n2 has pod 10.244.2.11; client c1 sends
Service traffic to n1; c2 (192.0.2.11) is a server outside the pod network. Every pod and c2 answers
on TCP and UDP 8080 and on UDP 8053 and 8054 with its name and the client it saw.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from nfqproxy.kernel.netns import Namespace
from nfqproxy.lab.topology import Pod, Topology, topology
from nfqproxy.model import Family, Protocol
from tests.kernel.manifests import Endpoint, Manifest, Port, service
from tests.kernel.proxy import Proxy
from tests.kernel.responder import Responder

NODE4, NODE6 = "192.0.2.1", "2001:db8:2::1"
NODE_PORT = 30080
BOTH = (
    Port(name="tcp", port=80, target=8080),
    Port(name="udp", port=80, target=8080, protocol="UDP"),
)

WEB4, WEB6 = "10.96.0.80", "fd00:10:96::80"
"""All pods of n1, with NODE_PORT."""
SELF4, SELF6 = "10.96.0.81", "fd00:10:96::81"
"""Only pod-1-11: for hairpin."""
REMOTE4, REMOTE6 = "10.96.0.83", "fd00:10:96::83"
"""Only pod-2-11, on the other node."""
OUTSIDE4, OUTSIDE6 = "10.96.0.82", "fd00:10:96::82"
"""Only c2, outside the pod network."""
PAIR4, PAIR6 = "10.96.0.53", "fd00:10:96::53"
"""UDP 53 -> 8053 and UDP 5353 -> 8054 on all pods of n1."""
SCTP4 = "10.96.0.84"
"""SCTP 80 -> 8080 on pod-1-11."""


def is_v6(address: str) -> bool:
    """True for an IPv6 address."""
    return ":" in address


def of_family(address: str, four: str, six: str) -> str:
    """``six`` or ``four``, the one of the family of ``address``."""
    return six if is_v6(address) else four


@dataclass(frozen=True, kw_only=True)
class World:
    """The topology and what runs on it."""

    topology: Topology
    proxy: Proxy
    responder: Responder

    @property
    def client(self) -> Namespace:
        """c1."""
        return self.topology.client.namespace

    @property
    def node(self) -> Namespace:
        """n1."""
        return self.topology.node.namespace

    @property
    def pod(self) -> Pod:
        """pod-1-11."""
        return self.topology.pods[0]

    @contextmanager
    def queues(
        self, expected: Mapping[tuple[Family, Protocol], int], *, undecided: int = 0
    ) -> Iterator[None]:
        """Inside the block exactly these packets are queued: by the rules' and the workers' counters.

        All of them bring about a translated connection, but for ``undecided`` ones.
        """
        rules, packets = self.proxy.queued(), self.proxy.packets()
        installed = self.proxy.installed()
        yield
        after = self.proxy.queued()
        seen = {
            place: after[place] - rules[place] for place in after if after[place] - rules[place]
        }
        assert seen == {place: count for place, count in expected.items() if count}
        assert self.proxy.packets() - packets == sum(expected.values())
        assert self.proxy.installed() - installed == sum(expected.values()) - undecided


def addresses(pods: tuple[Pod, ...]) -> list[Endpoint]:
    """Both addresses of each pod as endpoints."""
    return [
        Endpoint(address=address, node=pod.node)
        for pod in pods
        for address in (pod.address4, pod.address6)
    ]


def objects(built: Topology) -> list[Manifest]:
    """The Services named at the top."""
    local, remote = built.pods_of("n1"), built.pods_of("n2")
    outside = built.clients[1]
    with_node_port = tuple(
        Port(**{**vars(port), "node_port": NODE_PORT})
        for port in BOTH  # type: ignore[arg-type]
    )
    pair = (
        Port(name="dns", port=53, target=8053, protocol="UDP"),
        Port(name="mdns", port=5353, target=8054, protocol="UDP"),
    )
    sctp = (Port(name="sctp", port=80, target=8080, protocol="SCTP"),)
    host = [
        Endpoint(address=outside.address4, node="c2"),
        Endpoint(address=outside.address6, node="c2"),
    ]
    return [
        *service("web", vips=[WEB4, WEB6], ports=with_node_port, endpoints=addresses(local)),
        *service("self", vips=[SELF4, SELF6], ports=BOTH, endpoints=addresses(local[:1])),
        *service("remote", vips=[REMOTE4, REMOTE6], ports=BOTH, endpoints=addresses(remote)),
        *service("outside", vips=[OUTSIDE4, OUTSIDE6], ports=BOTH, endpoints=host),
        *service("pair", vips=[PAIR4, PAIR6], ports=pair, endpoints=addresses(local)),
        *service("sctp", vips=[SCTP4], ports=sctp, endpoints=[local[0].address4]),
    ]


@contextmanager
def world(
    *flags: str, reader: str = "netlink", data_path: str = "ctnetlink", workers: int = 1
) -> Iterator[World]:
    """Build it, start the proxy, take it all down."""
    with topology(clients=2, pods=(3, 1)) as built, Responder() as responder:
        servers = {pod.name: pod.namespace for pod in built.pods} | {
            "c2": built.clients[1].namespace
        }
        for name, namespace in servers.items():
            for port in (8080, 8053, 8054):
                responder.serve(namespace, name, port)
        with Proxy(
            built.node.namespace,
            objects(built),
            *flags,
            reader=reader,
            data_path=data_path,
            workers=workers,
        ) as proxy:
            yield World(topology=built, proxy=proxy, responder=responder)
