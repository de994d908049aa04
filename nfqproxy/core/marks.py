"""Which number stands for which backend of a frontend, on the data path ``mark``.

A number means something only together with its frontend: the kernel's map is asked for both. So a frontend
has as many backends as the mask has numbers, whatever the size of the cluster, and a number can never
lead to a backend of another Service.

A backend keeps its number as long as it is a candidate of its frontend. When it leaves, the number is
*leaving*: it stays in the kernel's map and is given to nobody until no worker can use it any more.
"""

from collections.abc import Iterable, Mapping

from msgspec import Struct

from nfqproxy.model import FrontendKey, FrontendPlan, MarkMask

Identity = tuple[str, int]
"""A backend: address and port."""

Place = tuple[FrontendKey, int]
"""A frontend and one of its numbers, spread over the mask's bits."""


class FrontendMarks(Struct, frozen=True, array_like=True):
    """The numbers of one frontend's backends, as workers are told them."""

    key: FrontendKey
    marks: dict[int, Identity]
    """Bits of the packet mark -> the backend they stand for."""


class _Numbers:
    """The numbers of one frontend."""

    __slots__ = ("leaving", "used")

    def __init__(self) -> None:
        self.used: dict[Identity, int] = {}
        self.leaving: dict[Identity, int] = {}


class MarkTable:
    """The numbers of all frontends. Pure: what the kernel shall hold follows from what is returned."""

    def __init__(self, mask: MarkMask) -> None:
        self._mask = mask
        self._frontends: dict[FrontendKey, _Numbers] = {}
        self._lacking: dict[FrontendKey, int] = {}

    def __len__(self) -> int:
        return sum(len(numbers.used) for numbers in self._frontends.values())

    @property
    def lacking(self) -> Mapping[FrontendKey, int]:
        """Frontends with more backends than numbers, and how many have none."""
        return self._lacking

    def give(self, plan: FrontendPlan) -> dict[Place, Identity]:
        """Number the backends of ``plan``; returns what the kernel's map must hold in addition.

        Backends that are no candidates any more begin to leave. Of more backends than there are numbers
        the last ones get none: ``lacking`` tells.
        """
        wanted = dict.fromkeys(
            (backend.address, backend.port)
            for candidates in plan.candidate_sets
            for backend in candidates.backends
        )
        numbers = self._frontends.get(plan.key)
        if numbers is None:
            if not wanted:
                self._lacking.pop(plan.key, None)
                return {}
            numbers = self._frontends[plan.key] = _Numbers()
        self._let_go(numbers, (each for each in numbers.used if each not in wanted))
        added: dict[Place, Identity] = {}
        taken = {*numbers.used.values(), *numbers.leaving.values()}
        free = (number for number in range(1, self._mask.capacity + 1) if number not in taken)
        lacking = 0
        for identity in wanted:
            if identity in numbers.used:
                continue
            back = numbers.leaving.pop(identity, None)
            if back is not None:
                numbers.used[identity] = back
                continue
            number = next(free, None)
            if number is None:
                lacking += 1
                continue
            numbers.used[identity] = number
            added[plan.key, self._mask.marked(number)] = identity
        if lacking:
            self._lacking[plan.key] = lacking
        else:
            self._lacking.pop(plan.key, None)
        return added

    def remove(self, key: FrontendKey) -> None:
        """The frontend goes: all its numbers begin to leave."""
        numbers = self._frontends.get(key)
        if numbers is not None:
            self._let_go(numbers, numbers.used)
        self._lacking.pop(key, None)

    @staticmethod
    def _let_go(numbers: _Numbers, identities: Iterable[Identity]) -> None:
        for identity in tuple(identities):
            numbers.leaving[identity] = numbers.used.pop(identity)

    def free(self) -> list[Place]:
        """No worker uses leaving numbers any more: forget them; returns what the map need not hold."""
        freed = []
        for key, numbers in tuple(self._frontends.items()):
            freed += [(key, self._mask.marked(number)) for number in numbers.leaving.values()]
            numbers.leaving.clear()
            if not numbers.used:
                del self._frontends[key]
        return freed

    def marks(self, key: FrontendKey) -> FrontendMarks:
        """The numbers in use of one frontend."""
        numbers = self._frontends.get(key)
        used = numbers.used if numbers is not None else {}
        return FrontendMarks(
            key, {self._mask.marked(number): identity for identity, number in used.items()}
        )

    def every(self) -> dict[Place, Identity]:
        """All that the kernel's map must hold."""
        return {
            (key, self._mask.marked(number)): identity
            for key, numbers in self._frontends.items()
            for row in (numbers.used, numbers.leaving)
            for identity, number in row.items()
        }
