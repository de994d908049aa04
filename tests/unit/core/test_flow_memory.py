"""The memory of flows is bounded in time and in size."""

from nfqproxy.core.flow_memory import FLOW_BYTES, LIFE_S, MAX_FLOWS, FlowMemory


def test_two_generations() -> None:
    memory: FlowMemory[str] = FlowMemory()
    memory.turn(1000.0)
    memory.recent[b"a"] = "one"
    assert memory.turn(1000.0 + LIFE_S - 0.1)(b"a") is None  # still recent
    assert memory.recent == {b"a": "one"}
    older = memory.turn(1000.0 + LIFE_S)
    assert memory.recent == {}
    assert older(b"a") == "one"
    memory.recent[b"b"] = "two"
    assert memory.turn(1000.0 + 2 * LIFE_S)(b"a") is None
    assert len(memory) == 1


def test_after_a_long_pause_nothing_is_known() -> None:
    memory: FlowMemory[str] = FlowMemory()
    memory.turn(1000.0)
    memory.recent[b"a"] = "one"
    assert memory.turn(1000.0 + 2 * LIFE_S)(b"a") is None
    assert len(memory) == 0


def test_a_flood_does_not_fill_the_memory() -> None:
    memory: FlowMemory[int] = FlowMemory()
    for number in range(5 * MAX_FLOWS):
        if number % 64 == 0:
            memory.turn(1000.0)
        memory.recent[number.to_bytes(8)] = number
    assert MAX_FLOWS <= len(memory) <= 2 * MAX_FLOWS
    memory.clear()
    assert len(memory) == 0


def test_flows_of_two_protocols_are_never_one() -> None:
    assert len(set(FLOW_BYTES.values())) == len(FLOW_BYTES)
    # Nor one of IPv4 and one of IPv6, whose addresses are 24 bytes longer.
    assert max(FLOW_BYTES.values()) - min(FLOW_BYTES.values()) < 24
