"""One rule of a KUBE chain: its conditions and its target, nothing of its meaning.

Options are those that kube-proxy has written since v1.2 (k8s.io/kubernetes pkg/proxy/iptables/proxier.go),
in the spelling of iptables-save (iptables-extensions(8)). Any other option is refused: a rule with a
condition that is not understood means something else than the rule without it.
"""

import re
from ipaddress import ip_network

from msgspec import Struct

from nfqproxy.control.address import canonical_ip, family_of
from nfqproxy.model import Family, Protocol

# "quoted" with backslashes, or a bare word; whatever is left (a lone quote) is a fault.
_TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"(?=\s|$)|([^\s"]+))')
_ESCAPED = re.compile(r"\\(.)")
_DNAT = re.compile(r"(?:\[([^]]+)\]|([^\[\]:]+)):(\d{1,5})")
_PROTOCOLS = {protocol.name.lower(): protocol for protocol in Protocol}
_SHOWN = 40
_DIGITS = 10


class RuleError(Exception):
    """A rule is not understood; the text is a clause."""


class Rule(Struct, kw_only=True):
    """A rule; what is not given is None, False or empty."""

    line: int
    comment: str = ""
    source: str | None = None
    """Canonical network."""
    not_source: str | None = None
    destination: str | None = None
    not_destination: str | None = None
    in_interface: str | None = None
    not_in_interface: str | None = None
    protocol: Protocol | None = None
    port: int | None = None
    is_from_node: bool | None = None
    """``--src-type LOCAL``; False for its negation."""
    is_to_node: bool | None = None
    """``--dst-type LOCAL``."""
    is_from_bridge: bool | None = None
    """``--physdev-is-in``."""
    probability: float | None = None
    """0 to 1."""
    remembered_s: int | None = None
    """``--rcheck --seconds``: this client was sent to the target within this time."""
    target: str = ""
    dnat: tuple[str, int] | None = None
    """``--to-destination``: address and port."""

    @property
    def conditions(self) -> frozenset[str]:
        """Names of the fields that narrow what the rule applies to."""
        return frozenset(name for name in _CONDITIONS if getattr(self, name) is not None)


_CONDITIONS = (
    "source",
    "not_source",
    "destination",
    "not_destination",
    "in_interface",
    "not_in_interface",
    "protocol",
    "port",
    "is_from_node",
    "is_to_node",
    "is_from_bridge",
    "probability",
    "remembered_s",
)

# Options that say nothing of their own: what is kept beside, and defaults spelt out.
_IDLE = {
    "--rcheck": 0,
    "--set": 0,
    "--reap": 0,
    "--rsource": 0,
    "--name": 1,
    "--mask": 1,
    "--reject-with": 1,
    "--nfacct-name": 1,
    "--random": 0,
    "--random-fully": 0,
    "--persistent": 0,
}
_VALUES = frozenset(
    (
        *("-s", "-d", "-i", "-p", "-j", "--comment", "--dport", "--src-type", "--dst-type"),
        *("--probability", "--seconds", "--to-destination"),
    )
)
# Words that have one value, and modules that are no condition by their mere presence.
_FIXED = {
    "--mode": frozenset(("random",)),
    "-m": frozenset(
        ("addrtype", "comment", "nfacct", "physdev", "recent", "sctp", "statistic", "tcp", "udp")
    ),
}
_NEGATABLE = frozenset(("-s", "-d", "-i", "--src-type", "--dst-type", "--physdev-is-in"))


_ARITY = {**_IDLE, **dict.fromkeys((*_VALUES, *_FIXED), 1), "--physdev-is-in": 0}


