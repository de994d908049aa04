"""The nft map behind marked packets: which mark stands for which backend of which frontend.

Order, seen from a worker: a mark is in the kernel before any worker is told of it, and leaves the kernel
when no worker can use it any more. A packet marked in between meets a map that still holds its backend.
A new supervisor begins with an empty table of numbers; the first ``give`` replaces all that its
predecessor left, before any worker of its own knows a mark.
"""

import logging
from collections.abc import Iterable, Mapping

from nfqproxy.core.marks import FrontendMarks, Identity, MarkTable, Place
from nfqproxy.kernel import nft
from nfqproxy.kernel.rule_text import NFT_TABLE
from nfqproxy.model import Family, FrontendKey, FrontendPlan, MarkMask

__all__ = ["MarkMap"]

log = logging.getLogger(__name__)

_MAP = "marked-backends"
_PER_LINE = 1000
"""Elements per nft statement: keeps the lines of an error message readable."""


class MarkMap:
    """The numbers of backends and the kernel's map of them. Calls block; one at a time."""

    def __init__(self, mask: MarkMask, families: Iterable[Family] = tuple(Family)) -> None:
        self._mask = mask
        self._families = tuple(families)
        self._table = MarkTable(mask)
        self._is_known = False
        self._told_lacking: dict[FrontendKey, int] = {}

    def forget(self) -> None:
        """What the kernel holds is unknown: the next ``give`` replaces everything."""
        self._is_known = False

    def lacking(self) -> tuple[FrontendKey, ...]:
        """Frontends of which some backend has no number."""
        return tuple(self._table.lacking)

    def give(self, plans: Iterable[FrontendPlan]) -> tuple[FrontendMarks, ...]:
        """Number the backends of new and changed frontends and put them into the kernel.

        Returns what workers are to be told. Backends that have gone keep their number until ``free``.
        Raises what nft says; the next call then replaces everything in the kernel.
        """
        was_known, self._is_known = self._is_known, False
        added: dict[Place, Identity] = {}
        keys = []
        for plan in plans:
            added |= self._table.give(plan)
            keys.append(plan.key)
        self._tell_lacking()
        if was_known:
            _transact(_elements("add", added))
        else:
            flushes = [f"flush map {_ip(family)} {NFT_TABLE} {_MAP}\n" for family in self._families]
            _transact([*flushes, *_elements("add", self._table.every())])
        self._is_known = True
        return tuple(self._table.marks(key) for key in keys)

    def leave(self, keys: Iterable[FrontendKey]) -> None:
        """These frontends have gone."""
        for key in keys:
            self._table.remove(key)

    def free(self) -> bool:
        """No worker uses the marks of gone backends any more: take them out; False if there are none."""
        freed = self._table.free()
        if not freed or not self._is_known:
            return False
        self._is_known = False
        _transact(_elements("delete", dict.fromkeys(freed)))
        self._is_known = True
        return True

    def status(self) -> dict[str, object]:
        """State for the admin socket."""
        return {
            "mask": f"{self._mask.mask:#x}",
            "backends": len(self._table),
            "backends_without_mark": sum(self._table.lacking.values()),
        }

    def _tell_lacking(self) -> None:
        lacking = dict(self._table.lacking)
        for key, count in lacking.items():
            if self._told_lacking.get(key) != count:
                log.warning(
                    "%s has more backends than markMask %#x has numbers (%d): %d have none, and"
                    " connections picked for them are left to what stands behind the queue; give a mask of"
                    " more bits",
                    key,
                    self._mask.mask,
                    self._mask.capacity,
                    count,
                )
        self._told_lacking = lacking


def _transact(lines: Iterable[str]) -> None:
    nft.run_transaction("".join(lines))


def _ip(family: Family) -> str:
    return "ip" if family is Family.IPV4 else "ip6"


def _elements(verb: str, places: Mapping[Place, Identity | None]) -> Iterable[str]:
    """``add element`` or ``delete element`` statements."""
    by_family: dict[Family, list[str]] = {}
    for (key, mark), identity in places.items():
        text = f"{mark:#x} . {key.protocol.name.lower()} . {key.address} . {key.port}"
        if identity is not None:
            text += f" : {identity[0]} . {identity[1]}"
        by_family.setdefault(key.family, []).append(text)
    for family, texts in by_family.items():
        for start in range(0, len(texts), _PER_LINE):
            part = ", ".join(texts[start : start + _PER_LINE])
            yield f"{verb} element {_ip(family)} {NFT_TABLE} {_MAP} {{ {part} }}\n"
