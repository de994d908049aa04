"""The bootstrap rules as text."""

import re

import pytest
from msgspec.structs import replace

from nfqproxy.core.fallback import MAX_SLOTS
from nfqproxy.errors import InputError
from nfqproxy.kernel.rule_settings import RuleMode, RuleSettings
from nfqproxy.kernel.rule_text import create_set, iptables_text, optional_objects, render
from nfqproxy.model import DataPath, Family

GOLDEN_IPTABLES = """\
*mangle
:NFQPROXY-FLOWS - [0:0]
-I PREROUTING 1 -p udp -m comment --comment "nfqproxy" -j NFQPROXY-FLOWS
-I OUTPUT 1 -p udp -m comment --comment "nfqproxy" -j NFQPROXY-FLOWS
-A NFQPROXY-FLOWS ! -i lo -p udp -m set --match-set nfqproxy-frontends-4 dst,dst -m conntrack \
--ctstate DNAT,ESTABLISHED --ctdir ORIGINAL -j SET --add-set nfqproxy-flows-4 src,src,dst --exist
COMMIT
*raw
:NFQPROXY-QUEUE - [0:0]
-A PREROUTING -p tcp -m tcp --syn -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A PREROUTING ! -p tcp -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A OUTPUT -p tcp -m tcp --syn -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A OUTPUT ! -p tcp -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A NFQPROXY-QUEUE -i lo -j RETURN
-A NFQPROXY-QUEUE -p tcp -m tcp --syn -m set --match-set nfqproxy-frontends-4 dst,dst \
-m conntrack ! --ctstate UNTRACKED -j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p udp -m set --match-set nfqproxy-frontends-4 dst,dst \
-m set ! --match-set nfqproxy-flows-4 src,src,dst \
-m conntrack ! --ctstate UNTRACKED -j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p sctp -m sctp --chunk-types only INIT \
-m set --match-set nfqproxy-frontends-4 dst,dst \
-m conntrack ! --ctstate UNTRACKED -j NFQUEUE --queue-num 7 --queue-bypass
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
    counts = [str(n) for n in range(1, MAX_SLOTS + 1)]
    for view in ("", "local-"):
        slots = re.findall(rf"chain {view}slot-(\d+) ", text)
        assert slots == [str(n) for n in range(MAX_SLOTS)]
        assert re.findall(rf"chain {view}pick-(\d+) ", text) == counts
        assert re.findall(rf"chain {view}pick-by-source-(\d+) ", text) == counts
        assert f"dnat ip6 to meta l4proto . ip6 daddr . th dport map @{view}backends-9" in text
        draw = f"vmap {{ 0 : goto {view}slot-0, 1 : goto {view}slot-1 }}"
        assert f"numgen random mod 2 {draw}" in text
        assert f"jhash ip6 saddr mod 2 seed 0x6e667170 {draw}" in text
    assert len(set(re.findall(r"chain (masquerade-\w+) ", text))) == 8
    assert "mark" not in text
    assert "ip daddr" not in text


def chain(text: str, name: str) -> list[str]:
    """Rules of a chain."""
    (body,) = re.findall(rf"^\tchain {name} \{{\n(.*?)\n\t\}}", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in body.splitlines()]


def test_detectors_are_asked_before_the_node() -> None:
    settings = RuleSettings(
        families=(Family.IPV4,), bridge_interface="cbr0", interface_name_prefix="cali"
    )
    text = render(settings).nft
    assert chain(text, "pick-by-class") == [
        "ip saddr @pod-cidrs goto class-pod",
        'iifname "cbr0" goto class-pod',
        'iifname "cali*" goto class-pod',
        "fib saddr type local goto class-node",
        "meta l4proto . ip daddr . th dport vmap @slot-count-external",
    ]
    assert chain(text, "masquerade-px") == [
        "ip saddr . ip daddr @hairpin masquerade",
        "ip saddr @pod-cidrs masquerade",
        'iifname "cbr0" masquerade',
        'iifname "cali*" masquerade',
        "fib saddr type local return",
        "masquerade",
    ]
    assert chain(text, "masquerade-n")[-3:] == [
        'iifname "cali*" ip daddr @non-pod-backends masquerade',
        'iifname "cali*" return',
        "fib saddr type local masquerade",
    ]


def test_refusals_and_guards_stand_behind_nat() -> None:
    text = render(RuleSettings(families=(Family.IPV6,))).nft
    hooks = dict(re.findall(r"chain (\S+) \{\n\t\ttype filter hook (.*?); policy accept", text))
    assert hooks == {
        "refuse-input": "input priority -110",
        "refuse-forward": "forward priority -110",
        "refuse-output": "output priority -90",
    }
    for name in ("refuse-input", "refuse-forward", "refuse-output"):
        (_, rule) = chain(text, name)
        assert rule.startswith("ct state new goto refuse-"), "one look for established connections"
    for name in ("refuse-frontend", "refuse-address"):
        assert chain(text, name)[:2] == ["jump check-source", "ct status & dnat != 0 return"]
    assert "reject with icmpv6 type port-unreachable" in text
    assert "tcp reset" not in text


def test_127_is_guarded_only_when_served() -> None:
    assert "martian" not in render(RuleSettings()).nft
    served = RuleSettings(localhost_node_ports=True)
    objects = optional_objects()[0]
    assert set(objects.values()) == {"chain", "counter"}
    for name, kind in objects.items():
        assert render(served).nft.count(f"\t{kind} {name} {{") == 1
    overlay = RuleSettings(localhost_node_ports=True, mode=RuleMode.OVERLAY)
    assert "martian" not in render(overlay).nft


def test_overlay_translates_nothing() -> None:
    text = render(RuleSettings(mode=RuleMode.OVERLAY)).nft
    assert "map @nothing" in text
    assert "masquerade" not in text
    assert "slot" not in text
    assert "filter hook" not in text
    assert "counter" not in text


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
    assert text.count('--comment "made"') == 2
    assert '-A OUTPUT ! -p tcp -m comment --comment "made" -j NFQPROXY-QUEUE' in text
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
        ({"bridge_interface": 'cbr0"; drop'}, "bridge_interface"),
        ({"interface_name_prefix": "longer-than-15-ch"}, "interface_name_prefix"),
        ({"interface_name_prefix": "cali*"}, "interface_name_prefix"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        RuleSettings(**arguments)  # type: ignore[arg-type]


MARKING = RuleSettings(first_queue=7, data_path=DataPath.MARK)

GOLDEN_MARKING = """\
*mangle
:NFQPROXY-QUEUE - [0:0]
-A PREROUTING ! -i lo -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A OUTPUT -m comment --comment "nfqproxy" -j NFQPROXY-QUEUE
-A NFQPROXY-QUEUE -m conntrack ! --ctstate NEW -j RETURN
-A NFQPROXY-QUEUE -p udp -m conntrack --ctstate DNAT -j RETURN
-A NFQPROXY-QUEUE -m set --match-set nfqproxy-frontends-4 dst,dst \
-m conntrack --ctstatus CONFIRMED -j MARK --set-xmark 0x1000/0x1000
-A NFQPROXY-QUEUE -p tcp -m set --match-set nfqproxy-frontends-4 dst,dst \
-j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p udp -m set --match-set nfqproxy-frontends-4 dst,dst \
-j NFQUEUE --queue-num 7 --queue-bypass
-A NFQPROXY-QUEUE -p sctp -m set --match-set nfqproxy-frontends-4 dst,dst \
-j NFQUEUE --queue-num 7 --queue-bypass
COMMIT
"""


def test_by_marks_packets_are_queued_behind_conntrack() -> None:
    rules = render(MARKING)
    assert rules.iptables == GOLDEN_MARKING
    assert rules.ip6tables == GOLDEN_MARKING.replace("frontends-4", "frontends-6")
    assert "flows" not in rules.ipset


@pytest.mark.parametrize("mode", list(RuleMode))
def test_by_marks_nothing_but_the_masks_bits_is_touched(mode: RuleMode) -> None:
    """The nat chains come before the fallback's and everybody else's; numbers go before routing."""
    settings = replace(MARKING, mode=mode, families=(Family.IPV6,), mark_mask=0x00F0_0000)
    text = render(settings).nft
    dnat = "dnat ip6 to meta mark & 0x300000 . meta l4proto . ip6 daddr . th dport map @marked-backends"
    for name in ("marks-prerouting", "marks-output"):
        assert chain(text, name)[1:] == [
            "meta mark & 0xc00000 == 0 return",
            dnat,
            "meta mark set meta mark & 0xff0fffff",
        ]
    assert chain(text, "marks-postrouting")[1:] == [
        "meta mark & 0x800000 != 0 masquerade",
        "meta mark & 0x400000 != 0 snat ip6 to ip6 saddr",
    ]
    kept = {
        name: chain(text, f"unmark-{name}")[1].rpartition(" & ")[2]
        for name in ("prerouting", "output", "input", "postrouting")
    }
    assert kept == {
        "prerouting": "0xffcfffff",
        "output": "0xffcfffff",
        "input": "0xff0fffff",
        "postrouting": "0xff0fffff",
    }
    assert ("@slot-count" in text) == (mode is RuleMode.REPLACE)
    assert "map @nothing" not in text


def test_a_mask_of_too_few_bits_is_refused() -> None:
    with pytest.raises(InputError, match="mark_mask: 0x3 is no mask of 3 to 32 bits"):
        RuleSettings(mark_mask=3)


def test_a_rehearsal_has_fewer_slots_and_all_else() -> None:
    whole, rehearsal = (
        re.findall(r"^\t(?:chain|map|set|counter) (\S+) \{", render(settings).nft, re.MULTILINE)
        for settings in (RuleSettings(), RuleSettings(slots=1))
    )
    assert set(rehearsal) < set(whole)
    numbers = {re.sub(r"\d+", "N", name) for name in whole}
    assert {re.sub(r"\d+", "N", name) for name in rehearsal} == numbers
