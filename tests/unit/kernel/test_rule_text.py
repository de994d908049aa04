"""The bootstrap rules as text."""

import re

import pytest

from nfqproxy.core.fallback import MAX_SLOTS
from nfqproxy.errors import InputError
from nfqproxy.kernel.rule_settings import RuleMode, RuleSettings
from nfqproxy.kernel.rule_text import create_set, iptables_text, render
from nfqproxy.model import Family

GOLDEN_IPTABLES = """\
*mangle
:NFQPROXY-FLOWS - [0:0]
-I PREROUTING 1 ! -i lo -m comment --comment "nfqproxy" -j NFQPROXY-FLOWS
-I OUTPUT 1 -m comment --comment "nfqproxy" -j NFQPROXY-FLOWS
-A NFQPROXY-FLOWS -p udp -m set --match-set nfqproxy-frontends-4 dst,dst -m conntrack \
--ctstate DNAT --ctdir ORIGINAL -j SET --add-set nfqproxy-flows-4 src,src,dst --exist
COMMIT
*raw
:NFQPROXY-QUEUE - [0:0]
-A PREROUTING ! -i lo -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A OUTPUT -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A NFQPROXY-QUEUE -p tcp -m tcp --syn -m set --match-set nfqproxy-frontends-4 dst,dst \
-j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p udp -m set --match-set nfqproxy-frontends-4 dst,dst \
-m set ! --match-set nfqproxy-flows-4 src,src,dst -j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p sctp -m sctp --chunk-types only INIT \
-m set --match-set nfqproxy-frontends-4 dst,dst -j NFQUEUE --queue-num 7 --queue-bypass
COMMIT
"""


def test_iptables_text() -> None:
    rules = render(RuleSettings(first_queue=7))
    assert rules.iptables == GOLDEN_IPTABLES
    assert rules.ip6tables == re.sub(r"(frontends|flows)-4", r"\1-6", GOLDEN_IPTABLES)


def test_several_workers_share_by_balance() -> None:
    text = render(RuleSettings(first_queue=7, queue_count=3)).iptables
    assert text.count("--queue-balance 7:9 --queue-bypass") == 3
    assert "--queue-num" not in text


def test_ipset_text() -> None:
    assert render(RuleSettings(flow_timeout_s=9)).ipset == (
        "create nfqproxy-frontends-4 hash:ip,port family inet hashsize 4096 maxelem 262144\n"
        "create nfqproxy-flows-4 hash:ip,port,ip family inet hashsize 16384 maxelem 1048576"
        " timeout 9\n"
        "create nfqproxy-frontends-6 hash:ip,port family inet6 hashsize 4096 maxelem 262144\n"
        "create nfqproxy-flows-6 hash:ip,port,ip family inet6 hashsize 16384 maxelem 1048576"
        " timeout 9\n"
    )
    spare = create_set("frontends", Family.IPV6, RuleSettings(), name="spare")
    assert spare.startswith("create spare hash:ip,port family inet6 ")


def test_fallback_has_a_chain_for_every_slot_and_count() -> None:
    text = render(RuleSettings(families=(Family.IPV6,))).nft
    assert re.findall(r"chain slot-(\d+) ", text) == [str(n) for n in range(MAX_SLOTS)]
    assert re.findall(r"chain pick-(\d+) ", text) == [str(n) for n in range(1, MAX_SLOTS + 1)]
    assert "numgen random mod 2 vmap { 0 : goto slot-0, 1 : goto slot-1 }" in text
    assert "dnat ip6 to meta l4proto . ip6 daddr . th dport map @backends-9" in text
    assert len(set(re.findall(r"chain (masquerade-\w+) ", text))) == 8
    assert "mark" not in text
    assert "ip daddr" not in text


def test_overlay_translates_nothing() -> None:
    text = render(RuleSettings(mode=RuleMode.OVERLAY)).nft
    assert "map @nothing" in text
    assert "masquerade" not in text
    assert "slot" not in text


def test_a_family_that_is_off_has_no_text() -> None:
    rules = render(RuleSettings(families=(Family.IPV4,)))
    assert rules.ip6tables == ""
    assert "inet6" not in rules.ipset
    assert "ip6" not in rules.nft
    assert list(rules.sections()) == [
        "ipset -exist restore",
        "iptables-restore --noflush",
        "nft -f -",
    ]


def test_comments_and_removals_find_their_place() -> None:
    text = iptables_text(
        Family.IPV4,
        RuleSettings(),
        comments={("raw", "OUTPUT"): "made"},
        before={"mangle": ["-D PREROUTING -j NFQPROXY-OLD", "-X NFQPROXY-OLD"]},
    )
    assert text.count('--comment "made"') == 1
    assert '-A OUTPUT -m comment --comment "made" -j NFQPROXY-QUEUE' in text
    assert text.index("-X NFQPROXY-OLD") < text.index("-I PREROUTING") < text.index("*raw")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"queue_count": 0}, "queue_count"),
        ({"first_queue": -1}, "first_queue"),
        ({"first_queue": 65535, "queue_count": 2}, "first_queue"),
        ({"flow_timeout_s": 0}, "flow_timeout_s"),
        ({"families": ()}, "families"),
        ({"families": (Family.IPV4, Family.IPV4)}, "families"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        RuleSettings(**arguments)  # type: ignore[arg-type]
