"""Our chains in iptables: found in a listing, put in, taken out, put back.

Ours are the chains whose names begin with ``NFQPROXY-`` and the rules that jump to them. Nothing
else is ever changed, with one exception: the built-in chains and tables of the nft back end exist
only once somebody used them. Where we were the first, the comment of our jump says so, and when the
rules go the empty chain or table goes as well, so that the host is byte for byte what it was. (A
table of the legacy back end cannot be unregistered; it stays, empty.)
"""

import itertools
import json
import re
import shlex
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from nfqproxy.errors import KernelError
from nfqproxy.kernel import commands, nft
from nfqproxy.kernel.rule_settings import IptablesBackend
from nfqproxy.model import Family

__all__ = [
    "CHAIN_PREFIX",
    "MADE_CHAIN",
    "MADE_TABLE",
    "OwnRules",
    "builtin_chains",
    "choose_backend",
    "command",
    "drop_made",
    "is_foreign",
    "listings",
    "made_here",
    "parse_own",
    "read_own",
    "restore",
    "restore_text",
    "tables",
]

CHAIN_PREFIX = "NFQPROXY-"
MADE_CHAIN = "nfqproxy made this chain"
"""Comment of a jump in a built-in chain that did not exist before."""
MADE_TABLE = "nfqproxy made this table"
"""Comment of a jump in a table that did not exist before."""

_TABLES = ("raw", "mangle", "nat", "filter", "security")
_WORD = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
_NFT = {Family.IPV4: "ip", Family.IPV6: "ip6"}


class OwnRules(Struct, frozen=True, kw_only=True):
    """What one table holds of ours, as lines of a listing."""

    chains: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    """``-A NFQPROXY-...`` lines in order."""
    jumps: tuple[str, ...] = ()
    """``-A BUILTIN ... -j NFQPROXY-...`` lines in order."""

    def __bool__(self) -> bool:
        return bool(self.chains or self.jumps)

    def removal(self, keep: Container[str] = ()) -> list[str]:
        """Return the restore lines that take all of it out, except the chains ``keep``."""
        doomed = [chain for chain in self.chains if chain not in keep]
        return [
            *("-D" + jump.removeprefix("-A") for jump in self.jumps),
            *(f"-F {chain}" for chain in doomed),
            *(f"-X {chain}" for chain in doomed),
        ]

    def restoration(self, *, first: Container[str]) -> list[str]:
        """Return the restore lines that put it back.

        Jumps to the chains ``first`` go before the rules of others, the rest behind them.
        """
        ahead = [jump for jump in self.jumps if _own_target(jump) in first]
        return [
            *(f":{chain} - [0:0]" for chain in self.chains),
            *self.rules,
            *(re.sub(r"^-A (\S+)", r"-I \1 1", jump) for jump in reversed(ahead)),
            *(jump for jump in self.jumps if jump not in ahead),
        ]

    def made(self, chain: str) -> str | None:
        """Return MADE_TABLE or MADE_CHAIN when a jump in ``chain`` is marked so."""
        for jump in self.jumps:
            if jump.startswith(f"-A {chain} "):
                for mark in (MADE_TABLE, MADE_CHAIN):
                    if f'--comment "{mark}"' in jump:
                        return mark
        return None


def command(family: Family, backend: IptablesBackend, verb: str) -> str | None:
    """Return the installed command of a back end; ``verb`` is ``save``, ``restore`` or empty.

    Hosts that ship one back end only have the plain names, so those are tried as well.
    """
    word, suffix = _WORD[family], f"-{verb}" if verb else ""
    named = f"{word}-{backend.value}{suffix}"
    if commands.find(named):
        return named
    plain = f"{word}{suffix}"
    if commands.find(plain) and _backend_of(plain) is backend:
        return plain
    return None


def _backend_of(tool: str) -> IptablesBackend:
    nft = "nf_tables" in commands.run([tool, "--version"])
    return IptablesBackend.NFT if nft else IptablesBackend.LEGACY


def tables(
    family: Family, backend: IptablesBackend, listing: nft.Listing | None = None
) -> list[str]:
    """Return the tables that exist. Looking into one that does not would create it (legacy)."""
    if backend is IptablesBackend.LEGACY:
        names = "ip_tables_names" if family is Family.IPV4 else "ip6_tables_names"
        try:
            # Per thread: the thread may have entered another network namespace.
            known = Path("/proc/thread-self/net", names).read_text(encoding="ascii").split()
        except OSError:
            return []
        return [table for table in _TABLES if table in known]
    existing = builtin_chains(family, listing)
    return [table for table in _TABLES if table in existing]


def builtin_chains(family: Family, listing: nft.Listing | None = None) -> dict[str, dict[str, str]]:
    """Return table -> base chain -> policy of the nft back end."""
    return {
        table: {chain: policy for chain, policy in chains.items() if policy is not None}
        for (ip, table), chains in (nft.list_chains() if listing is None else listing).items()
        if ip == _NFT[family] and table in _TABLES
    }


def read_own(
    family: Family, backend: IptablesBackend, listing: nft.Listing | None = None
) -> dict[str, OwnRules]:
    """Return what the existing tables of a back end hold of ours; tables without are left out."""
    save = command(family, backend, "save")
    if save is None:
        return {}
    found = {}
    for table in tables(family, backend, listing):
        own = parse_own(commands.run([save, "-t", table]))
        if own:
            found[table] = own
    return found


def parse_own(listing: str) -> OwnRules:
    """Parse the output of ``iptables-save`` for one table."""
    chains, rules, jumps = [], [], []
    for line in listing.splitlines():
        if line.startswith(f":{CHAIN_PREFIX}"):
            chains.append(line[1:].split()[0])
        elif line.startswith(f"-A {CHAIN_PREFIX}"):
            rules.append(line)
        elif CHAIN_PREFIX in line and _own_target(line):
            jumps.append(line)
    return OwnRules(chains=tuple(chains), rules=tuple(rules), jumps=tuple(jumps))


