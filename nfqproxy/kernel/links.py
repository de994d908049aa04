"""Names of the interfaces that queued packets came in by, for the detectors that go by them.

The index in a queue message is that of the interface which iptables' ``-i`` and nft's ``iifname`` see in
raw PREROUTING: for a port of a bridge the bridge, with br_netfilter too (the port is in
NFQA_IFINDEX_PHYSINDEV, net/netfilter/nfnetlink_queue.c, which nobody needs here).
"""

import socket
from collections.abc import Callable

from nfqproxy.kernel import rtnetlink_socket
from nfqproxy.wire import rtnetlink


class Links:
    """``core.sources.Interfaces`` of this network namespace.

    ``arrived_by`` makes an interface index, 0 for none, of what a queue reader gives.
    """

    def __init__(self, arrived_by: Callable[[int], int]) -> None:
        self._arrived_by = arrived_by
        self._events: socket.socket | None = None

    def close(self) -> None:
        """Close the socket of events, if it was needed."""
        if self._events is not None:
            self._events.close()

    def changed(self) -> bool:
        """Whether links have come, gone or been renamed since the last call; at the first call True.

        Before that nothing listens, so that nobody who does not ask has events piling up.
        """
        if self._events is None:
            self._events = rtnetlink_socket.open_events(rtnetlink.RTMGRP_LINK)
            return True
        # All of them are taken, whatever they say.
        return bool(list(rtnetlink_socket.waiting_events(self._events)))

    def name(self, arrival: int) -> str | None:
        """The name of the interface, asked of the kernel; empty: sent by this node, None: it is gone."""
        index = self._arrived_by(arrival)
        if not index:
            return ""
        try:
            return socket.if_indextoname(index)
        except OSError:
            return None
