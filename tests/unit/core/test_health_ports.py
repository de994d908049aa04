"""Which health-check node ports there are and what they count."""

from nfqproxy.core.health_ports import HealthPort, health_ports
from nfqproxy.model import Endpoint, Family, NodeContext, Protocol, ServicePort, ServicePortName

NODE = NodeContext(node_name="n1", node_port_addresses=("192.0.2.1", "2001:db8:2::1"))


def service_port(
    *endpoints: Endpoint, name: str = "http", family: Family = Family.IPV4, health: int = 32000
) -> ServicePort:
    return ServicePort(
        name=ServicePortName("default", "web", name, Protocol.TCP, family),
        cluster_ip="10.96.0.10" if family is Family.IPV4 else "fd00:10:96::10",
        port=80,
        health_check_node_port=health,
        endpoints=endpoints,
    )


def endpoint(address: str, node: str = "n1", port: int = 8080, **fields: int) -> Endpoint:
    return Endpoint(address=address, port=port, node=node, **fields)


def test_ready_local_addresses_are_counted_once() -> None:
    http = service_port(
        endpoint("10.244.1.1"),
        endpoint("10.244.1.2", ready=False, serving=True, terminating=True),
        endpoint("10.244.1.3", ready=False, serving=False),
        endpoint("10.244.2.1", node="n2"),
        endpoint("10.244.1.5", weight=0),
    )
    https = service_port(
        endpoint("10.244.1.1", port=8443), endpoint("10.244.1.4", port=8443), name="https"
    )
    assert health_ports([https, http], NODE) == (
        HealthPort(
            namespace="default",
            service="web",
            family=Family.IPV4,
            port=32000,
            addresses=("192.0.2.1",),
            local_endpoints=2,
        ),
    )


def test_families_have_ports_and_counts_of_their_own() -> None:
    four = service_port(endpoint("10.244.1.1"))
    six = service_port(family=Family.IPV6)
    found = health_ports([six, four], NODE)
    assert [(p.family, p.addresses, p.local_endpoints) for p in found] == [
        (Family.IPV4, ("192.0.2.1",), 1),
        (Family.IPV6, ("2001:db8:2::1",), 0),
    ]


def test_without_node_port_addresses_all_are_listened_on() -> None:
    node = NodeContext(node_name="n1")
    found = health_ports([service_port(), service_port(family=Family.IPV6)], node)
    assert [port.addresses for port in found] == [("0.0.0.0",), ("::",)]


def test_a_service_without_the_port_has_none() -> None:
    assert health_ports([service_port(endpoint("10.244.1.1"), health=0)], NODE) == ()
