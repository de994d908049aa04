"""The store of the test API server against the plainest thing it could be: a list of all its states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.testing.resources import by_kind
from nfqproxy.testing.store import Change, CompactedError, Store

SERVICES = by_kind["v1", "Service"]
NODES = by_kind["v1", "Node"]
HISTORY = 12

# Of each step: which resource, which object, and whether it is removed if it is there.
STEPS = st.lists(
    st.tuples(st.sampled_from([SERVICES, NODES]), st.sampled_from("abc"), st.booleans()),
    max_size=40,
)


@given(STEPS)
def test_every_moment_that_is_remembered_can_be_told(steps) -> None:
    store = Store(history=HISTORY)
    states = {store.revision: {SERVICES: {}, NODES: {}}}
    for resource, name, is_removed in steps:
        namespace = "default" if resource.is_namespaced else ""
        state = {kind: dict(names) for kind, names in states[store.revision].items()}
        there = store.get(resource, namespace, name)
        if there is not None and is_removed:
            store.remove(resource, there)
            del state[resource][name]
        else:
            made = store.put(resource, {"metadata": {"name": name, "namespace": namespace}})
            state[resource][name] = made.revision
        states[store.revision] = state
    assert store.revision - store.compacted == min(len(steps), HISTORY)
    for revision, state in states.items():
        for resource in (SERVICES, NODES):
            if revision < store.compacted:
                with pytest.raises(CompactedError):
                    store.snapshot(resource, revision)
                with pytest.raises(CompactedError):
                    store.since(resource, revision)
                continue
            told = store.snapshot(resource, revision)
            assert {version.name: version.revision for version in told} == state[resource]
            assert [version.name for version in told] == sorted(state[resource])
            assert (
                replayed(state[resource], store.since(resource, revision))
                == states[store.revision][resource]
            )


def replayed(state: dict[str, int], changes: list[Change]) -> dict[str, int]:
    """What becomes of a state by these changes."""
    state = dict(state)
    for change in changes:
        assert (change.before is None) == ((change.before or change.after).name not in state)
        if change.after is None:
            del state[change.before.name]
        else:
            state[change.after.name] = change.after.revision
    return state
