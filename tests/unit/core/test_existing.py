"""What an entry in the way means, state by state."""

import pytest

from nfqproxy.core.existing import Judgement, judge
from nfqproxy.wire import ctnetlink

CLIENT, VIP, BACKEND = bytes([192, 0, 2, 10]), bytes([10, 96, 0, 80]), bytes([10, 244, 1, 11])


def entry(
    protocol: int = 6, *, state: int | None = None, status: int = ctnetlink.IPS_DST_NAT
) -> ctnetlink.Entry:
    original = ctnetlink.Tuple(src=CLIENT, dst=VIP, protocol=protocol, src_port=1000, dst_port=80)
    reply = ctnetlink.Tuple(
        src=BACKEND, dst=CLIENT, protocol=protocol, src_port=8080, dst_port=1000
    )
    return ctnetlink.Entry(
        original=original,
        reply=reply,
        status=status,
        timeout_s=60,
        mark=0,
        tcp_state=state if protocol == 6 else None,
        sctp_state=state if protocol == 132 else None,
        id=1,
        zone=0,
        labels=b"",
        use=1,
        original_packets=None,
        original_bytes=None,
        reply_packets=None,
        reply_bytes=None,
    )


@pytest.mark.parametrize(
    "state",
    [
        ctnetlink.TCP_CONNTRACK_TIME_WAIT,
        ctnetlink.TCP_CONNTRACK_CLOSE,
        ctnetlink.TCP_CONNTRACK_LAST_ACK,
    ],
)
@pytest.mark.parametrize("status", [0, ctnetlink.IPS_DST_NAT])
def test_a_finished_connection_makes_way(state: int, status: int) -> None:
    found = judge(entry(state=state, status=status), backend_lives=True)
    assert found is Judgement.REUSED
    assert found.replaces


@pytest.mark.parametrize(
    "state",
    [
        ctnetlink.TCP_CONNTRACK_ESTABLISHED,
        ctnetlink.TCP_CONNTRACK_FIN_WAIT,
        ctnetlink.TCP_CONNTRACK_CLOSE_WAIT,
    ],
)
@pytest.mark.parametrize("lives", [True, False])
def test_a_connection_in_use_is_never_cut(state: int, lives: bool) -> None:
    found = judge(entry(state=state), backend_lives=lives)
    assert found is Judgement.ALIVE
    assert not found.replaces


def test_an_unanswered_syn_is_a_retransmit() -> None:
    found = judge(entry(state=ctnetlink.TCP_CONNTRACK_SYN_SENT), backend_lives=True)
    assert found is Judgement.RETRANSMIT
    assert not found.replaces


def test_an_unanswered_syn_to_a_gone_backend_is_sent_elsewhere() -> None:
    found = judge(entry(state=ctnetlink.TCP_CONNTRACK_SYN_SENT), backend_lives=False)
    assert found is Judgement.BACKEND_GONE
    assert found.replaces


def test_an_untranslated_opening_is_poison() -> None:
    for state in (ctnetlink.TCP_CONNTRACK_SYN_SENT, ctnetlink.TCP_CONNTRACK_NONE):
        found = judge(entry(state=state, status=0), backend_lives=False)
        assert found is Judgement.POISONED
        assert found.replaces


def test_a_backend_that_is_the_frontend_needs_no_translation() -> None:
    opening = entry(state=ctnetlink.TCP_CONNTRACK_SYN_SENT, status=0)
    assert judge(opening, backend_lives=True) is Judgement.RETRANSMIT
    assert judge(entry(17, status=0), backend_lives=True) is Judgement.TWIN
    for state in (None, ctnetlink.SCTP_CONNTRACK_COOKIE_WAIT):
        assert judge(entry(132, state=state, status=0), backend_lives=True) is Judgement.TWIN


def test_an_entry_made_a_moment_ago_is_a_twin() -> None:
    assert judge(entry(state=None), backend_lives=True) is Judgement.TWIN


@pytest.mark.parametrize("lives", [True, False])
def test_a_translated_udp_flow_is_never_made_anew(lives: bool) -> None:
    assert judge(entry(17), backend_lives=lives) is Judgement.TWIN


def test_an_untranslated_udp_flow_is_poison() -> None:
    assert judge(entry(17, status=0), backend_lives=False) is Judgement.POISONED


ANSWERED = ctnetlink.IPS_DST_NAT | ctnetlink.IPS_SEEN_REPLY


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("status", [ANSWERED, ctnetlink.IPS_SEEN_REPLY])
def test_an_sctp_association_in_use_is_never_cut(lives: bool, status: int) -> None:
    for state in (ctnetlink.SCTP_CONNTRACK_ESTABLISHED, ctnetlink.SCTP_CONNTRACK_COOKIE_ECHOED):
        found = judge(entry(132, state=state, status=status), backend_lives=lives)
        assert found is Judgement.ALIVE


@pytest.mark.parametrize("lives", [True, False])
def test_a_finished_sctp_association_makes_way(lives: bool) -> None:
    for state in (ctnetlink.SCTP_CONNTRACK_CLOSED, ctnetlink.SCTP_CONNTRACK_SHUTDOWN_ACK_SENT):
        found = judge(entry(132, state=state, status=ANSWERED), backend_lives=lives)
        assert found is Judgement.REUSED


@pytest.mark.parametrize(
    ("state", "status", "while_it_lives"),
    [
        (None, ctnetlink.IPS_DST_NAT, Judgement.TWIN),
        (ctnetlink.SCTP_CONNTRACK_NONE, ctnetlink.IPS_DST_NAT, Judgement.TWIN),
        # Unanswered: the state is that of one that has ended.
        (ctnetlink.SCTP_CONNTRACK_CLOSED, ctnetlink.IPS_DST_NAT, Judgement.RETRANSMIT),
        (ctnetlink.SCTP_CONNTRACK_COOKIE_WAIT, ANSWERED, Judgement.TWIN),
    ],
)
def test_an_opening_sctp_association_stays_with_a_living_backend(
    state: int | None, status: int, while_it_lives: Judgement
) -> None:
    opening = entry(132, state=state, status=status)
    assert judge(opening, backend_lives=True) is while_it_lives
    assert not while_it_lives.replaces
    assert judge(opening, backend_lives=False) is Judgement.BACKEND_GONE
    untranslated = entry(132, state=state, status=status & ~ctnetlink.IPS_DST_NAT)
    assert judge(untranslated, backend_lives=False) is Judgement.POISONED
