"""Which bits of a mark mean what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.model import DEFAULT_MARK_MASK, MarkMask

NEIGHBOURS = {
    "kube-proxy, masquerade": 0x4000,
    "kube-proxy and kubelet, drop": 0x8000,
    "Calico": 0xFFFF0000,
    "AWS VPC CNI": 0x80,
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_the_default_keeps_off_well_known_neighbours(name: str) -> None:
    assert DEFAULT_MARK_MASK & NEIGHBOURS[name] == 0


def test_the_default() -> None:
    mask = MarkMask()
    assert (mask.masquerade, mask.keep, mask.numbers) == (0x2000, 0x1000, 0x0F7F)
    assert mask.capacity == 2047


@given(st.integers(1, 0xFFFFFFFF).filter(lambda mask: mask.bit_count() >= 3), st.data())
def test_every_number_has_bits_of_its_own(bits: int, data: st.DataObject) -> None:
    mask = MarkMask(bits)
    assert mask.masquerade | mask.keep | mask.numbers == bits
    assert mask.numbers.bit_count() == bits.bit_count() - 2
    one, other = (data.draw(st.integers(1, mask.capacity)) for _ in range(2))
    for number in (one, other):
        assert mask.marked(number)
        assert mask.marked(number) & ~mask.numbers == 0
    assert (mask.marked(one) == mask.marked(other)) == (one == other)
    assert mask.marked(mask.capacity) == mask.numbers


@pytest.mark.parametrize("bits", [0, 1, 0x3000, -1, 1 << 32, 0x1_0000_0007])
def test_a_mask_that_cannot_do_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="give one such as 0x3f7f"):
        MarkMask(bits)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_number_beyond_the_mask_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=r"not within 1\.\.1"):
        MarkMask(7).marked(number)
