"""The store's file: survives, is compacted, and a cut-off end costs only itself."""

from pathlib import Path

import pytest

from nfqproxy.core.affinity import AffinityRecord
from nfqproxy.kernel.affinity_file import remove_stored
from nfqproxy.supervisor import affinity_store
from nfqproxy.supervisor.affinity_store import AffinityStore


def record(number: int, last_s: float = 1.0, port: int = 8080) -> AffinityRecord:
    return AffinityRecord(
        ("default", "web", "http", 6), number.to_bytes(4), b"\x0a\xf4\x01\x0b", port, last_s
    )


def opened(path: Path, now_s: float) -> AffinityStore:
    store = AffinityStore(path)
    store.open(now_s)
    return store


def test_records_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "affinity"
    first = opened(path, 0)
    first.add([record(1), record(2)], 1)
    first.add([record(1, 2.0, port=9090)], 2)
    # No close: as after SIGKILL.
    second = opened(path, 3)
    assert set(second.records()) == {record(1, 2.0, port=9090), record(2)}
    first.close()
    second.close()


def test_a_record_that_comes_late_does_not_win(tmp_path: Path) -> None:
    """A new worker must hear of what the others hold, whichever of them was quicker to tell."""
    path = tmp_path / "affinity"
    first = opened(path, 0)
    first.add([record(1, 2.0, port=9090)], 2)
    first.add([record(1, 1.0)], 2)
    assert first.records() == (record(1, 2.0, port=9090),)
    second = opened(path, 3)
    assert second.records() == (record(1, 2.0, port=9090),)
    first.close()
    second.close()


def test_old_records_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "affinity"
    first = opened(path, 0)
    first.add([record(1, 1.0), record(2, 80000.0)], 80000)
    first.close()
    second = opened(path, 86500)
    assert second.records() == (record(2, 80000.0),)
    second.close()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_cut_off_end_costs_only_itself(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "affinity"
    first = opened(path, 0)
    first.add([record(1), record(2)], 1)
    first.close()
    path.write_bytes(path.read_bytes()[:-cut])
    second = opened(path, 2)
    assert second.records() == (record(1),)
    second.close()


def test_the_file_is_rewritten_when_most_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity_store, "_COMPACT_AT_LEAST", 10)
    path = tmp_path / "affinity"
    store = opened(path, 0)
    for second in range(100):
        store.add([record(1, float(second))], second)
    assert path.stat().st_size < 20 * 60
    store.close()
    again = opened(path, 100)
    assert again.records() == (record(1, 99.0),)
    again.close()


def test_without_a_place_to_write_it_works_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "affinity", 0)
    store.add([record(1)], 1)
    assert store.records() == (record(1),)
    store.close()


def test_removal(tmp_path: Path) -> None:
    path = tmp_path / "nfqproxy" / "affinity-1"
    store = opened(path, 0)
    assert not path.parent.exists()
    store.add([record(1)], 1)
    store.close()
    assert remove_stored(path) == [f"file {path}"]
    assert remove_stored(path) == []
    assert not path.parent.exists()
