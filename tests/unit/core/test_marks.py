"""Numbers of backends: stable, never of two backends at once, freed only when told."""

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from nfqproxy.core.marks import Identity, MarkTable, Place
from nfqproxy.model import Backend, CandidateSet, FrontendKey, FrontendPlan, MarkMask, Protocol
from tests.unit.core.test_dataplane import one_plan

KEY = FrontendKey(Protocol.TCP, "10.96.0.80", 80)
OTHER = FrontendKey(Protocol.TCP, "10.96.0.81", 80)


def plan(*names: int, key: FrontendKey = KEY, local: tuple[int, ...] = ()) -> FrontendPlan:
    sets = tuple(
        CandidateSet(backends=tuple(Backend(address=f"10.244.1.{n}", port=8080) for n in row))
        for row in (names, local)
    )
    return replace(one_plan(), key=key, candidate_sets=sets)


def backend(name: int) -> Identity:
    return f"10.244.1.{name}", 8080


def test_numbers_count_per_frontend_and_cover_both_candidate_sets() -> None:
    table = MarkTable(MarkMask())
    assert table.give(plan(5, 6, local=(6, 7))) == {
        (KEY, 1): backend(5),
        (KEY, 2): backend(6),
        (KEY, 3): backend(7),
    }
    assert table.give(plan(5, key=OTHER)) == {(OTHER, 1): backend(5)}
    assert table.marks(KEY).marks == {1: backend(5), 2: backend(6), 3: backend(7)}
    assert len(table) == 4


def test_a_number_is_given_anew_only_when_it_is_free() -> None:
    table = MarkTable(MarkMask(0b111_1000))  # three numbers
    table.give(plan(1, 2))
    assert table.give(plan(2, 3)) == {(KEY, 0b1_1000): backend(3)}
    # The first has left, but a worker may still use its number.
    assert table.give(plan(2, 3, 4)) == {}
    assert table.lacking == {KEY: 1}
    assert (KEY, 0b0_1000) in table.every()
    assert table.free() == [(KEY, 0b0_1000)]
    assert table.give(plan(2, 3, 4)) == {(KEY, 0b0_1000): backend(4)}
    assert table.lacking == {}


def test_a_backend_that_returns_in_time_has_its_number_again() -> None:
    table = MarkTable(MarkMask())
    table.give(plan(1, 2))
    table.give(plan(2))
    assert table.give(plan(2, 1)) == {}
    assert table.marks(KEY).marks == {1: backend(1), 2: backend(2)}
    assert table.free() == []


def test_a_frontend_that_goes_takes_its_numbers_along() -> None:
    table = MarkTable(MarkMask(0b111))
    table.give(plan(1, 2))
    assert table.lacking == {KEY: 1}
    table.remove(KEY)
    table.remove(OTHER)
    assert table.lacking == {}
    assert table.marks(KEY).marks == {}
    assert table.free() == [(KEY, 1)]
    assert table.every() == {}


@example(steps=[[2, 3, 4], [1], True, []])
@given(
    steps=st.lists(
        st.one_of(st.lists(st.integers(1, 9), max_size=6, unique=True), st.booleans()), max_size=30
    )
)
def test_the_kernels_map_is_always_what_the_table_says(
    steps: list[list[int] | bool],
) -> None:
    """Additions and removals told one by one come to the whole; no number stands for two backends."""
    table = MarkTable(MarkMask(0x3C00))  # three numbers
    kernel: dict[Place, Identity] = {}
    for step in steps:
        if step is True:
            for place in table.free():
                del kernel[place]
        elif step is False:
            table.remove(KEY)
        else:
            added = table.give(plan(*step))
            assert not added.keys() & kernel.keys()
            kernel |= added
            used = table.marks(KEY).marks
            assert len(set(used.values())) == len(used)
            assert table.lacking.get(KEY, 0) == len(set(step)) - len(used)
        assert table.every() == kernel
        assert table.marks(KEY).marks.items() <= {(m, b) for (_, m), b in kernel.items()}
