"""The worked vectors that are about time, 38 to 42, with real flows while the endpoints change.

Each by both families at once, on both data paths, and twice: *alive*, and *killed*, where the workers are lost
between the first packets and the change. What does not need a worker holds all the same: conntrack carries what is
established, the supervisor reconciles, the fallback picks. Only the records of affinity are the workers'.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from nfqproxy.api import admin
from nfqproxy.kernel import node_rules
from nfqproxy.model import Family, FrontendKey, Protocol
from nfqproxy.wire import ctnetlink
from tests.kernel.probes import REFUSED, probe
from tests.kernel.proxy import DATA_PATHS, Proxy, wait_until
from tests.kernel.responder import TIMEOUT_S, Connection, parse
from tests.kernel.test_reconcile import DRAINING, GONE, READY, Flow, deleted, flows, insert, table
from tests.kernel.vector_world import VectorWorld, next_port, vector_world
from tests.scenarios.twins import Object, objects, twin

POD = "10.244.1.9"
VIP = "10.96.0.10"
E1 = ("10.244.1.5", "n1")
E2 = ("10.244.2.5", "n2")
BOTH = tuple(Family)

Conditions = Mapping[str, bool]


@pytest.fixture(scope="module")
def world() -> Iterator[VectorWorld]:
    with vector_world() as built:
        yield built


@pytest.fixture(params=DATA_PATHS)
def data_path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["alive", "killed"])
def phase(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_endpoints(vector: int, *, e1: Conditions | None, e2: Conditions | None) -> list[Object]:
    """The vector's objects with e1 and e2 in other conditions than the file's; None: not listed."""
    found = [item for item in objects(vector) if item["kind"] != "EndpointSlice"]
    # That of 41 has no slice; its Service is that of 40.
    listed = objects(40 if vector == 41 else vector)
    for item in (each for each in listed if each["kind"] == "EndpointSlice"):
        family = Family[item["addressType"].upper()]
        item["endpoints"] = [
            {"addresses": [twin(address, family)], "nodeName": node, "conditions": dict(conditions)}
            for (address, node), conditions in ((E1, e1), (E2, e2))
            if conditions is not None
        ]
        found.append(item)
    return found


@contextmanager
def running(world: VectorWorld, first: list[Object], data_path: str) -> Iterator[Proxy]:
    try:
        with Proxy(world.node, first, data_path=data_path) as proxy:
            yield proxy
    finally:
        world.node.call(node_rules.cleanup)
        world.node.run("conntrack", "-F")


def new_connections(world: VectorWorld, port: int, *, protocols: tuple[Protocol, ...]) -> set[str]:
    """What a new connection of the pod by each protocol and family gets; the names of backends."""
    found = set()
    for family in BOTH:
        for protocol in protocols:
            key = FrontendKey(protocol, twin(VIP, family), port)
            source = (twin(POD, family), next_port())
            answer = world.group["pod1"].call(
                lambda key=key, source=source: probe(key, source, patience_s=TIMEOUT_S)  # type: ignore[misc]
            )
            found.add(parse(answer.encode()).name if "\n" in answer else answer)
    return found


@contextmanager
def udp_flows(world: VectorWorld) -> Iterator[list[Flow]]:
    with flows(world.group["pod1"], *((twin(VIP, family), 53) for family in BOTH)) as opened:
        yield opened


def sweep(world: VectorWorld) -> None:
    """Have conntrack held against the Services now."""
    world.node.call(lambda: admin.ask("reconcile"))


def test_vector_38_affinity_to_an_endpoint_that_is_no_longer_ready(
    world: VectorWorld, phase: str, data_path: str
) -> None:
    every = tuple(Protocol)
    with running(world, with_endpoints(38, e1=READY, e2=None), data_path) as proxy:
        assert new_connections(world, 80, protocols=every) == {"e1"}
        proxy.follow(with_endpoints(38, e1=READY, e2=READY))
        # The record decides; by chance six connections out of six have one of 64.
        for _ in range(4):
            assert new_connections(world, 80, protocols=every) == {"e1"}
        if phase == "killed":
            proxy.lose_workers()
        proxy.follow(objects(38))
        for _ in range(2):
            assert new_connections(world, 80, protocols=every) == {"e2"}
        if phase == "alive":
            # The record is replaced, so e1 does not get its client back.
            proxy.follow(with_endpoints(38, e1=READY, e2=READY))
            for _ in range(4):
                assert new_connections(world, 80, protocols=every) == {"e2"}


def test_vector_39_established_connections_keep_the_endpoint_that_leaves(
    world: VectorWorld, phase: str, data_path: str
) -> None:
    def hold(family: Family) -> Connection:
        source = (twin(POD, family), next_port())
        return Connection(world.group["pod1"], twin(VIP, family), 80, source=source)

    with (
        running(world, with_endpoints(39, e1=READY, e2=None), data_path) as proxy,
        ExitStack() as stack,
    ):
        held = []
        for family in BOTH:
            held.append(stack.enter_context(hold(family)))
        if phase == "killed":
            proxy.lose_workers()
            # These are of the fallback's making.
            for family in BOTH:
                held.append(stack.enter_context(hold(family)))
        assert {connection.answer.name for connection in held} == {"e1"}
        for left in (objects(39), with_endpoints(39, e1=None, e2=None)):
            proxy.follow(left)
            sweep(world)
            assert [connection.echo("still here") for connection in held] == ["still here"] * len(
                held
            )
            is_served = left == objects(39)
            got = new_connections(world, 80, protocols=tuple(Protocol))
            assert got == ({"e2"} if is_served else set(REFUSED.values()))


def test_vector_40_a_udp_flow_moves_when_its_endpoint_no_longer_serves(
    world: VectorWorld, phase: str, data_path: str
) -> None:
    with (
        running(world, with_endpoints(40, e1=READY, e2=None), data_path) as proxy,
        udp_flows(world) as opened,
    ):
        assert [flow.ask() for flow in opened] == ["e1"] * 2
        if phase == "killed":
            proxy.lose_workers()
        # While it drains, its flows stay and new ones go elsewhere.
        proxy.follow(with_endpoints(40, e1=DRAINING, e2=READY))
        sweep(world)
        assert [flow.ask() for flow in opened] == ["e1"] * 2
        assert new_connections(world, 53, protocols=(Protocol.UDP,)) == {"e2"}
        # No plan changes by this, so there is no revision to wait for.
        proxy.write(objects(40))
        wait_until(lambda: deleted(proxy)["backend-gone"] == 2, "both entries were deleted")
        left = table(world.node)
        assert not any(flow.original in left for flow in opened)
        assert [flow.ask() for flow in opened] == ["e2"] * 2
        assert deleted(proxy) == {"backend-gone": 2, "untranslated": 0}


def test_vector_41_without_an_endpoint_left_the_udp_flow_stays(
    world: VectorWorld, phase: str, data_path: str
) -> None:
    with (
        running(world, with_endpoints(41, e1=READY, e2=None), data_path) as proxy,
        udp_flows(world) as opened,
    ):
        assert [flow.ask() for flow in opened] == ["e1"] * 2
        before = table(world.node)
        if phase == "killed":
            proxy.lose_workers()
        proxy.follow(objects(41))
        sweep(world)
        # Its endpoint has left the slices, not the world: whom should it be sent to instead?
        assert [flow.ask() for flow in opened] == ["e1"] * 2
        after = table(world.node)
        for flow in opened:
            assert after[flow.original].id == before[flow.original].id
        assert deleted(proxy) == {"backend-gone": 0, "untranslated": 0}
        refused = new_connections(world, 53, protocols=(Protocol.UDP,))
        assert refused == set(REFUSED.values())


def test_vector_42_a_udp_flow_that_began_before_the_first_endpoint(
    world: VectorWorld, phase: str, data_path: str
) -> None:
    with (
        running(world, with_endpoints(42, e1=GONE, e2=None), data_path) as proxy,
        udp_flows(world) as refused,
        udp_flows(world) as stale,
    ):
        for flow in refused:
            with pytest.raises(ConnectionRefusedError):
                flow.ask()
        for flow in stale:
            # By hand: such an entry is of a time before the rules; now datagrams are refused and leave none.
            insert(world.node, lambda seq, flow=flow: untranslated(flow, seq))  # type: ignore[misc]
        assert not any(table(world.node)[flow.original].is_dnat for flow in stale)
        if phase == "killed":
            proxy.lose_workers()
        proxy.follow(objects(42))
        wait_until(lambda: deleted(proxy)["untranslated"] == 2, "both entries were deleted")
        assert [flow.ask() for flow in (*refused, *stale)] == ["e1"] * 4
        assert all(table(world.node)[flow.original].is_dnat for flow in (*refused, *stale))


def untranslated(flow: Flow, seq: int) -> bytes:
    return ctnetlink.new_entry(
        flow.original, dnat=None, snat=None, timeout_s=300, seq=seq, ack=True
    )