def _own_target(line: str) -> str:
    """The chain of ours that a rule jumps to; empty: none."""
    # By words, quoting honoured: somebody's comment may well speak of our chains.
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    targets = (
        target
        for option, target in itertools.pairwise(words)
        if option in ("-j", "-g") and target.startswith(CHAIN_PREFIX)
    )
    return next(targets, "")


def restore_text(lines: dict[str, list[str]]) -> str:
    """Return restore text: one atomic section for every table of ``lines`` that is not empty."""
    return "".join(
        f"*{table}\n" + "\n".join(body) + "\nCOMMIT\n" for table, body in lines.items() if body
    )


def restore(
    family: Family, backend: IptablesBackend, text: str, *, only_check: bool = False
) -> None:
    """Feed ``text`` to the restore command; with ``only_check`` it is parsed and not committed."""
    if not text:
        return
    tool = command(family, backend, "restore")
    if tool is None:
        # Running the absent command words the error.
        tool = f"{_WORD[family]}-{backend.value}-restore"
    # --wait: another program may hold the lock of the legacy tables for seconds.
    argv = [tool, "--noflush", "--wait", "10"]
    commands.run([*argv, "--test"] if only_check else argv, text)


def made_here(
    family: Family, hooks: Iterable[tuple[str, str]], listing: nft.Listing | None = None
) -> dict[tuple[str, str], str]:
    """Return the comment for jumps whose chain or table (nft back end) does not exist yet."""
    existing = builtin_chains(family, listing)
    comments = {}
    for table, chain in hooks:
        if table not in existing:
            comments[table, chain] = MADE_TABLE
        elif chain not in existing[table]:
            comments[table, chain] = MADE_CHAIN
    return comments


def drop_made(family: Family, before: dict[str, OwnRules]) -> list[str]:
    """Delete built-in chains and tables that we had made (nft back end); return which.

    ``before`` is what ``read_own`` said before our rules were taken out. A chain that holds a rule
    or a policy other than ACCEPT now belongs to somebody else and stays, and so does its table.
    """
    removed: list[str] = []
    if not before:
        return removed
    ip = _NFT[family]
    builtin = builtin_chains(family)
    for table, own in before.items():
        existing = builtin.get(table, {})
        marks = {chain: own.made(chain) for chain in existing}
        whole = MADE_TABLE in marks.values()
        if not whole and MADE_CHAIN not in marks.values():
            continue
        objects = json.loads(commands.run(["nft", "-j", "list", "table", ip, table]))["nftables"]
        used = {item["rule"]["chain"] for item in objects if "rule" in item}
        doomed = [
            chain
            for chain, policy in existing.items()
            if (whole or marks[chain]) and chain not in used and policy == "accept"
        ]
        lines = [f"delete chain {ip} {table} {chain}" for chain in doomed]
        others = sum(
            1
            for item in objects
            if "metainfo" not in item
            and "table" not in item
            and item.get("chain", {}).get("name") not in doomed
        )
        if whole and not others:
            lines.append(f"delete table {ip} {table}")
        if lines:
            nft.run_transaction("\n".join(lines) + "\n")
            removed += [
                f"nft {line.removeprefix('delete ')} (empty, made by nfqproxy)" for line in lines
            ]
    return removed


def choose_backend(wanted: IptablesBackend) -> IptablesBackend:
    """Return the back end to use; AUTO looks where other programs keep their rules.

    Kubernetes' own chains decide first, then the number of rules, then what ``iptables`` drives.
    """
    if wanted is not IptablesBackend.AUTO:
        return wanted
    scores = {
        backend: _foreign_rules(backend)
        for backend in (IptablesBackend.NFT, IptablesBackend.LEGACY)
    }
    if scores[IptablesBackend.NFT] != scores[IptablesBackend.LEGACY]:
        return max(scores, key=lambda backend: scores[backend])
    for tool in ("iptables", "ip6tables"):
        if commands.find(tool):
            return _backend_of(tool)
    return IptablesBackend.NFT


def listings(backend: IptablesBackend) -> Iterator[tuple[str, list[str]]]:
    """Return (command, its lines) for every table of both families that exists."""
    for argv in _saves(backend):
        try:
            yield " ".join(argv), commands.run(argv).splitlines()
        except KernelError:
            # A table of that name with content iptables cannot show: not iptables' own.
            continue


def saved(backend: IptablesBackend, only: Container[str]) -> Iterator[tuple[str, str]]:
    """Return (command, what it prints) for these tables of both families, where they exist.

    Raises KernelError for a table that iptables cannot show.
    """
    for argv in _saves(backend):
        if argv[-1] in only:
            yield " ".join(argv), commands.run(argv)


def _saves(backend: IptablesBackend) -> Iterator[list[str]]:
    """The commands that print the tables there are, the table's name last."""
    listing = nft.list_chains() if backend is IptablesBackend.NFT else None
    for family in Family:
        save = command(family, backend, "save")
        if save is not None:
            yield from ([save, "-t", table] for table in tables(family, backend, listing))


def is_foreign(line: str) -> bool:
    """True for a rule that is not ours."""
    return line.startswith("-A ") and CHAIN_PREFIX not in line


def _foreign_rules(backend: IptablesBackend) -> tuple[int, int]:
    """Return (rules of Kubernetes, all rules), ours not counted."""
    kube = count = 0
    for _command, lines in listings(backend):
        for line in lines:
            if is_foreign(line):
                count += 1
                kube += "KUBE-" in line
            elif line.startswith(":KUBE-"):
                kube += 1
    return kube, count
