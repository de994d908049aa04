"""The scenario ``services``: what a Service does to a connection, step by step, on two nodes.

Each step is a few Services and probes with what is to be expected of them; the steps know nothing of
each other and each has Services of its own, so any of them can be shown alone.
"""

import os
import platform
import time
from collections.abc import Mapping, Sequence

from nfqproxy.lab.experiment import Probe, Run, Sticks, dropped, refused, served
from nfqproxy.lab.objects import Endpoint, Port, Service
from nfqproxy.lab.stage import Audience, Stage, Step, play
from nfqproxy.lab.topology import Pod
from nfqproxy.lab.two_nodes import CROWD, TwoNodes
from nfqproxy.model import FrontendKey, Protocol

__all__ = ["STEPS", "run_services"]

MANY = 60
"""So many connections miss one of four backends by chance once in eight million probes."""
SOME = 30
"""The same for one of two: once in five hundred million."""
FEW = 5
WEB = Port(name="http", port=80, target=8080)
DNS = Port(name="dns", port=53, target=53, protocol="UDP")


def _web(name: str, number: int, *pods: Pod, **spec: object) -> Service:
    """A Service on port 80; with further fields of its spec."""
    return Service(name=name, number=number, ports=(WEB,), endpoints=_ready(*pods), spec=spec)


def _web_on_node_port(name: str, number: int, *pods: Pod, **spec: object) -> Service:
    """The same with node port 30000 + number."""
    port = Port(name="http", port=80, target=8080, node_port=30_000 + number)
    return Service(name=name, number=number, ports=(port,), endpoints=_ready(*pods), spec=spec)


def _ready(*pods: Pod) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(pod=pod) for pod in pods)


def _to(
    addresses: Sequence[str], port: int, protocol: Protocol = Protocol.TCP
) -> tuple[FrontendKey, ...]:
    return tuple(FrontendKey(protocol, address, port) for address in addresses)


def _cluster_ips(service: Service, port: int = 80) -> tuple[FrontendKey, ...]:
    return _to(service.cluster_ips, port)


def _node_port(stage: Stage, service: Service) -> tuple[FrontendKey, ...]:
    node = stage.lab.topology.node
    return _to((node.address4, node.address6), 30_000 + service.number)


def _names(pods: Sequence[Pod]) -> tuple[str, ...]:
    return tuple(pod.name for pod in pods)


# ------------------------------------------------------------------------------------------ steps


def _cluster_ip(stage: Stage) -> None:
    lab = stage.lab
    pods = (*lab.near, *lab.far)
    web = Service(name="web", number=10, ports=(WEB, DNS), endpoints=_ready(*pods))
    everyone = _names(pods)
    stage.situation("two endpoints on each node", web)
    stage.send(
        Probe(
            source=lab.caller.name,
            to=_cluster_ips(web),
            times=MANY,
            expect=served(*everyone, seen_as="client"),
        ),
        Probe(
            source=lab.caller.name,
            to=_to(web.cluster_ips, 53, Protocol.UDP),
            times=MANY,
            expect=served(*everyone),
        ),
        Probe(
            source="n1",
            to=_cluster_ips(web),
            times=MANY,
            expect=served(*everyone, seen_as="node"),
        ),
        Probe(
            source="c1",
            to=_cluster_ips(web),
            times=MANY,
            expect=served(*everyone, seen_as="node"),
        ),
    )


def _policy_cluster(stage: Stage) -> None:
    lab = stage.lab
    shop = _web_on_node_port("shop", 20, *lab.near, *lab.far)
    stage.situation("two endpoints on each node", shop)
    stage.send(
        Probe(
            source="c1",
            to=_node_port(stage, shop),
            times=MANY,
            expect=served(*_names((*lab.near, *lab.far)), seen_as="node"),
        )
    )


def _policy_local(stage: Stage) -> None:
    lab = stage.lab
    near, far = lab.near[0], lab.far[0]
    shop = _web_on_node_port("shop", 30, near, far, externalTrafficPolicy="Local")
    to = _node_port(stage, shop)
    stage.situation("one endpoint on each node", shop)
    stage.send(Probe(source="c1", to=to, times=SOME, expect=served(near.name, seen_as="client")))
    rest = _web_on_node_port("shop", 30, far, externalTrafficPolicy="Local")
    stage.situation(f"{near.name} leaves; {far.name} on the other node is left", rest)
    stage.send(
        Probe(source="c1", to=to, expect=dropped()),
        Probe(
            source=lab.caller.name,
            to=to,
            times=FEW,
            expect=served(far.name, seen_as="client"),
        ),
        Probe(source="n1", to=to, times=FEW, expect=served(far.name, seen_as="node")),
    )


