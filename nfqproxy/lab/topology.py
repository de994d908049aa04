"""A cluster's network in namespaces: clients, nodes, pods and the router of their segment.

::

    c1   c2          one namespace per client            192.0.2.10, .11
     |    |
    [ lan  bridge ]  192.0.2.254, the default gateway; answers nobody else's addresses
     |        |
    n1        n2     nodes: forwarding on, conntrack as on a Kubernetes node
    | | |     | |
    pods      pods   routed veths, pod address /32 and /128, no bridge on the node

Pods hang on the node as Calico does it: the pod's default route points to 169.254.1.1 (fe80::1),
for which the node's end of the veth answers; the node has one host route per pod and no address on
the veth. So a node-local client and a masqueraded one use the node's primary address, and a pod
reaches itself through a Service (hairpin) over its own veth.

Clients and nodes are on one link. A client sends everything, Service addresses included, to node 1
unless a more specific route says otherwise; pods of other nodes are routed by their own node.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from nfqproxy.errors import InputError
from nfqproxy.kernel.netns import Namespace, NamespaceGroup, Veth
from nfqproxy.lab import addresses as plan

__all__ = ["Client", "Node", "Pod", "Topology", "TopologySpec", "build_topology", "topology"]

UPLINK_DEVICE = "eth0"

_QUIET_IPV6 = {
    # No duplicate address detection: addresses are usable at once (the plan has no duplicates).
    "net/ipv6/conf/all/accept_dad": 0,
    "net/ipv6/conf/default/accept_dad": 0,
    "net/ipv6/conf/default/dad_transmits": 0,
    "net/ipv6/conf/default/accept_ra": 0,
}
_HOST_SYSCTLS = _QUIET_IPV6 | {
    "net/ipv4/conf/all/accept_redirects": 0,
    "net/ipv4/conf/default/accept_redirects": 0,
    "net/ipv6/conf/default/accept_redirects": 0,
}
NODE_SYSCTLS = _HOST_SYSCTLS | {
    "net/ipv4/ip_forward": 1,
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv6/conf/default/forwarding": 1,
    # Loose reverse-path filter, the default of Debian's systemd and of most clusters.
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 2,
    # Hairpin traffic leaves by the device it came from; that is no reason for a redirect.
    "net/ipv4/conf/all/send_redirects": 0,
    "net/ipv4/conf/default/send_redirects": 0,
    # What kube-proxy sets on a node (its conntrack.tcpEstablishedTimeout, tcpCloseWaitTimeout).
    "net/netfilter/nf_conntrack_tcp_timeout_established": 86400,
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait": 3600,
}
"""What a Kubernetes node has; all of these are per namespace."""


class TopologySpec(Struct, frozen=True, kw_only=True):
    """How much of the address plan to build."""

    clients: int = 1
    pods: tuple[int, ...] = (3,)
    """Number of pods on each node; its length is the number of nodes."""

    def check(self) -> None:
        """Raise InputError when it does not fit the address plan."""
        if not 1 <= len(self.pods) <= plan.MAX_NODES:
            raise InputError(f"a topology has 1 to {plan.MAX_NODES} nodes, not {len(self.pods)}")
        if not 0 <= self.clients <= plan.MAX_CLIENTS:
            raise InputError(f"a topology has 0 to {plan.MAX_CLIENTS} clients, not {self.clients}")
        if not all(0 <= count <= plan.MAX_PODS for count in self.pods):
            raise InputError(f"a node has 0 to {plan.MAX_PODS} pods, not {max(self.pods)}")


class Client(Struct, frozen=True, kw_only=True):
    """A host outside the cluster, on the nodes' link."""

    name: str
    namespace: Namespace
    address4: str
    address6: str


class Node(Struct, frozen=True, kw_only=True):
    """A cluster node: the namespace where a proxy runs."""

    name: str
    """``n1``, ``n2``, ...: also its Kubernetes node name."""
    number: int
    namespace: Namespace
    address4: str
    address6: str
    uplink: str = UPLINK_DEVICE


