"""IP addresses and CIDRs as canonical text.

Kubernetes reads IPv4 parts with leading zeros as decimal (Go's ``ParseIPSloppy``) and an
IPv4-mapped IPv6 address as IPv4 (``net.IP.To4``); both are followed here, because the same text
must name the same address for kube-proxy and for nfqproxy.
"""

import ipaddress
import re

from nfqproxy.model import Family

_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_CANONICAL_IPV4 = re.compile(rf"(?:{_BYTE}\.){{3}}{_BYTE}")
_IPV4 = re.compile(r"([0-9]{1,10})\.([0-9]{1,10})\.([0-9]{1,10})\.([0-9]{1,10})")


def family_of(address: str) -> Family:
    """The family of an address in canonical form."""
    return Family.IPV6 if ":" in address else Family.IPV4


def canonical_ip(text: str) -> str:
    """The canonical form of an IP address; raises ValueError with a clause that fits a sentence."""
    if _CANONICAL_IPV4.fullmatch(text) is not None:
        return text  # nearly all, by the quickest way
    parts = _IPV4.fullmatch(text)
    if parts is not None:
        a, b, c, d = map(int, parts.groups())
        if a > 255 or b > 255 or c > 255 or d > 255:
            raise ValueError(f'"{text}" is not an IP address: a part is above 255')
        return f"{a}.{b}.{c}.{d}"
    if "%" in text:
        raise ValueError(f'"{text}" is not an IP address: leave out the zone after "%"')
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError(f'"{text}" is not an IP address') from None
    mapped = address.ipv4_mapped
    return str(mapped if mapped is not None else address)


def canonical_cidr(text: str) -> str:
    """The canonical form of ``ADDRESS/BITS`` with the host bits cleared; raises ValueError."""
    address, slash, bits = text.partition("/")
    if not slash or not bits.isascii() or not bits.isdecimal():
        raise ValueError(f'"{text}" is not a CIDR such as 10.0.0.0/8')
    ip = canonical_ip(address)
    mapped = ":" in address and ":" not in ip
    width = int(bits) - 96 if mapped else int(bits)
    if not 0 <= width <= (128 if ":" in ip else 32):
        raise ValueError(f'"{text}" is not a CIDR: /{bits} is out of range')
    return str(ipaddress.ip_network(f"{ip}/{width}", strict=False))