def _internal_local(stage: Stage) -> None:
    lab = stage.lab
    cache = _web("cache", 40, *lab.near, *lab.far, internalTrafficPolicy="Local")
    to = _cluster_ips(cache)
    stage.situation("two endpoints on each node", cache)
    stage.send(
        Probe(
            source=lab.caller.name,
            to=to,
            times=SOME,
            expect=served(*_names(lab.near), seen_as="client"),
        ),
        Probe(source="n1", to=to, times=SOME, expect=served(*_names(lab.near), seen_as="node")),
    )
    stage.situation(
        "those of the node leave", _web("cache", 40, *lab.far, internalTrafficPolicy="Local")
    )
    stage.send(
        Probe(source=lab.caller.name, to=to, expect=dropped()),
        Probe(source="n1", to=to, expect=dropped()),
    )


def _source_ranges(stage: Stage) -> None:
    lab = stage.lab
    allowed = lab.topology.client
    ranges = [f"{allowed.address4}/32", f"{allowed.address6}/128"]
    api = Service(
        name="api",
        number=50,
        ports=(Port(name="http", port=80, target=8080, node_port=30_050),),
        endpoints=_ready(*lab.near, *lab.far),
        spec={"loadBalancerSourceRanges": ranges},
        has_load_balancer=True,
    )
    to = _to(api.load_balancer_ips, 80)
    everyone = _names((*lab.near, *lab.far))
    stage.situation(f"loadBalancerSourceRanges: {', '.join(ranges)}", api)
    stage.send(
        Probe(source="c1", to=to, times=MANY, expect=served(*everyone, seen_as="node")),
        Probe(source="c2", to=to, expect=dropped()),
        Probe(source=lab.caller.name, to=to, expect=dropped()),
        # The ranges bind the load balancer's addresses alone.
        Probe(
            source="c2",
            to=_node_port(stage, api),
            times=MANY,
            expect=served(*everyone, seen_as="node"),
        ),
    )


def _refusals(stage: Stage) -> None:
    lab = stage.lab
    live = _web("live", 60, *lab.near)
    web = Port(name="http", port=80, target=8080, node_port=30_061)
    empty = Service(name="empty", number=61, ports=(web, DNS), endpoints=())
    unowned = ("10.96.77.77", "fd00:10:96::7777")
    # From different hosts: the kernel sends one host about one ICMP error a second (icmp_ratelimit).
    probes = (
        Probe(source=lab.caller.name, to=_cluster_ips(empty), expect=refused()),
        Probe(
            source=lab.caller.name,
            to=_to(empty.cluster_ips, 53, Protocol.UDP),
            expect=refused(),
        ),
        Probe(source="n1", to=_cluster_ips(empty), expect=refused()),
        Probe(source="c1", to=_node_port(stage, empty), expect=refused()),
        Probe(source="c2", to=_cluster_ips(live, 81), expect=refused()),
        Probe(source="c2", to=_to(unowned, 80), expect=dropped()),
    )
    stage.situation("empty has no endpoint; live has port 80; nobody owns 10.96.77.77", live, empty)
    stage.send(*probes)
    with stage.without_proxy("the same with workers and supervisor killed: the kernel alone"):
        stage.send(
            *probes,
            Probe(
                source=lab.caller.name,
                to=_cluster_ips(live),
                times=SOME,
                expect=served(*_names(lab.near), seen_as="client"),
            ),
        )


def _affinity(stage: Stage) -> None:
    lab = stage.lab
    pods = (*lab.near, *lab.far)
    sticky = _web_on_node_port("sticky", 70, *pods, sessionAffinity="ClientIP")
    to = _node_port(stage, sticky)[:1]  # the clients' many addresses are IPv4
    stage.situation("sessionAffinity ClientIP, four endpoints", sticky)

    def many(kept: Mapping[str, str], pods: Sequence[Pod]) -> Probe:
        expect = served(*_names(pods), seen_as="node", kept=kept)
        return Probe(source="c1", to=to, times=len(CROWD), bind=CROWD, expect=expect)

    one, crowd = stage.send(
        Probe(
            source="c1",
            to=to,
            times=SOME,
            expect=served(*_names(pods), sticks=Sticks.YES, seen_as="node"),
        ),
        many({}, pods),
    )
    chosen = next(iter(one.total("backends")), "")
    first = crowd.seen[0].by_source
    stage.restart_workers("every worker killed and replaced")
    again = Probe(
        source="c1", to=to, times=SOME, expect=served(chosen, sticks=Sticks.YES, seen_as="node")
    )
    stage.send(again, many(first, pods))
    others = [pod for pod in pods if pod.name != chosen]
    rest = _web_on_node_port("sticky", 70, *others, sessionAffinity="ClientIP")
    stage.situation(f"{chosen} leaves", rest)
    moved = served(*_names(others), sticks=Sticks.YES, seen_as="node")
    stage.send(
        Probe(source="c1", to=to, times=SOME, expect=moved),
        many({client: name for client, name in first.items() if name != chosen}, others),
    )


def _hairpin(stage: Stage) -> None:
    lab = stage.lab
    only = lab.near[0]
    mirror = _web("mirror", 80, only)
    to = _cluster_ips(mirror)
    stage.situation(f"{only.name} is the only endpoint", mirror)
    stage.send(
        Probe(source=only.name, to=to, times=FEW, expect=served(only.name, seen_as="node")),
        Probe(source=lab.caller.name, to=to, times=FEW, expect=served(only.name, seen_as="client")),
    )


