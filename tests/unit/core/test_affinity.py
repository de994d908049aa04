"""ClientIP affinity: time-out from the last new connection, sets that change, bounds, sharing."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.core import affinity
from nfqproxy.core.affinity import Affinity, Identity
from nfqproxy.core.draws import SharedDraws

SERVICE = ("default", "web", "http", 6)
A: Identity = (b"\x0a\xf4\x01\x0b", 8080)
B: Identity = (b"\x0a\xf4\x01\x0c", 8080)
CLIENT = b"\xc0\x00\x02\x0a"
DRAWS = SharedDraws(0)


def choose(state: Affinity, now_s: float, backends: list[Identity], pick: int = 0) -> Identity:
    row = {backend: index for index, backend in enumerate(backends)}
    return backends[state.choose(CLIENT, now_s, row, lambda: pick, backends)]


def test_a_client_stays() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    assert choose(state, 0, [A, B], pick=1) == B
    assert choose(state, 50, [A, B], pick=0) == B


def test_the_time_out_counts_from_the_last_new_connection() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    choose(state, 0, [A, B], pick=1)
    choose(state, 99, [A, B], pick=0)
    assert choose(state, 198, [A, B], pick=0) == B
    assert choose(state, 298, [A, B], pick=0) == A


def test_a_backend_that_left_is_replaced_for_good() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    choose(state, 0, [A, B], pick=1)
    assert choose(state, 1, [A]) == A
    assert choose(state, 2, [A, B], pick=1) == A


def test_nothing_to_pick_leaves_no_record() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    assert state.choose(CLIENT, 0, {}, lambda: -1, []) == -1
    assert len(state) == 0
    assert not state.has_fresh


def test_records_travel() -> None:
    one, other = Affinity(SERVICE, 100, DRAWS), Affinity(SERVICE, 100, DRAWS)
    choose(one, 5, [A, B], pick=1)
    (record,) = one.take_fresh()
    assert not one.has_fresh
    other.put(record.client, (record.address, record.port), record.last_s)
    assert not other.has_fresh
    assert choose(other, 6, [A, B], pick=0) == B


def test_an_older_record_does_not_win() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    choose(state, 5, [A, B], pick=1)
    state.put(CLIENT, A, 4)
    assert choose(state, 6, [A, B], pick=0) == B
    state.put(CLIENT, A, 7)
    assert choose(state, 8, [A, B], pick=1) == A


def test_of_two_records_of_one_moment_all_keep_the_same() -> None:
    """Two workers decided at once, and each hears of the other's."""
    states = [Affinity(SERVICE, 100, DRAWS) for _ in range(2)]
    for pick, state in enumerate(states):
        choose(state, 5, [A, B], pick=pick)
    records = [next(iter(state.take_fresh())) for state in states]
    for state, record in zip(states, reversed(records), strict=True):
        state.put(record.client, (record.address, record.port), record.last_s)
    assert choose(states[0], 6, [A, B], pick=0) == choose(states[1], 6, [A, B], pick=1)


def test_expired_records_go() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    choose(state, 0, [A])
    state.expire(99.9)
    assert len(state) == 1
    state.expire(100)
    assert len(state) == 0
    assert list(state.take_fresh()) == []


def test_forged_clients_push_out_the_stalest() -> None:
    state = Affinity(SERVICE, 100, DRAWS)
    row = {A: 0}
    for number in range(affinity.MAX_CLIENTS + 10):
        state.choose(number.to_bytes(4), float(number) / 1e6, row, lambda: 0, [A])
    assert len(state) == affinity.MAX_CLIENTS
    clients = {record.client for record in state.take_fresh()}
    assert (0).to_bytes(4) not in clients
    assert (affinity.MAX_CLIENTS + 9).to_bytes(4) in clients


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60), st.integers(0, 99))
def test_equals_a_table_of_last_choices(steps: list[tuple[int, int]], seed: int) -> None:
    """Against the obvious: remember (backend, time) per client, look whether it is younger than 50."""
    rng, twin = Random(seed), Random(seed)
    state = Affinity(SERVICE, 50, DRAWS)
    table: dict[int, tuple[Identity, int]] = {}
    backends = [A, B]
    row = {A: 0, B: 1}
    now = 0
    for who, wait in steps:
        now += wait
        index = state.choose(bytes([who]), now, row, lambda: rng.randrange(2), backends)
        known = table.get(who)
        expected = known[0] if known and now - known[1] < 50 else backends[twin.randrange(2)]
        table[who] = (expected, now)
        assert backends[index] == expected
