"""What the bootstrap rules depend on. Nothing here depends on the Services."""

from enum import StrEnum

from msgspec import Struct

from nfqproxy.control.node import INTERFACE_NAME
from nfqproxy.core.slots import MAX_SLOTS
from nfqproxy.errors import InputError
from nfqproxy.model import DEFAULT_MARK_MASK, DataPath, Family, MarkMask

__all__ = ["IptablesBackend", "RuleMode", "RuleSettings"]


class RuleMode(StrEnum):
    """Who serves a connection that no worker decides."""

    REPLACE = "replace"
    """Our own kernel fallback."""
    OVERLAY = "overlay"
    """kube-proxy, whose rules are on the node."""


class IptablesBackend(StrEnum):
    """Which of the kernel's two rule engines the iptables rules go to."""

    AUTO = "auto"
    """The one that holds other programs' rules, else the one the command ``iptables`` drives."""
    NFT = "nft"
    LEGACY = "legacy"


class RuleSettings(Struct, frozen=True, kw_only=True):
    """Settings of the bootstrap rules; a wrong one raises InputError naming it."""

    mode: RuleMode = RuleMode.REPLACE
    data_path: DataPath = DataPath.CTNETLINK
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    first_queue: int = 100
    """NFQUEUE number of the first worker, 0..65535; worker i reads ``first_queue + i``."""
    queue_count: int = 1
    """Number of workers, at least 1."""
    flow_timeout_s: int = 25
    """Life of a known UDP flow without packets, seconds; shorter than nf_conntrack_udp_timeout."""
    iptables: IptablesBackend = IptablesBackend.AUTO
    bridge_interface: str = ""
    """Detector BridgeInterface: who arrives by this interface is a pod; empty: not used."""
    interface_name_prefix: str = ""
    """Detector InterfaceNamePrefix: who arrives by an interface of such a name is a pod."""
    localhost_node_ports: bool = False
    """Serve node ports on 127.0.0.1: sets the sysctl route_localnet and guards 127.0.0.0/8."""

    slots: int = MAX_SLOTS
    """Slots of the fallback, all of which the plans may use; fewer do for seeing whether rules load."""

    mark_mask: int = DEFAULT_MARK_MASK
    """Data path ``mark``: the bits of a packet's mark that are ours."""

    @property
    def marks(self) -> MarkMask | None:
        """How marks are read; None where the data path needs none."""
        return MarkMask(self.mark_mask) if self.data_path is DataPath.MARK else None

    @property
    def guards_localhost(self) -> bool:
        """True when 127.0.0.1 is to be served, which is ours to do in mode ``replace`` alone."""
        return (
            self.localhost_node_ports
            and self.mode is RuleMode.REPLACE
            and Family.IPV4 in self.families
        )

    def __post_init__(self) -> None:
        if not self.families or len(set(self.families)) != len(self.families):
            raise InputError("families: name 4, 6 or both, each once")
        if self.queue_count < 1:
            raise InputError(f"queue_count: {self.queue_count} is not 1 or more")
        if not 0 <= self.first_queue <= 65536 - self.queue_count:
            raise InputError(
                f"first_queue: queues {self.first_queue}..{self.first_queue + self.queue_count - 1}"
                " do not fit into 0..65535"
            )
        if not 1 <= self.flow_timeout_s <= 2147483:
            raise InputError(f"flow_timeout_s: {self.flow_timeout_s} is not within 1..2147483")
        try:
            MarkMask(self.mark_mask)
        except ValueError as error:
            raise InputError(f"mark_mask: {error}") from None
        for field in ("bridge_interface", "interface_name_prefix"):
            name = getattr(self, field)
            if name and not INTERFACE_NAME.fullmatch(name):
                raise InputError(f'{field}: "{name}" is no name of an interface; see ip link')
