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

__all__ = [
    "Client",
    "Node",
    "Pod",
    "Topology",
    "TopologySpec",
    "build_topology",
    "set_up_pod",
    "topology",
]

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
        """Plan a network, or describe one that stands already: nothing is made before build()."""
        spec.check()
        self.spec = spec
        self.group = NamespaceGroup(prefix)
        client_names = [f"c{i + 1}" for i in range(spec.clients)]
        node_names = [f"n{i + 1}" for i in range(len(spec.pods))]
        pod_slots = [(n + 1, i) for n, count in enumerate(spec.pods) for i in range(count)]
        pod_names = [f"pod-{n}-{11 + i}" for n, i in pod_slots]
        self._short_names = ["lan", *client_names, *node_names, *pod_names]
        self.group.declare(self._short_names)
        self.clients = tuple(
            Client(
                name=name,
                namespace=self.group[name],
                address4=plan.client4(i),
                address6=plan.client6(i),
            )
            for i, name in enumerate(client_names)
        )
        self.nodes = tuple(
            Node(
                name=name,
                number=n + 1,
                namespace=self.group[name],
                address4=plan.node4(n + 1),
                address6=plan.node6(n + 1),
            )
            for n, name in enumerate(node_names)
        )
        self.pods = tuple(
            Pod(
                name=name,
                namespace=self.group[name],
                node=f"n{n}",
                address4=plan.pod4(n, i),
                address6=plan.pod6(n, i),
                host_device=f"pod{11 + i}",
            )
            for name, (n, i) in zip(pod_names, pod_slots, strict=True)
        )

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
        group = self.group
        group.create(self._short_names)
        # Before the devices exist, so that they inherit conf/default.
        self.router.sysctl(_HOST_SYSCTLS)
        for client in self.clients:
            client.namespace.sysctl(_HOST_SYSCTLS)
        for pod in self.pods:
            pod.namespace.sysctl(_HOST_SYSCTLS)
        for node in self.nodes:
            node.namespace.sysctl(NODE_SYSCTLS)
        uplinks = [client.name for client in self.clients] + [node.name for node in self.nodes]
        group.connect(
            [
                Veth(left=name, left_device=UPLINK_DEVICE, right="lan", right_device=name)
                for name in uplinks
            ]
            + [
                Veth(
                    left=pod.name,
                    left_device=UPLINK_DEVICE,
                    right=pod.node,
                    right_device=pod.host_device,
                    right_mac=plan.POD_GATEWAY_MAC,
                )
                for pod in self.pods
            ]
        )
        self._set_up_router(uplinks)
        for node in self.nodes:
            self._set_up_node(node)
        for client in self.clients:
            self._set_up_client(client)
        for pod in self.pods:
            set_up_pod(pod)

    def _set_up_router(self, ports: list[str]) -> None:
        self.router.ip(
            "link set lo up",
            "link add br0 type bridge mcast_snooping 0",
            *(f"link set {port} master br0 up" for port in ports),
            "link set br0 up",
            f"addr add {plan.ROUTER4}/24 dev br0",
            f"addr add {plan.ROUTER6}/64 dev br0 nodad",
            # Whoever talks to the router from a pod gets an answer.
            *self._routes_to_pods(but=0),
        )

    def _set_up_node(self, node: Node) -> None:
        lines = [
            "link set lo up",
            f"link set {UPLINK_DEVICE} up",
            f"addr add {node.address4}/24 dev {UPLINK_DEVICE}",
            f"addr add {node.address6}/64 dev {UPLINK_DEVICE} nodad",
            # A Service address must be routable, or a local connect fails before OUTPUT.
            f"route add default via {plan.ROUTER4}",
            f"route add ::/0 via {plan.ROUTER6}",
            *self._routes_to_pods(but=node.number),
        ]
        settings: dict[str, str | int] = {}
        for pod in self.pods_of(node.name):
            device = pod.host_device
            lines += [
                f"link set {device} up",
                f"addr add {plan.POD_GATEWAY6}/64 dev {device} nodad",
                f"route add {pod.address4}/32 dev {device} scope link",
                f"route add {pod.address6}/128 dev {device}",
            ]
            settings[f"net/ipv4/conf/{device}/proxy_arp"] = 1
            # The default delays a proxied answer by up to 0.8 s.
            settings[f"net/ipv4/neigh/{device}/proxy_delay"] = 0
        node.namespace.ip(*lines)
        node.namespace.sysctl(settings)

    def _set_up_client(self, client: Client) -> None:
        client.namespace.ip(
            "link set lo up",
            f"link set {UPLINK_DEVICE} up",
            f"addr add {client.address4}/24 dev {UPLINK_DEVICE}",
            f"addr add {client.address6}/64 dev {UPLINK_DEVICE} nodad",
            f"route add default via {plan.node4(1)}",
            f"route add ::/0 via {plan.node6(1)}",
            *self._routes_to_pods(but=0),
        )

    def _routes_to_pods(self, *, but: int) -> list[str]:
        lines = []
        for node in self.nodes:
            if node.number != but:
                lines.append(f"route add {plan.node_pods4(node.number)} via {node.address4}")
                lines.append(f"route add {plan.node_pods6(node.number)} via {node.address6}")
        return lines

    def close(self) -> None:
        """End the processes started in it and remove its namespaces. Idempotent."""
        self.group.close()


def set_up_pod(pod: Pod) -> None:
    """Give the pod's end of its veth its addresses, and the routes to its node."""
    pod.namespace.ip(
        "link set lo up",
        f"link set {UPLINK_DEVICE} up",
        f"addr add {pod.address4}/32 dev {UPLINK_DEVICE}",
        f"addr add {pod.address6}/128 dev {UPLINK_DEVICE} nodad",
        f"route add {plan.POD_GATEWAY4} dev {UPLINK_DEVICE} scope link",
        f"route add default via {plan.POD_GATEWAY4}",
        f"route add ::/0 via {plan.POD_GATEWAY6} dev {UPLINK_DEVICE}",
    )


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
