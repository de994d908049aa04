"""Which address the node's MASQUERADE would give a packet to a backend, and which addresses it has.

A process (each worker, and the supervisor at its start) asks the kernel's routing table when a backend
is first masqueraded to, and forgets all answers when a route, address or link changes, so that nothing
stale is used and nothing is asked twice.

MASQUERADE takes the first address of the egress interface that suits the next hop
(net/netfilter/nf_nat_masquerade.c, inet_select_addr; for IPv6 ipv6_dev_get_saddr, which is what the
route look-up answers with), not the ``src`` hint of the route.
"""

from collections.abc import Iterator

from nfqproxy.kernel import rtnetlink_socket
from nfqproxy.wire import nlmsg, rtnetlink

_GROUPS = (
    rtnetlink.RTMGRP_LINK
    | rtnetlink.RTMGRP_IPV4_IFADDR
    | rtnetlink.RTMGRP_IPV4_ROUTE
    | rtnetlink.RTMGRP_IPV6_IFADDR
    | rtnetlink.RTMGRP_IPV6_ROUTE
)
_ROUTE_EVENTS = frozenset({rtnetlink.RTM_NEWROUTE, rtnetlink.RTM_DELROUTE})


class Routes:
    """Route and address look-ups with a cache that follows the kernel's events."""

    def __init__(self) -> None:
        self._requests = rtnetlink_socket.open_requests()
        self._events = rtnetlink_socket.open_events(_GROUPS)
        self._sequence = 0
        self._cache: dict[bytes, bytes | None] = {}
        self._addresses: list[rtnetlink.InterfaceAddress] = []
        self._has_addresses = False

    def fileno(self) -> int:
        """The event socket: readable when something changed; call ``changed`` then."""
        return self._events.fileno()

    def close(self) -> None:
        """Close both sockets."""
        self._requests.close()
        self._events.close()

    def changed(self) -> bool:
        """Take all waiting events; True when routes, addresses or links may have changed.

        Addresses are listed anew only when they may have: routes of other nodes' pods come and go far
        more often, and a list of some hundred addresses takes milliseconds.
        """
        seen = False
        for kind in rtnetlink_socket.waiting_events(self._events):
            seen = True
            if kind not in _ROUTE_EVENTS:
                self._has_addresses = False
        if seen:
            self._cache.clear()
        return seen

    def addresses(self) -> list[rtnetlink.InterfaceAddress]:
        """All addresses of the network namespace's interfaces, in the kernel's order.

        The very same list as long as nothing has changed.
        """
        if not self._has_addresses:
            self._addresses = [
                address
                for family in (nlmsg.AF_INET, nlmsg.AF_INET6)
                for address in self._dump_addresses(family)
            ]
            self._has_addresses = True
        return self._addresses

    def masquerade_source(self, destination: bytes) -> bytes | None:
        """The packed source address towards a packed address.

        None when there is no route, empty when the address is the node's own: what is delivered here
        never passes POSTROUTING, so MASQUERADE leaves it as it is.
        """
        try:
            return self._cache[destination]
        except KeyError:
            pass
        try:
            found = self._look_up(destination)
        except OSError:
            return None  # no answer this time
        self._cache[destination] = found
        return found

    def _look_up(self, destination: bytes) -> bytes | None:
        route = None
        self._sequence += 1
        for message in self._request(rtnetlink.get_route(destination, self._sequence)):
            if message.type == rtnetlink.RTM_NEWROUTE:
                route = rtnetlink.parse_route(message.payload)
        if route is None:
            return None
        if route.type == rtnetlink.RTN_LOCAL:
            return b""
        if len(destination) == 4 and route.oif is not None:
            chosen = self._select_ipv4(route.oif, route.gateway or destination)
            if chosen is not None:
                return chosen
        return route.prefsrc

    def _select_ipv4(self, interface: int, next_hop: bytes) -> bytes | None:
        """inet_select_addr on one interface: an address whose subnet holds the next hop, else the first."""
        first = None
        hop = int.from_bytes(next_hop)
        for address in self.addresses():
            if (
                address.ifindex != interface
                or len(address.address) != 4
                or address.is_secondary
                or address.scope >= rtnetlink.RT_SCOPE_LINK
            ):
                continue
            shift = 32 - address.prefix_length
            if int.from_bytes(address.address) >> shift == hop >> shift:
                return address.address
            first = first or address.address
        return first

    def _dump_addresses(self, family: int) -> Iterator[rtnetlink.InterfaceAddress]:
        self._sequence += 1
        for message in self._request(rtnetlink.dump_addresses(family, self._sequence)):
            if message.type == rtnetlink.RTM_NEWADDR:
                yield rtnetlink.parse_address(message.payload)

    def _request(self, request: bytes) -> Iterator[nlmsg.Message]:
        """The answers to one request, up to the end of a dump, an error or a single answer."""
        self._requests.send(request)
        while True:
            for message in nlmsg.messages(self._requests.recv(rtnetlink_socket.ANSWER_BYTES)):
                if message.seq != self._sequence:
                    continue
                if message.type in (nlmsg.NLMSG_ERROR, nlmsg.NLMSG_DONE):
                    return
                yield message
                if not message.flags & nlmsg.NLM_F_MULTI:
                    return
