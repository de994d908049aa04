"""The capabilities of this process (capabilities(7)), and what to say when one is missing.

The proxy needs user id 0, because files of the kernel such as /proc/net/netfilter/nfnetlink_queue belong to
root, and two capabilities: NET_ADMIN for everything it does to the network, NET_RAW because iptables opens
a raw socket to read legacy tables and to find ipsets. Nothing else of root's power.
"""

import os
from enum import IntEnum
from pathlib import Path

from nfqproxy.errors import HostError

__all__ = ["Capability", "lacking", "require_network_rights"]


class Capability(IntEnum):
    """Bits of include/uapi/linux/capability.h."""

    NET_ADMIN = 12
    NET_RAW = 13
    SYS_ADMIN = 21


def lacking(*wanted: Capability) -> list[str]:
    """Those of ``wanted`` that this process does not have in effect, as CAP_... names."""
    bits = 0
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            bits = int(line.split()[1], 16)
    return [f"CAP_{capability.name}" for capability in wanted if not bits >> capability & 1]


def require_network_rights(doing: str) -> None:
    """Raise HostError unless this is root with CAP_NET_ADMIN; ``doing`` begins the sentence."""
    if os.geteuid() != 0:
        raise HostError(f"{doing} needs root; run as root (sudo nfqproxy ...)")
    if lacking(Capability.NET_ADMIN):
        raise HostError(
            f"{doing} needs CAP_NET_ADMIN, which this process lacks although it is root; in a container add"
            " NET_ADMIN to securityContext.capabilities, in a systemd unit to CapabilityBoundingSet"
        )
