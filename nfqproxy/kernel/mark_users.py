"""Who else on this node reads or writes packet marks, and which bits. Read only.

Marks have 32 bits that all programs of a node share by agreement alone. A rule of others for bits of ours
takes our first packets for its own, and one that writes them makes us lose a decision.
"""

import json
import re
from collections.abc import Iterable, Iterator

from msgspec import Struct

from nfqproxy.kernel import commands, iptables, nft
from nfqproxy.kernel.rule_settings import IptablesBackend
from nfqproxy.kernel.rule_text import NFT_TABLE
from nfqproxy.model import DEFAULT_MARK_MASK, MarkMask

__all__ = [
    "MarkUser",
    "bits_of_iptables_rule",
    "bits_of_nft_rule",
    "conflict",
    "free_mask",
    "mark_users",
]

_ALL = 0xFFFFFFFF
_IPTABLES_TABLES = frozenset({"raw", "mangle", "nat", "filter", "security"})
_CONNMARK = re.compile(r"-m connmark (?:! )?--mark \S+|-j CONNMARK --(?:set|save)-\S+mark \S+")
# What iptables-save prints, whatever a person wrote: --set-xmark V/M, --mark V/M, --tproxy-mark V/M.
_IPTABLES_MARK = re.compile(
    r"--(?:set-xmark|set-mark|mark|tproxy-mark) 0x[0-9a-f]+(?:/(0x[0-9a-f]+))?"
    r"|--restore-mark(?: --nfmask (0x[0-9a-f]+))?"
)
_NFT_CHANGE = re.compile(
    r"meta mark set meta mark(?: & (0x[0-9a-f]+))?(?: [|^] (0x[0-9a-f]+))?(?= |$)"
)
_NFT_MASKED = re.compile(r"meta mark & (0x[0-9a-f]+)")


class MarkUser(Struct, frozen=True, kw_only=True):
    """A rule that looks at or writes bits of the packet mark."""

    where: str
    """Whose rule: a command and its table."""
    rule: str
    """As that command lists it."""
    bits: int


def bits_of_iptables_rule(rule: str) -> int:
    """The bits of the packet mark that a line of iptables-save is about; connection marks are not."""
    bits = 0
    for match in _IPTABLES_MARK.finditer(_CONNMARK.sub("", rule)):
        mask = match[1] or match[2]
        bits |= int(mask, 16) if mask else _ALL
    return bits


def bits_of_nft_rule(rule: str) -> int:
    """The same for a line of ``nft list table``."""
    bits = 0
    for match in _NFT_CHANGE.finditer(rule):
        kept, set_bits = (int(text, 16) if text else None for text in match.groups())
        bits |= (_ALL & ~kept if kept is not None else 0) | (set_bits or 0)
    rest = _NFT_CHANGE.sub("", rule)
    for match in _NFT_MASKED.finditer(rest):
        bits |= int(match[1], 16)
    # "meta mark 0x5", "meta mark set ct mark": the whole of it.
    return _ALL if "meta mark" in _NFT_MASKED.sub("", rest) else bits


def _in_iptables() -> Iterator[MarkUser]:
    for backend in (IptablesBackend.NFT, IptablesBackend.LEGACY):
        for command, lines in iptables.listings(backend):
            for line in filter(iptables.is_foreign, lines):
                bits = bits_of_iptables_rule(line)
                if bits:
                    yield MarkUser(where=command, rule=line, bits=bits)


def _in_nft() -> Iterator[MarkUser]:
    for family, name in nft.list_chains():
        if name.startswith(NFT_TABLE) or (family in ("ip", "ip6") and name in _IPTABLES_TABLES):
            continue
        for line in commands.run(["nft", "-t", "list", "table", family, name]).splitlines():
            bits = bits_of_nft_rule(line.strip())
            if bits:
                yield MarkUser(where=f"nft table {family} {name}", rule=line.strip(), bits=bits)


def _in_routing() -> Iterator[MarkUser]:
    if commands.find("ip") is None:
        return
    for option in ("-4", "-6"):
        for rule in json.loads(commands.run(["ip", option, "-j", "rule"]) or "[]"):
            if "fwmark" in rule:
                mask = rule.get("fwmask")
                text = f"fwmark {rule['fwmark']}" + (f"/{mask}" if mask else "")
                yield MarkUser(
                    where=f"ip {option} rule",
                    rule=f"{rule['priority']}: {text} lookup {rule.get('table', '?')}",
                    bits=int(mask, 16) if mask else _ALL,
                )


def mark_users() -> list[MarkUser]:
    """Every rule of other programs that is about packet marks. Raises what the tools say."""
    return [*_in_iptables(), *_in_nft(), *_in_routing()]


def conflict(users: Iterable[MarkUser], mask: MarkMask) -> MarkUser | None:
    """The first rule about bits of ``mask``; one about particular bits goes before one about all."""
    touching = [user for user in users if user.bits & mask.mask]
    return min(touching, key=lambda user: user.bits == _ALL, default=None)


def free_mask(users: Iterable[MarkUser]) -> MarkMask | None:
    """The bits that none of these rules is about, of the default mask where that is enough; else None."""
    # A rule about all bits leaves none: only particular ones can be kept off.
    taken = 0
    for user in users:
        taken |= user.bits if user.bits != _ALL else 0
    for candidates in (DEFAULT_MARK_MASK, _ALL):
        try:
            return MarkMask(candidates & ~taken)
        except ValueError:
            continue
    return None
