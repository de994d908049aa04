"""Who else is here: readers of queues, rules in the iptables back ends, kube-proxy. Read only."""

import os
from pathlib import Path

from msgspec import Struct

from nfqproxy.api import admin
from nfqproxy.doctor.check import Finding, fail, ok, unknown, warn
from nfqproxy.errors import NfqproxyError
from nfqproxy.kernel import commands, iptables
from nfqproxy.kernel.counters import QueueStatistics, queue_statistics
from nfqproxy.kernel.mark_users import conflict, free_mask, mark_users
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleMode, RuleSettings
from nfqproxy.model import MarkMask

__all__ = ["iptables_mixture", "kube_proxy", "packet_marks", "queue_numbers"]

_NOT_ROOT = (
    "not looked at: reading the rules needs root",
    "rules of other programs may be in the way",
    "run it as root: sudo nfqproxy doctor",
)


def queue_numbers(settings: RuleSettings) -> Finding:
    """Whether the proxy's queue numbers are free, and who else reads queues."""
    wanted = range(settings.first_queue, settings.first_queue + settings.queue_count)
    name = f"queue {wanted[0]}" if len(wanted) == 1 else f"queues {wanted[0]} to {wanted[-1]}"
    queues = queue_statistics()
    taken = [number for number in wanted if number in queues]
    others = [number for number in queues if number not in wanted]
    also = f"; other programs read {', '.join(map(str, others))}" if others else ""
    if not taken:
        return ok(f"{name} {'is' if len(wanted) == 1 else 'are'} free{also}")
    own_pid, own_queues = _running_proxy()
    if set(taken) <= own_queues:
        return ok(f"{name}: read by the nfqproxy that runs here, process {own_pid}{also}")
    who = ", ".join(f"{number} by {_reader(queues[number])}" for number in taken)
    free = next(
        (
            first
            for first in range(100, 65536 - len(wanted))
            if not any(number in queues for number in range(first, first + len(wanted)))
        ),
        0,
    )
    return fail(
        f"taken: queue {who}{also}",
        "nfqproxy run refuses to start with this number",
        f"stop that program, or choose other numbers: nfqproxy run --queue {free}",
    )


def _running_proxy() -> tuple[int, set[int]]:
    """Process id and queues of the proxy of this namespace; nothing when none answers."""
    try:
        status = admin.ask("status")
    except NfqproxyError:
        return 0, set()
    return status["pid"], {worker["queue"] for worker in status["workers"]}


def _reader(queue: QueueStatistics) -> str:
    # The kernel gives a program's first netlink socket its process id as port id, if that is free.
    try:
        name = Path(f"/proc/{queue.port_id}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return f"netlink port {queue.port_id}"
    return f"netlink port {queue.port_id} (most likely process {queue.port_id}, {name})"


class _Rules(Struct, frozen=True, kw_only=True):
    """What one iptables back end holds beside ours."""

    count: int = 0
    has_kube_proxy: bool = False


def _foreign_rules(backend: IptablesBackend) -> _Rules:
    count, has_kube_proxy = 0, False
    for _command, lines in iptables.listings(backend):
        count += sum(map(iptables.is_foreign, lines))
        # kubelet makes KUBE- chains of its own; this one is kube-proxy's.
        has_kube_proxy |= any(line.startswith(":KUBE-SERVICES ") for line in lines)
    return _Rules(count=count, has_kube_proxy=has_kube_proxy)


def _has_kube_proxy_table() -> bool:
    """Whether kube-proxy's mode nftables is here."""
    if commands.find("nft") is None:
        return False
    tables = commands.run(["nft", "list", "tables"]).splitlines()
    return any(line.split()[-1:] == ["kube-proxy"] for line in tables)


def iptables_mixture() -> Finding:
    """Rules in both of the kernel's iptables engines at once."""
    if os.geteuid() != 0:
        return unknown(*_NOT_ROOT)
    nft = _foreign_rules(IptablesBackend.NFT).count
    legacy = _foreign_rules(IptablesBackend.LEGACY).count
    if nft and legacy:
        return warn(
            f"{nft} rules in the nft back end and {legacy} in the legacy back end",
            "both sets are in force and see every packet; each iptables command shows one of them"
            " only, so that a drop or NAT rule in the other is easily overlooked",
            "bring all programs to one back end (update-alternatives --config iptables), and flush"
            " the other",
        )
    if nft or legacy:
        return ok(
            f"{nft or legacy} rules of other programs, all in the {'nft' if nft else 'legacy'} back end"
        )
    return ok("no rules of other programs")


def kube_proxy(settings: RuleSettings) -> Finding:
    """kube-proxy's rules against the mode that is wanted."""
    if os.geteuid() != 0:
        return unknown(*_NOT_ROOT)
    is_here = _has_kube_proxy_table() or any(
        _foreign_rules(backend).has_kube_proxy
        for backend in (IptablesBackend.NFT, IptablesBackend.LEGACY)
    )
    if is_here and settings.mode is RuleMode.REPLACE:
        return warn(
            "its rules are here (chain KUBE-SERVICES or nft table kube-proxy)",
            "in mode replace two proxies program the same Services; nfqproxy's choice wins while a"
            " worker runs, kube-proxy's otherwise",
            "use nfqproxy run --mode overlay, or stop kube-proxy and run kube-proxy --cleanup",
        )
    if not is_here and settings.mode is RuleMode.OVERLAY:
        return warn(
            "its rules are not here (neither chain KUBE-SERVICES nor nft table kube-proxy)",
            "in mode overlay nobody serves a connection that no worker decides",
            "start kube-proxy, or use nfqproxy run --mode replace",
        )
    return ok(
        "its rules are here, as mode overlay wants it" if is_here else "its rules are not here"
    )


def packet_marks(mask: MarkMask) -> Finding:
    """Whether others use the bits of packet marks that the data path ``mark`` wants for itself."""
    if os.geteuid() != 0:
        return unknown(*_NOT_ROOT)
    users = mark_users()
    found = conflict(users, mask)
    if found is None:
        others = f"; {len(users)} rules of others are about other bits" if users else ""
        return ok(f"the bits of {mask.mask:#x} are ours alone{others}")
    free = free_mask(users)
    choose = f"nfqproxy run --mark-mask {free.mask:#x}" if free else "--data-path ctnetlink"
    return warn(
        f"bits of {mask.mask:#x} are used in {found.where}: {found.rule}",
        "on first packets of connections to Services, that rule and nfqproxy may take each other's bits"
        " for their own",
        f"choose bits that nobody uses, {choose}, or change that rule",
    )
