"""Which bits of packet marks a rule of others is about."""

import pytest

from nfqproxy.kernel.mark_users import (
    MarkUser,
    bits_of_iptables_rule,
    bits_of_nft_rule,
    conflict,
    free_mask,
)
from nfqproxy.model import MarkMask

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        # As iptables-save 1.8.9 prints them.
        ("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000", 0x4000),
        ("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN", 0x4000),
        ("-A PREROUTING -m mark --mark 0x7 -j MARK --set-xmark 0x1/0xffffffff", ALL),
        ("-A PREROUTING -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80", 0x80),
        ("-A PREROUTING -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xff", 0),
        ("-A PREROUTING -j CONNMARK --set-xmark 0x4/0xffffffff", 0),
        ("-A PREROUTING -m connmark --mark 0x7 -j MARK --set-xmark 0x1/0x1", 0x1),
        ("-A PREROUTING -m connmark ! --mark 0x7/0xf -j ACCEPT", 0),
        ("-A P -p tcp -j TPROXY --on-port 9 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1", 0x1),
        ('-A P -m comment --comment "mark my words" -j ACCEPT', 0),
    ],
)
def test_iptables(rule: str, bits: int) -> None:
    assert bits_of_iptables_rule(rule) == bits


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        # As nft 1.0.6 prints them.
        ("meta mark & 0x00000010 == 0x00000010 accept", 0x10),
        ("meta mark set meta mark | 0x00004000", 0x4000),
        ("meta mark set meta mark & 0xffffbfff", 0x4000),
        ("meta mark set meta mark & 0xffffff00 ^ 0x00000001", 0xFF),
        ("meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000", 0x4000),
        ("meta mark set 0x00000005", ALL),
        ("meta mark 0x00000007 accept", ALL),
        ("meta mark set ct mark", ALL),
        ("ct mark set 0x00000007", 0),
        ("ct state established accept", 0),
    ],
)
def test_nft(rule: str, bits: int) -> None:
    assert bits_of_nft_rule(rule) == bits


def user(bits: int) -> MarkUser:
    return MarkUser(where="somewhere", rule=f"{bits:#x}", bits=bits)


def test_a_conflict_names_particular_bits_first() -> None:
    mask = MarkMask()
    assert conflict([user(0x4000), user(0xFFFF0000)], mask) is None
    assert conflict([user(ALL), user(0x10), user(0x4000)], mask) == user(0x10)
    assert conflict([user(ALL)], mask) == user(ALL)


def test_a_free_mask_is_proposed_while_there_is_one() -> None:
    assert free_mask([user(0x10), user(0x4000), user(ALL)]) == MarkMask(0x3F6F)
    assert free_mask([user(0x3FFF)]) == MarkMask(0xFFFFC000)
    assert free_mask([user(0xFFFFFFFC)]) is None