def _draining(stage: Stage) -> None:
    lab = stage.lab
    leaving = (lab.near[0], lab.far[0])
    fresh = lab.near[1]

    def deploy(*, serving: bool, ready: Sequence[Pod]) -> Service:
        drained = (
            Endpoint(pod=pod, ready=False, serving=serving, terminating=True) for pod in leaving
        )
        return Service(
            name="deploy", number=90, ports=(WEB,), endpoints=(*drained, *_ready(*ready))
        )

    service = deploy(serving=True, ready=())
    probe = Probe(
        source=lab.caller.name,
        to=_cluster_ips(service),
        times=SOME,
        expect=served(*_names(leaving), seen_as="client"),
    )
    stage.situation("every endpoint terminates, and still serves", service)
    stage.send(probe)
    stage.situation(f"{fresh.name} becomes ready", deploy(serving=True, ready=[fresh]))
    only = served(fresh.name, seen_as="client")
    stage.send(Probe(source=lab.caller.name, to=probe.to, times=SOME, expect=only))
    stage.situation(
        f"{fresh.name} is gone, the others serve no longer", deploy(serving=False, ready=())
    )
    stage.send(Probe(source=lab.caller.name, to=probe.to, expect=refused()))


def _health_port(stage: Stage) -> None:
    lab = stage.lab
    near, far = lab.near[0], lab.far[0]
    health_port = 32_100

    def edge(*, terminating: bool) -> Service:
        return Service(
            name="edge",
            number=100,
            ports=(WEB,),
            endpoints=(
                Endpoint(pod=near, ready=not terminating, terminating=terminating),
                Endpoint(pod=far),
            ),
            spec={"externalTrafficPolicy": "Local", "healthCheckNodePort": health_port},
            has_load_balancer=True,
        )

    service = edge(terminating=False)
    traffic = Probe(
        source="c1",
        to=_to(service.load_balancer_ips, 80),
        times=FEW,
        expect=served(near.name, seen_as="client"),
    )
    stage.situation("one endpoint on each node", service)
    stage.check_health("c1", health_port, status=200, endpoints=1)
    stage.send(traffic)
    stage.situation(f"{near.name} begins to terminate", edge(terminating=True))
    stage.check_health("c1", health_port, status=503, endpoints=0)
    stage.send(traffic)


STEPS: tuple[Step, ...] = (
    Step(
        title="ClusterIP",
        point="Connections spread over all endpoints. Pods keep their address; the node's own"
        " processes and clients from outside are masqueraded.",
        show=_cluster_ip,
    ),
    Step(
        title="NodePort, externalTrafficPolicy Cluster",
        point="Any endpoint may serve, on any node; so that answers come back by this node, the"
        " client is masqueraded.",
        show=_policy_cluster,
    ),
    Step(
        title="NodePort, externalTrafficPolicy Local",
        point="Only endpoints on the node that was asked serve clients from outside, who keep their"
        " address. Without one the packet is dropped, for another node may have one.",
        show=_policy_local,
    ),
    Step(
        title="internalTrafficPolicy Local",
        point="The ClusterIP leads to endpoints on the client's own node alone.",
        show=_internal_local,
    ),
    Step(
        title="LoadBalancer with source ranges",
        point="Who is outside the ranges is dropped, pods included; other frontends do not care.",
        show=_source_ranges,
    ),
    Step(
        title="Refusals",
        point="Where nobody serves the client is told at once, by the kernel itself: no worker is"
        " and no supervisor is needed.",
        show=_refusals,
    ),
    Step(
        title="Session affinity ClientIP",
        point="A client stays with its backend, over a restart of the workers too, as long as that"
        " backend is there.",
        show=_affinity,
    ),
    Step(
        title="Hairpin",
        point="A pod that reaches itself through its Service is masqueraded, or it would not know"
        " the answer.",
        show=_hairpin,
    ),
    Step(
        title="Draining",
        point="Terminating endpoints get new connections only when nobody else is ready.",
        show=_draining,
    ),
    Step(
        title="Health-check node port",
        point="It tells a load balancer how many ready endpoints this node has; one that drains"
        " counts no more, and still serves.",
        show=_health_port,
    ),
)
"""In the order they are shown; a step's number is its place, from 1."""


def run_services(lab: TwoNodes, audience: Audience, numbers: Sequence[int]) -> Run:
    """Show these steps. Raises NfqproxyError when a part cannot run."""
    started = time.monotonic()
    stage = Stage(lab, audience)
    steps = tuple(play(stage, audience, number, STEPS[number - 1]) for number in numbers)
    return Run(
        kernel=platform.release(),
        cpus=len(os.sched_getaffinity(0)),
        reader=lab.state.reader,
        workers=lab.state.workers,
        data_path=lab.state.data_path,
        elapsed_s=round(time.monotonic() - started, 1),
        steps=steps,
    )
