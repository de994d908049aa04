"""Putting the bootstrap rules on the node and taking them off again.

Order of ``apply``: sets, iptables of each family, nft, and, if 127.0.0.1 is to be served, a sysctl.
Each step is one atomic restore or transaction per table; when one fails, those before it are taken
back, so that either the whole rule set stands or what stood before. Sets and maps keep their elements
over a repeated ``apply``: a restart never empties the fallback.
"""

import re
import time
from collections.abc import Iterable, Mapping

from nfqproxy.errors import KernelError, NfqproxyError
from nfqproxy.kernel import commands, iptables, nft, route_localnet
from nfqproxy.kernel.iptables import OwnRules
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
from nfqproxy.kernel.rule_text import (
    FIRST_CHAINS,
    NFT_TABLE,
    create_set,
    hooks,
    iptables_text,
    nft_text,
    optional_objects,
    set_kinds,
)
from nfqproxy.model import Family

__all__ = ["NFT_TABLE", "SET_PREFIX", "apply", "cleanup"]

SET_PREFIX = "nfqproxy-"

_BUSY_TRIES = 40
_BUSY_PAUSE_S = 0.05
"""The kernel frees deleted nft rules later, in a work queue; until then a set counts as in use."""

_BACKENDS = (IptablesBackend.NFT, IptablesBackend.LEGACY)


def apply(settings: RuleSettings) -> IptablesBackend:
    """Put the rules of ``settings`` on the node; return the iptables back end they went to.

    Applying twice is applying once. Rules that an earlier version or other settings left (the other
    back end, a family now off, chains of other names) are taken out. On failure raises KernelError
    or HostError, and the node is as it was.
    """
    backend = iptables.choose_backend(settings.iptables)
    other = _BACKENDS[1 - _BACKENDS.index(backend)]
    listing = nft.list_chains()
    before = {family: iptables.read_own(family, backend, listing) for family in Family}
    sets_before = _our_sets()
    touched: list[Family] = []
    tables_before = _our_tables(listing)
    was_marked = _is_marked(tables_before)
    marks = _localnet_marks(settings, was_marked=was_marked)
    try:
        _apply_sets(settings)
        texts = {
            family: _iptables_text(family, settings, backend, before[family], listing)
            for family in settings.families
        }
        for family, text in texts.items():
            iptables.restore(family, backend, text, only_check=True)
        for family, text in texts.items():
            touched.append(family)
            iptables.restore(family, backend, text)
        if was_marked and not marks:
            route_localnet.turn(on=False)
        _apply_nft(settings, tables_before, marks)
    except NfqproxyError:
        if was_marked:
            route_localnet.turn(on=True)
        for family in touched:
            _put_back(family, backend, before[family])
        for name in _our_sets() - sets_before:
            _destroy_set(name)
        raise
    for family in Family:
        if family not in settings.families:
            _remove_iptables(family, backend)
        elif backend is IptablesBackend.NFT:
            used = {table for table, _ in hooks(settings)}
            iptables.drop_made(
                family, {t: own for t, own in before[family].items() if t not in used}
            )
        _remove_iptables(family, other)
    for name in _our_sets() - {
        f"{SET_PREFIX}{kind}-{int(family)}"
        for kind in set_kinds(settings)
        for family in settings.families
    }:
        # Of another data path; its rules are gone.
        _destroy_set(name)
    if settings.guards_localhost and not route_localnet.is_on():
        # Last: the rules that guard 127.0.0.0/8 stand.
        route_localnet.turn(on=True)
    return backend


def _is_marked(tables: Mapping[str, set[str]]) -> bool:
    """True when it was us who turned route_localnet on."""
    return any(route_localnet.MARK_CHAIN in chains for chains in tables.values())


def _localnet_marks(settings: RuleSettings, *, was_marked: bool) -> tuple[str, ...]:
    """Chains that note that route_localnet is ours to turn off again."""
    if not settings.guards_localhost:
        return ()
    if not route_localnet.is_on():
        route_localnet.check_writable()
        return (route_localnet.MARK_CHAIN,)
    return (route_localnet.MARK_CHAIN,) if was_marked else ()


def _iptables_text(
    family: Family,
    settings: RuleSettings,
    backend: IptablesBackend,
    own: dict[str, OwnRules],
    listing: nft.Listing,
) -> str:
    comments = {}
    if backend is IptablesBackend.NFT:
        comments = iptables.made_here(family, hooks(settings), listing)
        for table, chain in hooks(settings):
            mark = own.get(table, OwnRules()).made(chain)
            if mark:
                comments[table, chain] = mark
    # Chains that the text declares are emptied by that; only others must be deleted.
    declared = _declared(iptables_text(family, settings))
    before = {table: rules.removal(keep=declared.get(table, ())) for table, rules in own.items()}
    stray = {table: before[table] for table in before if table not in declared}
    return iptables.restore_text(stray) + iptables_text(
        family, settings, comments=comments, before=before
    )


