"""Tables and chains of nf_tables, as ``nft list chains`` prints them."""

import re

from nfqproxy.kernel import commands

__all__ = ["Listing", "list_chains", "parse_chains", "run_transaction"]

Listing = dict[tuple[str, str], dict[str, str | None]]
"""(family, table) -> chain -> policy of a base chain, None for any other chain."""

_TABLE = re.compile(r"^table (\S+) (\S+) \{")
_CHAIN = re.compile(r"^\tchain (\S+) \{")
_HOOK = re.compile(r"^\t\ttype \S+ hook .*?(?:policy (\w+);)?$")


def list_chains() -> Listing:
    """Return every table, empty ones included, with its chains; empty when nft is missing.

    A listing that is at hand may be given to what else would list anew: each costs a process.

    ``nft list tables`` would say less and, in version 1.0.6, read every element of every map first:
    half a second with 10,000 Services.
    """
    if commands.find("nft") is None:
        return {}
    return parse_chains(commands.run(["nft", "list", "chains"]))


def parse_chains(text: str) -> Listing:
    """Parse the output of ``nft list chains``; lines of other shapes (comments, devices) pass."""
    found: Listing = {}
    chains: dict[str, str | None] = {}
    chain = ""
    for line in text.splitlines():
        if match := _TABLE.match(line):
            chains = found[match[1], match[2]] = {}
        elif match := _CHAIN.match(line):
            chain = match[1]
            chains[chain] = None
        elif match := _HOOK.match(line):
            chains[chain] = match[1] or "accept"
    return found


def run_transaction(text: str) -> None:
    """Send ``text`` as one transaction; nothing of it holds when a part fails."""
    if text:
        commands.run(["nft", "-f", "-"], text)
