"""The packet asked about: the first packet of a new connection, as a person writes it."""

import re

from msgspec import Struct

from nfqproxy.control.address import canonical_ip, family_of
from nfqproxy.errors import InputError
from nfqproxy.model import Family, Protocol

_PROTOCOLS = {protocol.name.lower(): protocol for protocol in Protocol}
_ICMP = {"icmp": Family.IPV4, "icmpv6": Family.IPV6}
_EXAMPLE = "write it like 10.96.0.10:80/tcp or [fd00:10:96::10]:80/tcp"
# linux/if.h, IFNAMSIZ; net/core/dev.c, dev_valid_name.
_INTERFACE = re.compile(r"[^\s/:%]{1,15}")


class Packet(Struct, frozen=True, kw_only=True):
    """Addresses are in canonical form and of one family."""

    source: str
    interface: str | None = None
    """The interface the packet came in by; None: not said, or sent by the node itself."""
    destination: str
    protocol: Protocol | None
    """None: ICMP, an echo request."""
    port: int
    """Destination port, 0 with ICMP."""

    @property
    def family(self) -> Family:
        """The family of both addresses."""
        return family_of(self.destination)

    def __str__(self) -> str:
        if self.protocol is None:
            return f"{self.destination}/{'icmp' if self.family is Family.IPV4 else 'icmpv6'}"
        host = f"[{self.destination}]" if ":" in self.destination else self.destination
        return f"{host}:{self.port}/{self.protocol.name.lower()}"


def parse_packet(source: str, destination: str) -> Packet:
    """The packet from ``IP[%iface]`` to ``IP:PORT/tcp|udp|sctp``, ``IP/icmp`` or ``IP/icmpv6``.

    IPv6 stands in brackets before a port, and may elsewhere. Raises InputError.
    """
    address, interface = _source(source)
    target, protocol, port = _destination(destination)
    if family_of(address) is not family_of(target):
        raise InputError(
            f'from "{source}" is of IPv{int(family_of(address))} and to "{destination}" of'
            f" IPv{int(family_of(target))}; give two addresses of one family"
        )
    return Packet(
        source=address, interface=interface, destination=target, protocol=protocol, port=port
    )


def _source(text: str) -> tuple[str, str | None]:
    address, percent, interface = text.partition("%")
    if percent and _INTERFACE.fullmatch(interface) is None:
        raise InputError(
            f'from "{text}": "{interface}" is no name of an interface; write IP%IFACE like 10.0.0.2%eth0'
        )
    try:
        return canonical_ip(_bare(address)), interface or None
    except ValueError as error:
        raise InputError(
            f"from: {error}; write IP or IP%IFACE without a port, like 10.0.0.2 or 10.0.0.2%eth0"
        ) from None


def _destination(text: str) -> tuple[str, Protocol | None, int]:
    place, slash, word = text.rpartition("/")
    if not slash:
        raise InputError(f'to "{text}" names no protocol; {_EXAMPLE}')
    word = word.lower()  # manifests write TCP
    if word in _ICMP:
        address = _address(place, text)
        if family_of(address) is not _ICMP[word]:
            raise InputError(f'to "{text}": {word} is of the other address family')
        return address, None, 0
    if word not in _PROTOCOLS:
        known = ", ".join((*_PROTOCOLS, *_ICMP))
        raise InputError(f'to "{text}": "{word}" is no protocol of a Service; known are {known}')
    host, colon, number = place.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or host.endswith(":"):
        raise InputError(f'to "{text}" names no port; {_EXAMPLE}')
    if not number.isascii() or not number.isdecimal() or not 1 <= int(number) <= 65_535:
        raise InputError(f'to "{text}": "{number}" is no port; give 1 to 65535')
    return _address(host, text), _PROTOCOLS[word], int(number)


def _address(host: str, text: str) -> str:
    try:
        return canonical_ip(_bare(host))
    except ValueError as error:
        raise InputError(f'to "{text}": {error}; {_EXAMPLE}') from None


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
