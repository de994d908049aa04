"""The address plan of labs and tests, one place for all of it.

=====================  ====================  =========================
who                    IPv4                  IPv6
=====================  ====================  =========================
uplink network         192.0.2.0/24          2001:db8:2::/64
node 1, 2, ...         192.0.2.1, .2         2001:db8:2::1, ::2
clients                192.0.2.10, .11, ...  2001:db8:2::10, ::11, ...
default gateway        192.0.2.254           2001:db8:2::254
pods of node N         10.244.N.11, .12,...  fd00:10:244:N::11, ::12...
Services               10.96.0.0/16          fd00:10:96::/112
load balancer          198.51.100.0/24       2001:db8:51::/64
external               203.0.113.0/24
=====================  ====================  =========================
"""

from typing import Final

UPLINK4: Final = "192.0.2.0/24"
UPLINK6: Final = "2001:db8:2::/64"
ROUTER4: Final = "192.0.2.254"
ROUTER6: Final = "2001:db8:2::254"
PODS4: Final = "10.244.0.0/16"
PODS6: Final = "fd00:10:244::/56"
SERVICES4: Final = "10.96.0.0/16"
SERVICES6: Final = "fd00:10:96::/112"
LOAD_BALANCERS4: Final = "198.51.100.0/24"
LOAD_BALANCERS6: Final = "2001:db8:51::/64"
EXTERNAL4: Final = "203.0.113.0/24"
POD_GATEWAY4: Final = "169.254.1.1"
"""Next hop of every pod; the node's end of the veth answers ARP for it by proxy, as in Calico."""
POD_GATEWAY6: Final = "fe80::1"
POD_GATEWAY_MAC: Final = "ee:ee:ee:ee:ee:ee"

MAX_NODES: Final = 9
MAX_CLIENTS: Final = 200
MAX_PODS: Final = 200


def node4(number: int) -> str:
    """Primary IPv4 address of node ``number`` (1..9)."""
    return f"192.0.2.{number}"


def node6(number: int) -> str:
    """Primary IPv6 address of node ``number``."""
    return f"2001:db8:2::{number}"


def client4(index: int) -> str:
    """IPv4 address of client ``index`` (from 0)."""
    return f"192.0.2.{10 + index}"


def client6(index: int) -> str:
    """IPv6 address of client ``index``; the same digits as the IPv4 one."""
    return f"2001:db8:2::{10 + index}"


def pod4(node: int, index: int) -> str:
    """IPv4 address of pod ``index`` (from 0) on a node."""
    return f"10.244.{node}.{11 + index}"


def pod6(node: int, index: int) -> str:
    """IPv6 address of pod ``index`` on a node; the same digits as the IPv4 one."""
    return f"fd00:10:244:{node}::{11 + index}"


def node_pods4(node: int) -> str:
    """Pod CIDR of a node."""
    return f"10.244.{node}.0/24"


def node_pods6(node: int) -> str:
    """IPv6 pod CIDR of a node."""
    return f"fd00:10:244:{node}::/64"


def service4(number: int) -> str:
    """Cluster IP of a lab's Service ``number`` (1..254)."""
    return f"10.96.0.{number}"


def service6(number: int) -> str:
    """IPv6 cluster IP of a Service; the same digits as the IPv4 one."""
    return f"fd00:10:96::{number}"


def load_balancer4(number: int) -> str:
    """The load balancer's address of a lab's Service ``number``."""
    return f"198.51.100.{number}"


def load_balancer6(number: int) -> str:
    """The load balancer's IPv6 address of a Service; the same digits as the IPv4 one."""
    return f"2001:db8:51::{number}"
