"""The network namespace as it is: room in conntrack, time-outs, forwarding, routes. Read only."""

import errno
import os
import socket
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path

from nfqproxy.doctor.check import Finding, fail, ok, warn

__all__ = [
    "DEFAULT_SERVICE_NETWORKS",
    "conntrack_room",
    "default_route_devices",
    "forwarding",
    "judge_room",
    "reverse_path_filter",
    "service_route",
    "udp_timeout",
]

DEFAULT_SERVICE_NETWORKS = ("10.96.0.0/12",)
"""kubeadm's default; asked about when nobody names another."""

_SYSCTL = Path("/proc/sys")
# Per thread, as /proc/sys/net is: a thread may have entered another namespace.
_NET = Path("/proc/thread-self/net")
_ROOM_PERCENT = 80
_STRICT = 1
_NO_ROUTE = (
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    # Routes of type prohibit and blackhole.
    errno.EACCES,
    errno.EINVAL,
    # The family is switched off, in the namespace or in the kernel.
    errno.EADDRNOTAVAIL,
    errno.EAFNOSUPPORT,
)
_GLOBAL_SCOPE = "00"


def _sysctl(name: str) -> int | None:
    """The value, None where this kernel has no such setting (or its module is not loaded)."""
    try:
        return int((_SYSCTL / name).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def conntrack_room() -> Finding:
    """How full this namespace's connection tracking table is."""
    count = _sysctl("net/netfilter/nf_conntrack_count")
    limit = _sysctl("net/netfilter/nf_conntrack_max")
    if count is None or limit is None:
        return ok("connection tracking is not loaded yet, so its table is empty")
    return judge_room(count, limit)


def judge_room(count: int, limit: int) -> Finding:
    """``count`` entries against ``limit``; 0 means no limit."""
    if limit == 0:
        return ok(f"{count:,} entries, no limit")
    found = f"{count:,} of {limit:,} entries ({count / limit:.0%})"
    if count * 100 <= limit * _ROOM_PERCENT:
        return ok(found)
    return warn(
        found,
        "when the table is full, new connections are lost, to Services and to everything else",
        f"sysctl -w net.netfilter.nf_conntrack_max={limit * 2} in the host's own network namespace"
        " (keep it in /etc/sysctl.d), or find who opens so many connections: conntrack -L",
    )


def udp_timeout(flow_timeout_s: int) -> Finding:
    """The life of a known UDP flow must be shorter than that of its conntrack entry."""
    kernel_s = _sysctl("net/netfilter/nf_conntrack_udp_timeout")
    if kernel_s is None:
        return ok("connection tracking is not loaded yet; its default of 30 s suits")
    if flow_timeout_s < kernel_s:
        return ok(
            f"nf_conntrack_udp_timeout is {kernel_s} s, longer than the flow set's {flow_timeout_s} s"
        )
    return fail(
        f"nf_conntrack_udp_timeout is {kernel_s} s, the flow set's time-out {flow_timeout_s} s",
        "nfqproxy run refuses to start: a datagram would skip the queue after its connection was"
        " forgotten",
        "sysctl -w net.netfilter.nf_conntrack_udp_timeout=30 (keep it in /etc/sysctl.d)",
    )


def _has_global_ipv6() -> bool:
    """Whether an interface has a global IPv6 address (if_inet6: fourth column is the scope)."""
    try:
        lines = (_NET / "if_inet6").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return False
    return any(line.split()[3] == _GLOBAL_SCOPE for line in lines)


def forwarding() -> Finding:
    """IP forwarding: what a node needs to serve anybody but itself."""
    needed = {"net/ipv4/ip_forward": _sysctl("net/ipv4/ip_forward")}
    if _has_global_ipv6():
        name = "net/ipv6/conf/all/forwarding"
        needed[name] = _sysctl(name)
    off = [name.replace("/", ".") for name, value in needed.items() if value == 0]
    if not off:
        return ok(f"on ({', '.join(name.replace('/', '.') for name in needed)})")
    return warn(
        f"off ({', '.join(off)})",
        "the node's own connections are served; those of pods and of other machines are not"
        " forwarded",
        f"sysctl -w {' '.join(f'{name}=1' for name in off)} (keep it in /etc/sysctl.d)",
    )


def default_route_devices() -> list[str]:
    """Devices of the IPv4 default routes of the main table, best first (/proc/net/route)."""
    found = []
    for line in (_NET / "route").read_text(encoding="ascii").splitlines()[1:]:
        columns = line.split()
        device, destination, metric, mask = columns[0], columns[1], columns[6], columns[7]
        if int(destination, 16) == 0 and int(mask, 16) == 0:
            found.append((int(metric), device))
    return [device for _metric, device in sorted(found)]


def reverse_path_filter() -> Finding:
    """rp_filter of the uplinks: the kernel uses the larger of ``all`` and the device's."""
    devices = list(dict.fromkeys(default_route_devices()))
    if not devices:
        return ok("no uplink (no IPv4 default route) that it could matter on")
    everywhere = _sysctl("net/ipv4/conf/all/rp_filter") or 0
    values = {
        device: max(everywhere, _sysctl(f"net/ipv4/conf/{device}/rp_filter") or 0)
        for device in devices
    }
    strict = [device for device, value in values.items() if value == _STRICT]
    words = {0: "off", 1: "strict", 2: "loose"}
    told = ", ".join(f"{words.get(value, value)} on {device}" for device, value in values.items())
    if not strict:
        return ok(told)
    settings = " ".join(f"net.ipv4.conf.{device}.rp_filter=2" for device in strict)
    return warn(
        told,
        "a packet that comes in by another device than its answer would leave by is dropped: on a"
        " node with several networks, connections to node ports hang",
        f"sysctl -w {settings} (loose; keep it in /etc/sysctl.d)",
    )


def service_route(networks: Sequence[str], *, are_named: bool) -> Finding:
    """Does the node have a route for Service addresses? Asked of the kernel; nothing is sent.

    ``are_named``: somebody said that these are the Service networks; otherwise they are a guess.
    """
    unreachable = []
    for network in networks:
        parsed = ip_network(network)
        address = str(parsed[1] if parsed.num_addresses > 1 else parsed[0])
        problem = _route_problem(address, parsed.version)
        if problem:
            unreachable.append(f"{address}: {problem}")
    if not unreachable:
        return ok(f"Service addresses are routable ({', '.join(networks)})")
    found = f"no route for Service addresses ({'; '.join(unreachable)})"
    effect = "the node's own connections to Services fail before any rule sees them"
    fix = f"add a default route, or one for the Services: ip route add {networks[0]} dev DEVICE"
    if are_named:
        return fail(found, effect, fix)
    return warn(found, effect, fix + "; name your Service network with --service-cidr")


def _route_problem(address: str, version: int) -> str:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # connect() of a datagram socket looks the route up and sends nothing.
            probe.connect((address, 9))
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return os.strerror(error.errno)
        raise
    return ""
