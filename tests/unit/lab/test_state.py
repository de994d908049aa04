"""The state file of a lab: the lock on its name, and what is left to remove."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from nfqproxy.errors import InputError, NfqproxyError
from nfqproxy.kernel.processes import ProcessRef
from nfqproxy.lab import state as states
from nfqproxy.lab.standing import Lab
from nfqproxy.lab.state import LabState


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(states, "FOLDER", tmp_path / "labs")
    return tmp_path / "labs"


def plan(name: str = "one") -> LabState:
    return LabState(
        name=name,
        prefix="nfqp-none00-",
        clients=1,
        pods=3,
        weights=(5, 3, 2),
        workers=1,
        reader="netlink",
        owner=ProcessRef.of(os.getpid()),
    )


def test_a_name_is_taken_once(folder: Path) -> None:
    states.claim(plan())
    assert states.names() == ["one"]
    assert states.load("one") == plan()
    with pytest.raises(NfqproxyError, match="a lab named one stands already"):
        states.claim(plan())
    assert states.remove("one") is True
    assert states.remove("one") is False
    assert states.names() == []
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "x" * 41])
def test_a_name_that_is_no_name(name: str) -> None:
    with pytest.raises(InputError, match="letters, digits and hyphens"):
        states.claim(plan(name))


def test_a_folder_without_state_is_removed() -> None:
    """A process was killed between the two."""
    states.claim(plan())
    (states.FOLDER / "one" / "state.json").unlink()
    assert states.load("one") is None
    assert states.remove("one") is True


def test_the_pods_of_a_second_node_are_known() -> None:
    """Whoever removes the lab of a killed process finds them."""
    states.claim(replace(plan(), far_pods=2))
    state = states.load("one")
    assert state is not None
    names = [member.name for member in state.topology().group]
    assert names[-3:] == ["nfqp-none00-pod-1-13", "nfqp-none00-pod-2-11", "nfqp-none00-pod-2-12"]
    assert "nfqp-none00-n2" in names


def test_a_damaged_state_says_what_to_do() -> None:
    states.claim(plan())
    (states.FOLDER / "one" / "state.json").write_text("{")
    with pytest.raises(NfqproxyError, match=r"remove the namespaces .* by hand"):
        states.load("one")


def test_a_lab_at_work_is_not_attached_to() -> None:
    states.claim(plan())
    with pytest.raises(NfqproxyError, match=f"process {os.getpid()} is at work on the lab one"):
        Lab.attach("one")
    with pytest.raises(NfqproxyError, match="no lab named two stands; there is one"):
        Lab.attach("two")
    states.save(replace(plan(), owner=None))
    assert Lab.attach("one").client.name == "nfqp-none00-c1"


def test_source_ports_are_not_used_twice_in_a_row() -> None:
    states.claim(plan())
    lab = Lab(plan())
    first = lab.take_ports(20_000)
    second = lab.take_ports(7_000)
    assert second >= first + 20_000
    # The end of the range: from the start again, by then those flows are long over.
    assert lab.take_ports(7_000) == first
    stored = states.load("one")
    assert stored is not None
    assert stored.next_port == first + 7_000
