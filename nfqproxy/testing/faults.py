"""What may go wrong between a client and an API server, drawn from a seed.

Every fault stays within what the API promises: a client that follows the rules ends with the right state
however many of them it meets. Each kind draws from its own stream of the seed, so that switching one on
leaves the draws of the others as they were; the same requests in the same order meet the same faults.
"""

import enum
import random
from collections import Counter
from collections.abc import Collection, Mapping

from msgspec import Struct

from nfqproxy.errors import InputError

__all__ = ["Fault", "Faults"]


class Fault(enum.StrEnum):
    """The kinds. In brackets: what counts as one opportunity."""

    CUT = "cut"
    """The connection ends in the middle of a watch event, half of the time by a reset. [event]"""
    CUT_LIST = "cut-list"
    """The connection ends in the middle of a list. [list]"""
    END = "end"
    """A watch ends before its time, in good order. [batch of events]"""
    DELAY = "delay"
    """An answer, or the next events of a watch, come late: other watches may overtake it.
    [request, batch of events]"""
    SHUFFLE = "shuffle"
    """The objects of a list from the cache, or the first events of a watch, come in any order. [those]"""
    STALE = "stale"
    """resourceVersion=0 is answered from an older state, as by a server whose cache lags. [those]"""
    DUPLICATE_SLICE = "duplicate-slice"
    """After an EndpointSlice is written, a second one with its endpoints appears for a while, as when a
    controller moves endpoints between slices. [write of a slice]"""
    EXPIRE = "expire"
    """410: a watch, from its start or in the middle, or the rest of a list. [watch, batch, page]"""
    TOO_MANY = "429"
    """429 with Retry-After. [request]"""
    INTERNAL = "500"
    """500; half of the writes have been done all the same. [request]"""
    RESTART = "restart"
    """The server goes, cutting all connections, and comes back without its history. [write]"""


class _Setting(Struct):
    rate: float
    """Probability per opportunity."""
    plurals: frozenset[str]
    """Resources it is for; empty: all."""
    forced: int = 0
    """So many opportunities more, whatever the rate."""


class Faults:
    """Which faults are switched on, and how often each has come."""

    def __init__(self, seed: int | str = 0) -> None:
        self.counts: Counter[Fault] = Counter()
        """How often each has happened."""
        self.delay_s = 0.2
        """The longest delay, seconds."""
        self.retry_after_s = 1
        """What a 429 asks for, seconds."""
        self._settings: dict[Fault, _Setting] = {}
        self._chance = {fault: random.Random(f"{seed}/{fault}") for fault in Fault}

    def set(self, fault: Fault | str, rate: float, *, only: Collection[str] = ()) -> None:
        """Let it happen with this probability per opportunity, to these resources (default: all); 0: off.

        Raises InputError for an unknown fault or a rate outside 0 to 1.
        """
        self.set_all({fault: rate}, only=only)

    def set_all(self, rates: Mapping[Fault | str, float], *, only: Collection[str] = ()) -> None:
        """Several at once, or none of them if one is wrong."""
        wanted = {self.named(fault): rate for fault, rate in rates.items()}
        for kind, rate in wanted.items():
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise InputError(f"fault {kind}: {rate} is no probability; give 0 to 1")
        for kind, rate in wanted.items():
            self._settings[kind] = _Setting(rate=rate, plurals=frozenset(only))

    def force(self, fault: Fault | str, times: int = 1, *, only: Collection[str] = ()) -> None:
        """Let it happen at the next so many opportunities."""
        kind = self.named(fault)
        setting = self._settings.setdefault(kind, _Setting(rate=0.0, plurals=frozenset(only)))
        setting.plurals = frozenset(only)
        setting.forced += times

    def clear(self) -> None:
        """Switch all off; the counts stay."""
        self._settings.clear()

    def rates(self) -> dict[str, float]:
        """The probability of each kind that has one."""
        return {str(kind): item.rate for kind, item in self._settings.items() if item.rate}

    def hits(self, fault: Fault, plural: str) -> bool:
        """Whether it happens at this opportunity; counts it if so."""
        setting = self._settings.get(fault)
        if setting is None or (setting.plurals and plural not in setting.plurals):
            return False
        if setting.forced:
            setting.forced -= 1
        elif not setting.rate or self._chance[fault].random() >= setting.rate:
            return False
        self.counts[fault] += 1
        return True

    def chance(self, fault: Fault) -> random.Random:
        """For the particulars of a fault that happens: how long, where, which."""
        return self._chance[fault]

    @staticmethod
    def named(fault: Fault | str) -> Fault:
        """By its name; InputError lists the known ones."""
        try:
            return Fault(fault)
        except ValueError:
            known = ", ".join(Fault)
            raise InputError(f'there is no fault "{fault}"; there are {known}') from None
