"""What the story says: names of rules and sets, both directions of the entry, reasons."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from nfqproxy.control.node import NodeSettings, node_context
from nfqproxy.control.objects import (
    EndpointSlice,
    Node,
    Objects,
    Service,
    ServicePortSpec,
    SliceEndpoint,
    SlicePort,
)
from nfqproxy.control.table import service_ports
from nfqproxy.core.explain import Explainer, Explanation, parse_packet
from nfqproxy.core.plan_table import plans_for_node
from nfqproxy.errors import InputError
from nfqproxy.model import Family, MarkMask, Protocol, TrafficPolicy, Verdict

N1 = Node(name="n1", internal_ips=("192.0.2.1", "2001:db8:2::1"))
WEB = Service(
    namespace="default",
    name="web",
    cluster_ips=("10.96.0.10", "fd00:10:96::10"),
    ports=(
        ServicePortSpec(name="http", port=80, node_port=30080),
        ServicePortSpec(name="dns", protocol=Protocol.UDP, port=53),
        ServicePortSpec(name="sig", protocol=Protocol.SCTP, port=99),
    ),
    external_ips=("203.0.113.9",),
)
CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")
POD, CLIENT = "10.244.1.9", "198.51.100.50"


def endpoint(address: str, **fields: Any) -> SliceEndpoint:
    node = "n1" if "244.1" in address or "244:1:" in address else "n2"
    return SliceEndpoint(address=address, node=node, **fields)


def explain(
    *endpoints: SliceEndpoint,
    source: str = POD,
    to: str = "10.96.0.10:80/tcp",
    service: Service = WEB,
    masquerade_source: Callable[[str], str | None] | None = None,
    **settings: Any,
) -> Explanation:
    ports = (
        SlicePort(name="http", port=8080),
        SlicePort(name="dns", protocol=Protocol.UDP, port=5353),
        SlicePort(name="sig", protocol=Protocol.SCTP, port=999),
    )
    slices = tuple(
        EndpointSlice(
            namespace="default",
            name=f"web-{family}",
            service="web",
            family=family,
            ports=ports,
            endpoints=tuple(e for e in endpoints if (":" in e.address) == (family is Family.IPV6)),
        )
        for family in Family
    )
    objects = Objects(services=(service,), endpoint_slices=slices, nodes=(N1,))
    given = NodeSettings(**{"node_name": "n1", "cluster_cidrs": CIDRS, **settings})
    node = node_context(objects, given)
    table = service_ports(objects, node_name="n1").values()
    return Explainer(
        node=node,
        settings=given,
        ports=table,
        plans=plans_for_node(table, node, given),
        masquerade_source=masquerade_source,
    ).explain(parse_packet(source, to))


def hooks(answer: Explanation) -> list[str]:
    """The hooks in the order of the story, each once."""
    return list(dict.fromkeys(step.partition(": ")[0] for step in answer.steps))


def lines(answer: Explanation, hook: str) -> list[str]:
    return [text for name, _, text in (s.partition(": ") for s in answer.steps) if name == hook]


E1, E2 = endpoint("10.244.1.11"), endpoint("10.244.2.11")


def test_the_way_of_a_forwarded_connection() -> None:
    answer = explain(E1)
    assert hooks(answer) == [
        "raw PREROUTING",
        "worker",
        "conntrack PREROUTING",
        "mangle PREROUTING",
        "nat PREROUTING",
        "routing",
        "filter FORWARD",
        "nat POSTROUTING",
        "reply raw PREROUTING",
        "reply conntrack PREROUTING",
        "reply nat",
        "without a worker",
    ]
    assert lines(answer, "raw PREROUTING") == [
        "the last rules jump to NFQPROXY-QUEUE, which takes SYNs (-p tcp --syn)",
        "10.96.0.10,tcp:80 is in nfqproxy-frontends-4 -> queue",
    ]
    assert (
        "tcp 6 ? SYN_SENT src=10.244.1.9 dst=10.96.0.10 sport=? dport=80"
        " [UNREPLIED] src=10.244.1.11 dst=10.244.1.9 sport=8080 dport=?"
    ) in lines(answer, "conntrack PREROUTING")
    (fallback,) = lines(answer, "without a worker")
    assert "nft ip nfqproxy prerouting" in fallback
    assert "tcp . 10.96.0.10 . 80 in slot-count and draws one of 1 slot" in fallback


def test_the_way_of_a_process_of_the_node() -> None:
    answer = explain(E2, source="192.0.2.1")
    assert [hook for hook in hooks(answer) if "PREROUTING" in hook] == [
        "reply raw PREROUTING",
        "reply conntrack PREROUTING",
    ]
    assert "filter OUTPUT" in hooks(answer)
    assert "the process of this node" in lines(answer, "reply nat")[0]


def test_a_server_on_the_node_itself() -> None:
    host = SliceEndpoint(address="192.0.2.1", node="n1")
    answer = explain(host, source=CLIENT, to="203.0.113.9:80/tcp")
    assert not answer.backends[0].masquerade
    assert {"filter INPUT", "reply raw OUTPUT"} <= set(hooks(answer))
    assert "towards the node's own address" in lines(answer, "nat POSTROUTING")[0]
    assert answer.reason.endswith("the backend sees the client's address")


@pytest.mark.parametrize(
    ("to", "first", "entry"),
    [
        ("10.96.0.10:53/udp", "-p udp", "udp 17 ? src="),
        ("10.96.0.10:99/sctp", "only INIT", "sctp 132 ? COOKIE_WAIT src="),
    ],
)
def test_other_protocols(to: str, first: str, entry: str) -> None:
    answer = explain(E1, to=to)
    assert first in lines(answer, "raw PREROUTING")[0]
    assert any(line.startswith(entry) for line in lines(answer, "conntrack PREROUTING"))
    remembers = "adds 10.244.1.9,udp:?,10.96.0.10 to nfqproxy-flows-4"
    assert (remembers in lines(answer, "mangle PREROUTING")[0]) == ("udp" in to)


def test_ipv6() -> None:
    backend = endpoint("fd00:10:244:1::11")
    answer = explain(backend, source="fd00:10:244:1::9", to="[fd00:10:96::10]:80/tcp")
    assert "fd00:10:96::10,tcp:80 is in nfqproxy-frontends-6" in lines(answer, "raw PREROUTING")[1]
    assert "100 % [fd00:10:244:1::11]:8080" in lines(answer, "worker")[-2]
    assert "nft ip6 nfqproxy" in lines(answer, "without a worker")[0]
    refused = explain(source="fd00:10:244:1::9", to="[fd00:10:96::10]:80/tcp")
    assert "ICMPv6 type 1 code 4" in lines(refused, "reply")[0]


def test_an_unknown_address_is_marked_and_a_known_one_shown() -> None:
    unknown = explain(E2, source=CLIENT)
    assert "[UNREPLIED] src=10.244.2.11 dst=? sport=8080" in "\n".join(unknown.steps)
    assert "192.0.2.1 where that is the primary one" in "\n".join(unknown.steps)
    known = explain(E2, source=CLIENT, masquerade_source=lambda backend: "192.0.2.99")
    assert "[UNREPLIED] src=10.244.2.11 dst=192.0.2.99 sport=8080" in "\n".join(known.steps)
    assert "dst=?" not in "\n".join(known.steps)
    no_route = explain(E2, source=CLIENT, masquerade_source=lambda backend: None)
    assert "[UNREPLIED] src=10.244.2.11 dst=? sport=8080" in "\n".join(no_route.steps)


@pytest.mark.parametrize(
    ("endpoints", "source", "to", "why"),
    [
        ((E1,), CLIENT, "10.96.0.10:80/tcp", "not a pod"),
        ((E1,), POD, "192.0.2.1:30080/tcp", "NodePort: the answer must come back"),
        ((E1,), "10.244.1.11", "10.96.0.10:80/tcp", "hairpin"),
        ((endpoint("192.0.2.7"),), POD, "10.96.0.10:80/tcp", "outside the pod network"),
    ],
)
def test_why_a_source_is_masqueraded(
    endpoints: Iterable[SliceEndpoint], source: str, to: str, why: str
) -> None:
    answer = explain(*endpoints, source=source, to=to)
    assert answer.backends[0].masquerade
    assert why in lines(answer, "nat POSTROUTING")[0]


def test_weights_are_chances_and_slots() -> None:
    weighted = replace(WEB, weights={"10.244.1.11": 3, "10.244.2.11": 0, "10.244.1.12": 1})
    answer = explain(E1, E2, endpoint("10.244.1.12"), service=weighted)
    chances = {b.address: (b.weight, b.probability) for b in answer.backends}
    assert chances == {
        "10.244.1.11": (3, 0.75),
        "10.244.1.12": (1, 0.25),
        "10.244.2.11": (0, 0.0),
    }
    fallback = lines(answer, "without a worker")[0]
    assert "one of 4 slots (3 x 10.244.1.11:8080, 1 x 10.244.1.12:8080)" in fallback
    drained = explain(E2, service=weighted)
    assert drained.verdict is Verdict.REJECT
    assert "all its endpoints are drained (weight 0)" in drained.reason


def test_why_those_of_weight_0_are_passed_over() -> None:
    to = "10.96.0.10:80/tcp"
    drained = replace(WEB, weights={E1.address: 0})
    local = replace(drained, internal_policy=TrafficPolicy.LOCAL)
    silent = explain(E1, E2, to=to, service=local)
    assert silent.verdict is Verdict.DROP
    assert "no endpoint on this node n1 but drained ones (weight 0)" in silent.reason
    late = endpoint("10.244.2.12", ready=False, terminating=True)
    served = explain(E1, late, to=to, service=drained)
    assert [backend.address for backend in served.backends] == [late.address]
    assert "no endpoint is ready, but for drained ones (weight 0), so 1 term" in served.reason
    assert "10.244.1.11:8080 (ready, drained (weight 0))" in "\n".join(served.steps)


@pytest.mark.parametrize("is_overlay", [True, False])
def test_a_datagram_is_dropped_behind_the_worker_which_does_not_know_its_flow(
    is_overlay: bool,
) -> None:
    # In a chain that serves pods and the node; only clients from outside find nobody.
    local = replace(WEB, external_policy=TrafficPolicy.LOCAL)
    for protocol, port in (("udp", 53), ("tcp", 80)):
        to = f"203.0.113.9:{port}/{protocol}"
        answer = explain(
            E2, source=CLIENT, to=to, service=local, is_overlay=is_overlay, steer_all=True
        )
        assert answer.verdict is Verdict.DROP
        told = "\n".join(lines(answer, "worker"))
        assert told.endswith("-> drop") == (protocol == "tcp")
        behind = lines(answer, "filter FORWARD")
        if protocol == "tcp":
            assert behind == []
        else:
            assert behind[0].endswith("drop it" if is_overlay else "is in refusals -> drop")


def test_many_candidates_are_not_all_written_out() -> None:
    answer = explain(*(endpoint(f"10.244.1.{n}") for n in range(20, 60)))
    assert len(answer.backends) == 40
    entries = [step for step in answer.steps if "[UNREPLIED]" in step]
    assert len(entries) == 3
    assert "and alike for 37 more" in "\n".join(answer.steps)
    assert max(map(len, answer.steps)) < 500


def test_who_is_no_candidate_and_why() -> None:
    answer = explain(
        E1,
        endpoint("10.244.1.12", ready=False, terminating=True),
        endpoint("10.244.1.13", ready=False, serving=False, terminating=True),
        endpoint("10.244.1.14", ready=False, serving=False),
        replace(E2, zone_hints=("z2",)),
        service=replace(WEB, internal_policy=TrafficPolicy.LOCAL),
    )
    (told,) = [line for line in lines(answer, "worker") if line.startswith("no candidates")]
    for part in (
        "10.244.1.12:8080 (terminating, and others are ready)",
        "10.244.1.13:8080 (terminating, no longer serving)",
        "10.244.1.14:8080 (not ready)",
        "10.244.2.11:8080 (ready, on n2, hinted to z2)",
    ):
        assert part in told


def test_affinity_is_told() -> None:
    answer = explain(E1, E2, service=replace(WEB, affinity_timeout_s=600))
    assert "within the last 600 s" in "\n".join(lines(answer, "worker"))
    assert "by a hash of the client's address" in lines(answer, "without a worker")[0]


def test_overlay_leaves_the_rest_to_kube_proxy() -> None:
    steered = replace(WEB, labels={"nfqproxy.io/steer": "true"})
    answer = explain(E1, service=steered, is_overlay=True)
    assert answer.verdict is Verdict.BACKEND
    assert "kube-proxy's rules translate it" in lines(answer, "without a worker")[0]
    for other in (
        explain(E1, is_overlay=True),
        explain(service=steered, is_overlay=True),
        explain(E1, to="10.96.0.10:81/tcp", service=steered, is_overlay=True),
    ):
        assert (other.verdict, other.frontend) == (Verdict.PASS, None)
        assert "kube-proxy" in other.reason
    local = replace(steered, external_policy=TrafficPolicy.LOCAL)
    dropped = explain(E2, source=CLIENT, to="203.0.113.9:80/tcp", service=local, is_overlay=True)
    assert dropped.verdict is Verdict.DROP
    assert "kube-proxy's rules drop it" in lines(dropped, "without a worker")[0]


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("203.0.113.9:81/tcp", "is an external address of default/web, which has no port 81/tcp"),
        ("192.0.2.1:30081/tcp", "192.0.2.1 is this node's, and no Service has 30081/tcp there"),
        ("127.0.0.1:30080/tcp", "localhostNodePorts does not serve node ports on 127.0.0.1"),
        ("8.8.8.8:80/tcp", "no Service has 8.8.8.8:80/tcp"),
        ("8.8.8.8/icmp", "no Service has 8.8.8.8/icmp"),
    ],
)
def test_why_a_packet_is_left_alone(to: str, why: str) -> None:
    answer = explain(E1, source="192.0.2.1", to=to)
    assert (answer.verdict, answer.frontend, answer.backends) == (Verdict.PASS, None, ())
    assert why in answer.reason


def test_a_node_port_on_an_address_that_has_none() -> None:
    answer = explain(E1, to="192.0.2.2:30080/tcp", addresses=("192.0.2.2",))
    assert answer.verdict is Verdict.PASS
    assert "nodePortAddresses does not serve node ports on 192.0.2.2" in answer.reason
    served = explain(
        E1,
        to="192.0.2.2:30080/tcp",
        addresses=("192.0.2.2",),
        node_port_networks=("192.0.2.0/24",),
    )
    assert served.verdict is Verdict.BACKEND


@pytest.mark.parametrize(
    ("source", "to"),
    [("127.0.0.1%eth0", "10.96.0.10:80/tcp"), ("::1%eth0", "[fd00:10:96::10]:80/tcp")],
)
def test_a_loopback_source_from_the_wire_is_dropped(source: str, to: str) -> None:
    answer = explain(E1, source=source, to=to)
    assert (answer.verdict, answer.frontend) == (Verdict.DROP, None)
    assert "loopback" in answer.reason


def test_an_unknown_balancer_is_named() -> None:
    strange = replace(WEB, annotations={"nfqproxy.io/balancer": "fortune-teller"})
    with pytest.raises(InputError, match=r"Service default/web: unknown balancer 'fortune-teller'"):
        explain(E1, service=strange)


def test_every_reason_is_one_sentence_without_line_breaks() -> None:
    for answer in (explain(E1), explain(), explain(E1, to="10.96.0.10:7/tcp")):
        assert re.search(r"\n|\.$", answer.reason) is None
        assert all(re.match(r"[a-zA-Z ]+: \S", step) for step in answer.steps)


MARKING = {"marks": MarkMask()}


def test_by_marks_the_way_is_told_in_the_order_of_its_hooks() -> None:
    answer = explain(E1, E2, source=CLIENT, **MARKING)
    assert hooks(answer) == [
        "conntrack PREROUTING",
        "mangle PREROUTING",
        "worker",
        "nat PREROUTING",
        "filter PREROUTING",
        "routing",
        "filter FORWARD",
        "nat POSTROUTING",
        "filter POSTROUTING",
        "reply conntrack PREROUTING",
        "reply mangle PREROUTING",
        "reply nat",
        "without a worker",
    ]
    assert lines(answer, "nat PREROUTING")[0].startswith(
        "nft ip nfqproxy marks-prerouting finds the number . tcp . 10.96.0.10 . 80 in marked-backends"
    )
    assert "number in the bits 0xf7f of its mark" in lines(answer, "worker")[-1]
    assert lines(answer, "nat POSTROUTING")[0].startswith(
        "nft ip nfqproxy marks-postrouting: 0x2000 is set -> masquerade"
    )
    assert not any(hook.startswith("raw") or "reply raw" in hook for hook in hooks(answer))
    # The answer itself does not depend on the data path.
    other = explain(E1, E2, source=CLIENT)
    assert replace(answer, steps=()) == replace(other, steps=())
    assert sum("[UNREPLIED]" in step for step in answer.steps) == 2


def test_by_marks_a_source_is_kept_by_a_bit_and_our_bits_end_where_the_packet_does() -> None:
    pod = explain(E1, source=POD, to="10.96.0.10:53/udp", **MARKING)
    assert "0x1000 is set -> the source stays 10.244.1.9" in "\n".join(pod.steps)
    local = explain(endpoint("192.0.2.1"), source=CLIENT, to="192.0.2.1:30080/tcp", **MARKING)
    assert (
        "filter INPUT: nft ip nfqproxy unmark-input takes our last bit off the mark" in local.steps
    )
    node = explain(E2, source="192.0.2.1", **MARKING)
    assert "nft ip nfqproxy marks-output finds" in lines(node, "nat OUTPUT")[0]


def test_by_marks_what_is_refused_was_new_to_conntrack_first() -> None:
    for answer in (explain(**MARKING), explain(E1, to="10.96.0.10:81/tcp", **MARKING)):
        assert answer.verdict is Verdict.REJECT
        assert hooks(answer)[:2] == ["conntrack PREROUTING", "mangle PREROUTING"]
        assert len(lines(answer, "conntrack PREROUTING")) == 1
        assert "nfqproxy-frontends-4 -> not queued" in lines(answer, "mangle PREROUTING")[0]
