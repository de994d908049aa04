"""The parts of the story that are others on the data path ``mark``. Names are those of ``rules/``."""

from nfqproxy.model import MarkMask

Steps = tuple[str, ...]


def queued(hook: str, member: str, family: int) -> Steps:
    """A first packet to a frontend."""
    return (
        new_connection(hook),
        f"mangle {hook}: the last rule jumps to NFQPROXY-QUEUE, which takes what conntrack calls new and has"
        " not translated",
        f"mangle {hook}: {member} is in nfqproxy-frontends-{family} -> queue",
    )


def not_queued(hook: str, why: str) -> Steps:
    """Any other packet."""
    return (new_connection(hook), f"mangle {hook}: {why} -> not queued")


def new_connection(hook: str) -> str:
    """What conntrack says of the packet."""
    return f"conntrack {hook}: a new, untranslated connection"


def decided(marks: MarkMask, hook: str, table: str, key: str) -> Steps:
    """From the worker's verdict to routing."""
    chain = hook.lower()
    return (
        f"worker: accepts the packet with the backend's number in the bits {marks.numbers:#x} of its mark,"
        f" and the bit {marks.masquerade:#x} to have it masqueraded or {marks.keep:#x} to keep its source;"
        " the bits of others stay",
        f"nat {hook}: nft {table} marks-{chain} finds the number . {key} in marked-backends -> dnat to the"
        " backend; no later nat rule is asked, neither the fallback's nor kube-proxy's or the CNI's",
        f"filter {hook}: nft {table} unmark-{chain} takes the number off the mark again, before routing",
    )


def masqueraded(marks: MarkMask, table: str, source: str) -> str:
    """The source, by the masquerade bit."""
    bit = f"{marks.masquerade:#x}"
    return f"nft {table} marks-postrouting: {bit} is set -> masquerade, the source becomes {source}"


def kept(marks: MarkMask, table: str, source: str) -> str:
    """The source, by the keep bit."""
    return (
        f"nft {table} marks-postrouting: {marks.keep:#x} is set -> the source stays {source}, and no"
        " masquerade rule of others is asked"
    )


def unmarked(table: str, hook: str) -> str:
    """The end of our bits."""
    return f"filter {hook}: nft {table} unmark-{hook.lower()} takes our last bit off the mark"