def parse(line: int, text: str, family: Family) -> Rule:
    """The rule of this line; raises RuleError."""
    words = _words(text)
    rule = Rule(line=line)
    given: set[str] = set()
    at = 0
    while at < len(words):
        is_negated = words[at] == "!"
        at += is_negated
        option = words[at] if at < len(words) else ""
        arity = _ARITY.get(option)
        if arity is None:
            raise RuleError(f"{_shown(option)} is not understood")
        if at + arity >= len(words):
            raise RuleError(f"{option} has no value")
        if is_negated and option not in _NEGATABLE:
            raise RuleError(f"! {option} is not understood")
        if option in _FIXED:
            if words[at + 1] not in _FIXED[option]:
                raise RuleError(f"{option} {_shown(words[at + 1])} is not understood")
        elif option not in _IDLE:
            key = f"! {option}" if is_negated else option
            if key in given:
                raise RuleError(f"{option} is given twice")
            given.add(key)
            _set(rule, option, words[at + arity], family, is_negated=is_negated)
        at += 1 + arity
    return rule


def _set(rule: Rule, option: str, value: str, family: Family, *, is_negated: bool) -> None:
    match option:
        case "-s" | "-d":
            field = "source" if option == "-s" else "destination"
            setattr(rule, f"not_{field}" if is_negated else field, network(value, family))
        case "-i":
            setattr(rule, "not_in_interface" if is_negated else "in_interface", value)
        case "-p":
            rule.protocol = _protocol(value)
        case "-j":
            rule.target = value
        case "--comment":
            rule.comment = value
        case "--dport":
            rule.port = _number(option, value, 1, 65_535)
        case "--src-type" | "--dst-type":
            if value != "LOCAL":
                raise RuleError(f"{option} {_shown(value)} is not understood")
            setattr(rule, f"is_{'from' if option == '--src-type' else 'to'}_node", not is_negated)
        case "--physdev-is-in":
            rule.is_from_bridge = not is_negated
        case "--probability":
            rule.probability = _probability(value)
        case "--seconds":
            rule.remembered_s = _number(option, value, 1, 2**31 - 1)
        case "--to-destination":
            rule.dnat = _dnat(value, family)
        case _:
            raise AssertionError(option)


def network(text: str, family: Family) -> str:
    """The canonical network of ``ADDRESS``, ``ADDRESS/BITS`` or ``ADDRESS/MASK``; raises RuleError."""
    try:
        found = ip_network(text, strict=False)
    except ValueError:
        raise RuleError(f"{_shown(text)} is no address") from None
    if found.version != family:
        raise RuleError(f"{_shown(text)} is not IPv{int(family)}, as the rules around it are")
    return str(found)


def host(text: str) -> str | None:
    """The address, where a canonical network is that of one; else None."""
    address, _, bits = text.partition("/")
    return address if bits == ("128" if ":" in address else "32") else None


def _words(text: str) -> list[str]:
    words: list[str] = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            raise RuleError(f"the quote in {_shown(text[at:].strip())} has no end")
        quoted, bare = found.groups()
        words.append(bare if quoted is None else _ESCAPED.sub(r"\1", quoted))
        at = found.end()
    return words


def _protocol(text: str) -> Protocol:
    if text not in _PROTOCOLS:
        raise RuleError(f"-p {_shown(text)} is not understood")
    return _PROTOCOLS[text]


def _number(option: str, text: str, low: int, high: int) -> int:
    is_number = text.isascii() and text.isdecimal() and len(text) <= _DIGITS
    if not is_number or not low <= int(text) <= high:
        raise RuleError(f"{option} {_shown(text)} is no number from {low} to {high}")
    return int(text)


def _probability(text: str) -> float:
    if re.fullmatch(r"[01]\.\d{1,20}|[01]", text) is None or float(text) > 1:
        raise RuleError(f"--probability {_shown(text)} is no number from 0 to 1")
    return float(text)


def _dnat(text: str, family: Family) -> tuple[str, int]:
    found = _DNAT.fullmatch(text)
    if found is None:
        raise RuleError(f"--to-destination {_shown(text)} is no ADDRESS:PORT")
    try:
        address = canonical_ip(found[1] or found[2])
    except ValueError as error:
        raise RuleError(f"--to-destination {error}") from None
    if family_of(address) is not family:
        raise RuleError(f"{address} is not IPv{int(family)}, as the rules around it are")
    return address, _number("--to-destination: port", found[3], 1, 65_535)


def _shown(text: str) -> str:
    return f'"{text[:_SHOWN]}{"..." if len(text) > _SHOWN else ""}"'
