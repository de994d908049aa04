"""ClientIP affinity: a client stays with its backend (SEMANTICS 2.12).

State belongs to a service port and is shared by all its frontends; the key is the client's address before
any masquerade, the source port plays no part. A record counts until ``timeout_s`` after the client's last
*new connection*, and only while its backend is in the set the connection may draw from.
"""

from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct

from nfqproxy.core.draws import SharedDraws

Identity = tuple[bytes, int]
"""A backend: packed address and port."""

ServiceKey = tuple[str, str, str, int]
"""namespace, service, port name, protocol number."""

MAX_CLIENTS = 65536
"""Records kept per service port, as kube-proxy's nftables sets; beyond it the stalest goes."""


class AffinityRecord(Struct, frozen=True, array_like=True):
    """One record as it travels between processes and into the file."""

    service: ServiceKey
    client: bytes
    """Packed address."""
    address: bytes
    port: int
    last_s: float
    """Time of the client's last new connection, seconds of CLOCK_BOOTTIME."""


class Affinity:
    """The records of one service port, stalest first."""

    __slots__ = ("_draws", "_fresh", "_place", "_records", "service", "timeout_s")

    def __init__(self, service: ServiceKey, timeout_s: float, draws: SharedDraws) -> None:
        """``draws``: what the ``pick`` of :meth:`choose` draws from."""
        self.service = service
        self.timeout_s = timeout_s
        self._draws = draws
        self._place = "/".join(map(str, service)).encode()
        self._records: dict[bytes, tuple[Identity, float]] = {}
        self._fresh: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._records)

    def choose(
        self,
        client: bytes,
        now_s: float,
        row: Mapping[Identity, int],
        pick: Callable[[], int],
        identities: list[Identity],
    ) -> int:
        """Index of the backend for a new connection, -1 for none; remembers it.

        A client without a record gets the same draw from all workers, whose records reach each other only a
        moment later; after each time-out another one.

        ``row``: index of every backend that may be drawn; ``identities``: the backends by index.
        """
        known = self._records.pop(client, None)
        index = -1
        if known is not None and now_s - known[1] < self.timeout_s:
            index = row.get(known[0], -1)
        if index < 0:
            self._draws.about(self._place + client, int(now_s // self.timeout_s))
            index = pick()
            if index < 0:
                return index
        # Popped and put in again: the order of the dict is the order of use.
        self._records[client] = (identities[index], now_s)
        self._fresh.add(client)
        if len(self._records) > MAX_CLIENTS:
            self._drop(next(iter(self._records)))
        return index

    def put(self, client: bytes, backend: Identity, last_s: float) -> None:
        """Take a record made elsewhere, unless the own one is newer; of one moment, all take the same."""
        known = self._records.get(client)
        if known is not None and (known[1], known[0]) >= (last_s, backend):
            return
        self._records.pop(client, None)
        self._records[client] = (backend, last_s)
        if len(self._records) > MAX_CLIENTS:
            self._drop(next(iter(self._records)))

    def expire(self, now_s: float) -> None:
        """Forget what counts no longer."""
        old = [
            client
            for client, (_, last_s) in self._records.items()
            if now_s - last_s >= self.timeout_s
        ]
        for client in old:
            self._drop(client)

    def _drop(self, client: bytes) -> None:
        del self._records[client]
        self._fresh.discard(client)

    def take_fresh(self) -> Iterable[AffinityRecord]:
        """The records made or refreshed by ``choose`` since the last call."""
        fresh, self._fresh = self._fresh, set()
        for client in fresh:
            (address, port), last_s = self._records[client]
            yield AffinityRecord(self.service, client, address, port, last_s)

    @property
    def has_fresh(self) -> bool:
        """True when ``take_fresh`` would give something."""
        return bool(self._fresh)