class Pod(Struct, frozen=True, kw_only=True):
    """A pod: server or client inside the cluster."""

    name: str
    """``pod-1-11``: node number and last part of the address."""
    namespace: Namespace
    node: str
    address4: str
    address6: str
    host_device: str
    """The node's end of its veth."""


class Topology:
    """A built network. Close it (or use :func:`topology`) to remove every trace."""

    def __init__(self, spec: TopologySpec, prefix: str | None = None) -> None:
        spec.check()
        self.spec = spec
        self.group = NamespaceGroup(prefix)
        self.clients: tuple[Client, ...] = ()
        self.nodes: tuple[Node, ...] = ()
        self.pods: tuple[Pod, ...] = ()

    @property
    def node(self) -> Node:
        """Node ``n1``, the only one in most tests."""
        return self.nodes[0]

    @property
    def client(self) -> Client:
        """The first client."""
        return self.clients[0]

    @property
    def router(self) -> Namespace:
        """The segment's bridge and default gateway."""
        return self.group["lan"]

    def pods_of(self, node: str) -> tuple[Pod, ...]:
        """The pods of one node, in address order."""
        return tuple(pod for pod in self.pods if pod.node == node)

    def build(self) -> None:
        """Make everything; on failure or interrupt the caller closes."""
        group, spec = self.group, self.spec
        client_names = [f"c{i + 1}" for i in range(spec.clients)]
        node_names = [f"n{i + 1}" for i in range(len(spec.pods))]
        pod_slots = [(n + 1, i) for n, count in enumerate(spec.pods) for i in range(count)]
        pod_names = [f"pod-{n}-{11 + i}" for n, i in pod_slots]
        group.create(["lan", *client_names, *node_names, *pod_names])
        # Before the devices exist, so that they inherit conf/default.
        group["lan"].sysctl(_HOST_SYSCTLS)
        for name in (*client_names, *pod_names):
            group[name].sysctl(_HOST_SYSCTLS)
        for name in node_names:
            group[name].sysctl(NODE_SYSCTLS)
        group.connect(
            [
                Veth(left=name, left_device=UPLINK_DEVICE, right="lan", right_device=name)
                for name in (*client_names, *node_names)
            ]
            + [
                Veth(
                    left=name,
                    left_device=UPLINK_DEVICE,
                    right=f"n{n}",
                    right_device=f"pod{11 + i}",
                    right_mac=plan.POD_GATEWAY_MAC,
                )
                for name, (n, i) in zip(pod_names, pod_slots, strict=True)
            ]
        )
        self._set_up_router([*client_names, *node_names])
        self.nodes = tuple(self._set_up_node(n + 1) for n in range(len(spec.pods)))
        self.clients = tuple(self._set_up_client(i) for i in range(spec.clients))
        self.pods = tuple(self._set_up_pod(n, i) for n, i in pod_slots)

    def _set_up_router(self, ports: list[str]) -> None:
        lines = ["link set lo up", "link add br0 type bridge mcast_snooping 0"]
        lines += [f"link set {port} master br0 up" for port in ports]
        lines += [
            "link set br0 up",
            f"addr add {plan.ROUTER4}/24 dev br0",
            f"addr add {plan.ROUTER6}/64 dev br0 nodad",
        ]
        # Whoever talks to the router from a pod gets an answer.
        lines += _routes_to_pods(len(self.spec.pods), but=0)
        self.router.ip(*lines)

    def _set_up_node(self, number: int) -> Node:
        namespace = self.group[f"n{number}"]
        address4, address6 = plan.node4(number), plan.node6(number)
        lines = [
            "link set lo up",
            f"link set {UPLINK_DEVICE} up",
            f"addr add {address4}/24 dev {UPLINK_DEVICE}",
            f"addr add {address6}/64 dev {UPLINK_DEVICE} nodad",
            # A Service address must be routable, or a local connect fails before OUTPUT.
            f"route add default via {plan.ROUTER4}",
            f"route add ::/0 via {plan.ROUTER6}",
        ]
        lines += _routes_to_pods(len(self.spec.pods), but=number)
        devices = []
        for i in range(self.spec.pods[number - 1]):
            device = f"pod{11 + i}"
            devices.append(device)
            lines += [
                f"link set {device} up",
                f"addr add {plan.POD_GATEWAY6}/64 dev {device} nodad",
                f"route add {plan.pod4(number, i)}/32 dev {device} scope link",
                f"route add {plan.pod6(number, i)}/128 dev {device}",
            ]
        namespace.ip(*lines)
        settings: dict[str, str | int] = {}
        for device in devices:
            settings[f"net/ipv4/conf/{device}/proxy_arp"] = 1
            # The default delays a proxied answer by up to 0.8 s.
            settings[f"net/ipv4/neigh/{device}/proxy_delay"] = 0
        namespace.sysctl(settings)
        return Node(
            name=f"n{number}",
            number=number,
            namespace=namespace,
            address4=address4,
            address6=address6,
        )

    def _set_up_client(self, index: int) -> Client:
        name = f"c{index + 1}"
        namespace = self.group[name]
        address4, address6 = plan.client4(index), plan.client6(index)
        namespace.ip(
            "link set lo up",
            f"link set {UPLINK_DEVICE} up",
            f"addr add {address4}/24 dev {UPLINK_DEVICE}",
            f"addr add {address6}/64 dev {UPLINK_DEVICE} nodad",
            f"route add default via {plan.node4(1)}",
            f"route add ::/0 via {plan.node6(1)}",
            *_routes_to_pods(len(self.spec.pods), but=0),
        )
        return Client(name=name, namespace=namespace, address4=address4, address6=address6)

    def _set_up_pod(self, node: int, index: int) -> Pod:
        name = f"pod-{node}-{11 + index}"
        namespace = self.group[name]
        address4, address6 = plan.pod4(node, index), plan.pod6(node, index)
        namespace.ip(
            "link set lo up",
            f"link set {UPLINK_DEVICE} up",
            f"addr add {address4}/32 dev {UPLINK_DEVICE}",
            f"addr add {address6}/128 dev {UPLINK_DEVICE} nodad",
            f"route add {plan.POD_GATEWAY4} dev {UPLINK_DEVICE} scope link",
            f"route add default via {plan.POD_GATEWAY4}",
            f"route add ::/0 via {plan.POD_GATEWAY6} dev {UPLINK_DEVICE}",
        )
        return Pod(
            name=name,
            namespace=namespace,
            node=f"n{node}",
            address4=address4,
            address6=address6,
            host_device=f"pod{11 + index}",
        )

    def close(self) -> None:
        """End the processes started in it and remove its namespaces. Idempotent."""
        self.group.close()


def _routes_to_pods(nodes: int, *, but: int) -> list[str]:
    lines = []
    for number in range(1, nodes + 1):
        if number != but:
            lines.append(f"route add {plan.node_pods4(number)} via {plan.node4(number)}")
            lines.append(f"route add {plan.node_pods6(number)} via {plan.node6(number)}")
    return lines


def build_topology(spec: TopologySpec, *, prefix: str | None = None) -> Topology:
    """Build and hand over; the caller closes it. Nothing is left behind when it fails."""
    built = Topology(spec, prefix)
    try:
        built.build()
    except BaseException:
        built.close()
        raise
    return built


@contextmanager
def topology(
    *, clients: int = 1, pods: tuple[int, ...] = (3,), prefix: str | None = None
) -> Iterator[Topology]:
    """Build a network for the length of a ``with`` block, however the block ends."""
    built = build_topology(TopologySpec(clients=clients, pods=pods), prefix=prefix)
    try:
        yield built
    finally:
        built.close()
