"""The bootstrap rules as text: templates of ``rules/`` with the settings put in.

What is printed by ``nfqproxy rules render`` is what is applied, except that ``apply`` also takes
out the jumps of an earlier run and notes in a jump's comment which table or chain it had to make.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from string import Template

from msgspec import Struct

from nfqproxy.core.fallback import MASQUERADE_CHAINS, VIEWS
from nfqproxy.errors import HostError
from nfqproxy.kernel.rule_settings import RuleMode, RuleSettings
from nfqproxy.model import Family, MarkMask

__all__ = [
    "FIRST_CHAINS",
    "NFT_TABLE",
    "PLAIN_COMMENT",
    "RenderedRules",
    "create_set",
    "hooks",
    "iptables_text",
    "nft_text",
    "optional_objects",
    "render",
    "set_kinds",
]

_BUILTIN_CHAINS = ("PREROUTING", "OUTPUT")
"""Those that get a jump of ours, in each table that holds rules of ours."""

FIRST_CHAINS = frozenset({"NFQPROXY-FLOWS"})
"""Chains of ours whose jumps stand before other rules; the other jumps stand behind them."""

NFT_TABLE = "nfqproxy"
"""Name of our nft table in the families ip and ip6."""

PLAIN_COMMENT = "nfqproxy"
"""Comment of a jump in a chain that was there before."""

_NFT_OBJECT = re.compile(r"^\t(chain|counter|map) (\S+) \{", re.MULTILINE)

_OPTIONAL = ("localhost.nft", "marks.nft")
"""Templates that settings add to our nft table or leave out."""

_HASH_SEED = 0x6E667170
"""Fixed, so that a client keeps its slot in every chain and after rules are applied again ("nfqp")."""

_INET = {Family.IPV4: "inet", Family.IPV6: "inet6"}
_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_ADDR = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}


class RenderedRules(Struct, frozen=True, kw_only=True):
    """The texts, each for standard input of the tool it is named after."""

    ipset: str
    """For ``ipset restore``."""
    iptables: str
    """For ``iptables-restore --noflush``; empty when IPv4 is off."""
    ip6tables: str
    """For ``ip6tables-restore --noflush``; empty when IPv6 is off."""
    nft: str
    """For ``nft -f -``."""

    def sections(self) -> dict[str, str]:
        """Return the texts that are not empty by the command that reads them, in order."""
        texts = {
            "ipset -exist restore": self.ipset,
            "iptables-restore --noflush": self.iptables,
            "ip6tables-restore --noflush": self.ip6tables,
            "nft -f -": self.nft,
        }
        return {command: text for command, text in texts.items() if text}


@cache
def _template(name: str) -> Template:
    package = Path(__file__).resolve().parents[1]
    # An installed wheel carries the templates inside the package, a source tree beside it.
    for folder in (package / "rules", package.parent / "rules"):
        file = folder / name
        if file.is_file():
            return Template(file.read_text(encoding="utf-8"))
    raise HostError(f"template {name} is missing from {package / 'rules'}; reinstall nfqproxy")


def hooks(settings: RuleSettings) -> tuple[tuple[str, str], ...]:
    """Return (table, built-in chain) of every jump of ours."""
    tables = ("mangle",) if settings.marks else ("mangle", "raw")
    return tuple((table, chain) for table in tables for chain in _BUILTIN_CHAINS)


def set_kinds(settings: RuleSettings) -> tuple[str, ...]:
    """Return the kinds of ipset, one of each per family; marks need no flows, conntrack knows them."""
    return ("frontends",) if settings.marks else ("frontends", "flows")


def _lines(text: str) -> str:
    """Drop lines that a parameter left empty."""
    return "".join(line + "\n" for line in text.splitlines() if line.strip())


def create_set(kind: str, family: Family, settings: RuleSettings, *, name: str = "") -> str:
    """Return the ``create`` line of the set ``kind`` (frontends or flows), optionally renamed."""
    text = _template("sets.ipset").substitute(
        f=int(family), inet=_INET[family], flow_timeout_s=settings.flow_timeout_s
    )
    own = f"nfqproxy-{kind}-{int(family)}"
    (line,) = (line for line in text.splitlines() if line.startswith(f"create {own} "))
    return line.replace(own, name or own, 1)


def iptables_text(
    family: Family,
    settings: RuleSettings,
    *,
    comments: Mapping[tuple[str, str], str] | None = None,
    before: Mapping[str, Iterable[str]] | None = None,
) -> str:
    """Return the text for ``iptables-restore --noflush`` of one family.

    ``comments`` gives the comment of the jump of (table, built-in chain), ``before`` the lines to
    run ahead of the jumps in each table.
    """
    first, last = settings.first_queue, settings.first_queue + settings.queue_count - 1
    comment = dict.fromkeys(hooks(settings), PLAIN_COMMENT) | dict(comments or {})
    ahead = dict(before or {})
    marks = settings.marks
    return _lines(
        _template("queue-mark.iptables" if marks else "queue.iptables").substitute(
            {f"{table}_{chain.lower()}": text for (table, chain), text in comment.items()},
            keep=f"{marks.keep:#x}" if marks else "",
            f=int(family),
            queue=f"--queue-num {first}" if first == last else f"--queue-balance {first}:{last}",
            mangle_unhook="\n".join(ahead.get("mangle", ())),
            raw_unhook="\n".join(ahead.get("raw", ())),
        )
    )


def _backend_map(view: str, slot: int, family: Family) -> str:
    match = f"inet_proto . {_ADDR[family]} . inet_service"
    target = f"{_ADDR[family]} . inet_service"
    return f"\tmap {view}backends-{slot} {{\n\t\ttype {match} : {target}\n\t}}\n"


def _chain(name: str, *rules: str) -> str:
    body = "".join(f"\t\t{rule}\n" for rule in rules)
    return f"\tchain {name} {{\n{body}\t}}\n"


def _slot_chain(view: str, slot: int, family: Family) -> str:
    ip = _IP[family]
    key = f"meta l4proto . {ip} daddr . th dport"
    return _chain(f"{view}slot-{slot}", f"dnat {ip} to {key} map @{view}backends-{slot}")


def _pick_chains(view: str, family: Family, slots: int) -> Iterable[str]:
    # Each with a map of its own: older kernels walk all of a map for every element that leads to it.
    for count in range(1, slots + 1):
        draw = ", ".join(f"{slot} : goto {view}slot-{slot}" for slot in range(count))
        yield _chain(f"{view}pick-{count}", f"numgen random mod {count} vmap {{ {draw} }}")
        by_source = f"jhash {_IP[family]} saddr mod {count} seed {_HASH_SEED:#x}"
        yield _chain(f"{view}pick-by-source-{count}", f"{by_source} vmap {{ {draw} }}")


def _pods(family: Family, settings: RuleSettings) -> tuple[str, ...]:
    """Matches any of which tells a packet that comes from a pod (SEMANTICS 2.4)."""
    matches = [f"{_IP[family]} saddr @pod-cidrs"]
    if settings.bridge_interface:
        matches.append(f'iifname "{settings.bridge_interface}"')
    if settings.interface_name_prefix:
        matches.append(f'iifname "{settings.interface_name_prefix}*"')
    return tuple(matches)


def _masquerade_chain(
    name: str, classes: tuple[bool, bool, bool], family: Family, pods: Iterable[str]
) -> str:
    """One of eight: which client classes (SEMANTICS 2.4: pod, node, elsewhere) are masqueraded."""
    ip = _IP[family]
    pod, node, external = classes
    rules = [f"{ip} saddr . {ip} daddr @hairpin masquerade"]
    for match in pods:
        if pod:
            rules.append(f"{match} masquerade")
        else:
            rules.append(f"{match} {ip} daddr @non-pod-backends masquerade")
            rules.append(f"{match} return")
    if node != external:
        rules.append(f"fib saddr type local {'masquerade' if node else 'return'}")
    if external:
        rules.append("masquerade")
    return _chain(name, *rules)


def nft_text(family: Family, settings: RuleSettings) -> str:
    """Return the text for ``nft -f -`` of one family; it empties the table's rules, not its maps."""
    ip, addr = _IP[family], _ADDR[family]
    if settings.mode is RuleMode.OVERLAY:
        if settings.marks:
            empty = f"add table {ip} {NFT_TABLE}\nflush table {ip} {NFT_TABLE}\n"
            return empty + _marks_text(family, settings.marks)
        return _template("keepalive.nft").substitute(ip=ip, addr=addr)
    pods = _pods(family, settings)
    slots = [(view, slot) for view in VIEWS for slot in range(settings.slots)]
    text = _template("fallback.nft").substitute(
        ip=ip,
        addr=addr,
        backend_maps="\n".join(_backend_map(view, slot, family) for view, slot in slots),
        slot_chains="\n".join(_slot_chain(view, slot, family) for view, slot in slots),
        pick_chains="\n".join(
            text for view in VIEWS for text in _pick_chains(view, family, settings.slots)
        ),
        masquerade_chains="\n".join(
            _masquerade_chain(name, classes, family, pods)
            for classes, name in MASQUERADE_CHAINS.items()
        ),
        pods_to_class="\n".join(f"\t\t{match} goto class-pod" for match in pods),
    )
    text += _template("refusals.nft").substitute(
        ip=ip,
        addr=addr,
        icmp="icmp" if family is Family.IPV4 else "icmpv6",
        pods_return="\n".join(f"\t\t{match} return" for match in pods),
    )
    if family is Family.IPV4 and settings.guards_localhost:
        text += _template("localhost.nft").substitute()
    if settings.marks:
        text += _marks_text(family, settings.marks)
    return text