def _declared(text: str) -> dict[str, list[str]]:
    """Return the chains that a restore text declares, by table."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = found[line[1:]] = []
        elif line.startswith(":"):
            chains.append(line[1:].split()[0])
    return found


def _put_back(family: Family, backend: IptablesBackend, before: dict[str, OwnRules]) -> None:
    """Undo a restore that may have been committed in part."""
    now = iptables.read_own(family, backend)
    lines = {}
    for table in {*now, *before}:
        then = before.get(table, OwnRules())
        # Chains that stay are refilled in place, so that even their order is as it was.
        removal = now.get(table, OwnRules()).removal(keep=then.chains)
        lines[table] = removal + then.restoration(first=FIRST_CHAINS)
    iptables.restore(family, backend, iptables.restore_text(lines))
    if backend is IptablesBackend.NFT:
        iptables.drop_made(family, {t: own for t, own in now.items() if t not in before})


def _apply_sets(settings: RuleSettings) -> None:
    """Make the sets. One that exists with other parameters is exchanged for an empty new one."""
    lines = {
        (family, kind): create_set(kind, family, settings) + "\n"
        for family in settings.families
        for kind in set_kinds(settings)
    }
    try:
        commands.run(["ipset", "-exist", "restore"], "".join(lines.values()))
    except KernelError:
        for (family, kind), line in lines.items():
            _apply_set(family, kind, line, settings)


def _apply_set(family: Family, kind: str, line: str, settings: RuleSettings) -> None:
    try:
        commands.run(["ipset", "-exist", "restore"], line)
    except KernelError:
        name = f"{SET_PREFIX}{kind}-{int(family)}"
        if name not in _our_sets():
            raise
        fresh = f"{SET_PREFIX}next-{int(family)}"
        commands.run(
            ["ipset", "restore"],
            f"{create_set(kind, family, settings, name=fresh)}\n"
            f"swap {fresh} {name}\ndestroy {fresh}\n",
        )


def _apply_nft(
    settings: RuleSettings, existing: Mapping[str, set[str]], marks: Iterable[str]
) -> None:
    """Load our tables in one transaction, keeping the elements of those that have the same shape.

    A table that another mode or version made is replaced as a whole; its elements return with the
    next full sync. What serves 127.0.0.1, and what the data path ``mark`` needs, comes and goes by itself.
    """
    texts = {_nft_name(family): nft_text(family, settings) for family in settings.families}
    four = _nft_name(Family.IPV4)
    for mark in marks:
        texts[four] += f"table {four} {{\n\tchain {mark} {{ }}\n}}\n"
    optional = optional_objects()
    before = ""
    for name, chains in existing.items():
        stray = chains - set(_NFT_CHAIN.findall(texts.get(name, "")))
        if name not in texts or stray - {route_localnet.MARK_CHAIN}.union(*optional):
            before += _delete([name])
        elif stray:
            before += f"flush table {name}\n"
            before += "".join(f"delete chain {name} {chain}\n" for chain in sorted(stray))
            before += "".join(
                f"delete {kind} {name} {each}\n"
                for group in optional
                if stray & set(group)
                for each, kind in group.items()
                if kind != "chain"
            )
    text = "".join(texts.values())
    try:
        nft.run_transaction(before + text)
    except KernelError:
        # The same chains, but at other hooks, or maps of the same name and another type.
        if not existing:
            raise
        nft.run_transaction(_delete(existing) + text)


_NFT_CHAIN = re.compile(r"^\tchain (\S+) \{", re.MULTILINE)


def _delete(tables: Iterable[str]) -> str:
    return "".join(f"delete table {table}\n" for table in tables)


def _nft_name(family: Family) -> str:
    return f"{'ip' if family is Family.IPV4 else 'ip6'} {NFT_TABLE}"


def cleanup() -> list[str]:
    """Remove all that any version of nfqproxy made on this node; return what was removed.

    Works with what tools there are, touches nothing else, and finds nothing the second time.
    Entries of the connection tracking table stay: they serve established connections.
    """
    removed = []
    for backend in _BACKENDS:
        for family in Family:
            removed += _remove_iptables(family, backend)
    tables = _our_tables(nft.list_chains())
    if _is_marked(tables):
        # Before the rules that guard 127.0.0.0/8 go.
        route_localnet.turn(on=False)
        removed.append(f"sysctl {route_localnet.NAME} = 1 (0 again, as before)")
    nft.run_transaction(_delete(tables))
    removed += [f"nft table {table}" for table in tables]
    for name in sorted(_our_sets()):
        _destroy_set(name)
        removed.append(f"ipset {name}")
    return removed


def _remove_iptables(family: Family, backend: IptablesBackend) -> list[str]:
    own = iptables.read_own(family, backend)
    if not own:
        return []
    lines = {table: rules.removal() for table, rules in own.items()}
    iptables.restore(family, backend, iptables.restore_text(lines))
    word = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{backend.value}"
    removed = []
    for table, rules in own.items():
        removed += [f"{word} {table}: rule {jump}" for jump in rules.jumps]
        removed += [f"{word} {table}: chain {chain}" for chain in rules.chains]
    if backend is IptablesBackend.NFT:
        removed += iptables.drop_made(family, own)
    return removed


def _our_sets() -> set[str]:
    if commands.find("ipset") is None:
        return set()
    names = commands.run(["ipset", "list", "-name"]).split()
    return {name for name in names if name.startswith(SET_PREFIX)}


def _our_tables(listing: nft.Listing) -> dict[str, set[str]]:
    """Return "family name" of our nft tables with the names of their chains."""
    return {
        f"{family} {name}": set(chains)
        for (family, name), chains in listing.items()
        if name == NFT_TABLE or name.startswith(NFT_TABLE + "-")
    }


def _destroy_set(name: str) -> None:
    for attempt in range(1, _BUSY_TRIES + 1):
        try:
            commands.run(["ipset", "destroy", name])
            return
        except commands.CommandError as error:
            if "in use by a kernel component" not in error.stderr or attempt == _BUSY_TRIES:
                raise
        time.sleep(_BUSY_PAUSE_S)
