"""What an already existing conntrack entry means for a packet that was about to create one (KERNEL 2.7).

Client ports are reused, so EEXIST is ordinary. Accepting such a packet blindly black-holes it: the
kernel would retire the old entry by itself and make an untranslated one.
"""

from enum import Enum

from nfqproxy.model import Protocol
from nfqproxy.wire import ctnetlink


class Judgement(Enum):
    """What to do about the entry in the way."""

    TWIN = "another packet of this flow was first: accept"
    RETRANSMIT = "the backend has not answered yet: accept, the entry stands"
    ALIVE = "the connection is established: accept unchanged"
    REUSED = "a finished connection of the same tuple: delete and create"
    POISONED = "an entry without our translation: delete and create"
    BACKEND_GONE = "translated to a backend that has left: delete and create"

    @property
    def replaces(self) -> bool:
        """True when the entry must make way."""
        return self in _REPLACING


_REPLACING = frozenset({Judgement.REUSED, Judgement.POISONED, Judgement.BACKEND_GONE})

# net/netfilter/nf_conntrack_proto_tcp.c: a SYN on these either reopens the entry (which loses the
# translation) or is ignored although both sides have finished.
_TCP_FINISHED = frozenset(
    {
        ctnetlink.TCP_CONNTRACK_LAST_ACK,
        ctnetlink.TCP_CONNTRACK_TIME_WAIT,
        ctnetlink.TCP_CONNTRACK_CLOSE,
    }
)
_TCP_UNANSWERED = frozenset({ctnetlink.TCP_CONNTRACK_SYN_SENT, ctnetlink.TCP_CONNTRACK_SYN_SENT2})
# NONE: made by ctnetlink a moment ago, its SYN has not come by yet.
_TCP_OPENING = _TCP_UNANSWERED | {ctnetlink.TCP_CONNTRACK_NONE, ctnetlink.TCP_CONNTRACK_SYN_RECV}
# net/netfilter/nf_conntrack_proto_sctp.c: an INIT leaves a new entry in CLOSED, where an association that
# ended is as well; only that one has seen a reply. In COOKIE_WAIT the backend's INIT ACK has come by, but
# the client has not taken it yet, as in TCP's SYN_RECV.
_SCTP_OPENING = frozenset(
    {
        ctnetlink.SCTP_CONNTRACK_NONE,
        ctnetlink.SCTP_CONNTRACK_CLOSED,
        ctnetlink.SCTP_CONNTRACK_COOKIE_WAIT,
    }
)
_SCTP_ALIVE = frozenset(
    {ctnetlink.SCTP_CONNTRACK_COOKIE_ECHOED, ctnetlink.SCTP_CONNTRACK_ESTABLISHED}
)
_SCTP_FINISHED = frozenset(
    {
        ctnetlink.SCTP_CONNTRACK_SHUTDOWN_SENT,
        ctnetlink.SCTP_CONNTRACK_SHUTDOWN_RECD,
        ctnetlink.SCTP_CONNTRACK_SHUTDOWN_ACK_SENT,
    }
)


def judge(entry: ctnetlink.Entry, *, backend_lives: bool) -> Judgement:
    """Judge the entry found for the original tuple of a new TCP, UDP or SCTP flow.

    ``backend_lives``: the entry's reply source is still a candidate of the frontend. With a backend that
    *is* the frontend, such as an ingress of the host network behind the node's address as an external IP,
    an entry that translates nothing is the right one.
    """
    match entry.original.protocol:
        case Protocol.TCP:
            state = entry.tcp_state or ctnetlink.TCP_CONNTRACK_NONE
            if state in _TCP_FINISHED:
                return Judgement.REUSED
            if state not in _TCP_OPENING:
                # Also FIN_WAIT and CLOSE_WAIT: a half-closed connection is in use, and one forged
                # SYN must not cut it.
                return Judgement.ALIVE
            if not backend_lives:
                return Judgement.BACKEND_GONE if entry.is_dnat else Judgement.POISONED
            return Judgement.RETRANSMIT if state in _TCP_UNANSWERED else Judgement.TWIN
        case Protocol.SCTP:
            state = entry.sctp_state or ctnetlink.SCTP_CONNTRACK_NONE
            is_closed = state == ctnetlink.SCTP_CONNTRACK_CLOSED
            if state in _SCTP_FINISHED or (is_closed and entry.has_seen_reply):
                return Judgement.REUSED
            if state in _SCTP_ALIVE:
                return Judgement.ALIVE
            if not entry.is_dnat and not backend_lives:
                return Judgement.POISONED
            if state in _SCTP_OPENING and not backend_lives:
                return Judgement.BACKEND_GONE
            return Judgement.RETRANSMIT if is_closed else Judgement.TWIN
        case _:
            # Never re-create a translated UDP flow, or it would be spread over backends.
            return Judgement.TWIN if entry.is_dnat or backend_lives else Judgement.POISONED