def _marks_text(family: Family, marks: MarkMask) -> str:
    every = 0xFFFFFFFF
    bits = {
        "flags": marks.masquerade | marks.keep,
        "masquerade": marks.masquerade,
        "keep": marks.keep,
        "numbers": marks.numbers,
        "not_numbers": every & ~marks.numbers,
        "others": every & ~marks.mask,
    }
    return _template("marks.nft").substitute(
        {name: f"{value:#x}" for name, value in bits.items()}, ip=_IP[family], addr=_ADDR[family]
    )


def optional_objects() -> list[dict[str, str]]:
    """Return what settings may add to our nft table, each group as name -> kind of object."""
    return [
        {name: kind for kind, name in _NFT_OBJECT.findall(_template(file).template)}
        for file in _OPTIONAL
    ]


def render(settings: RuleSettings) -> RenderedRules:
    """Return the bootstrap rules for a host that has none of ours yet."""
    on = settings.families
    return RenderedRules(
        ipset="".join(
            create_set(kind, family, settings) + "\n"
            for family in on
            for kind in set_kinds(settings)
        ),
        iptables=iptables_text(Family.IPV4, settings) if Family.IPV4 in on else "",
        ip6tables=iptables_text(Family.IPV6, settings) if Family.IPV6 in on else "",
        nft="".join(nft_text(family, settings) for family in on),
    )
