import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfqproxy.control.address import canonical_cidr, canonical_ip, family_of
from nfqproxy.model import Family


@given(st.ip_addresses())
def test_every_address_comes_back_in_the_form_of_ipaddress(address):
    expected = address
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        expected = address.ipv4_mapped
    assert canonical_ip(str(address)) == str(expected)
    assert canonical_ip(address.exploded) == str(expected)
    assert family_of(canonical_ip(str(address))) == Family(expected.version)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("010.001.0.08", "10.1.0.8"),  # decimal, not octal: kpng's note, Go's ParseIPSloppy
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("FD00:0010:96::0070", "fd00:10:96::70"),
    ],
)
def test_unusual_spellings_are_read_as_kubernetes_reads_them(text, expected):
    assert canonical_ip(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0", "10.0.0.256", "10.0.0.0.1", "10.0.0.1/32", " 10.0.0.1", "fe80::1%eth0", "web",
     "\u0661.1.1.1", ":::", "10.0.0.-1", "10.0.0.+1", "10.0.0.1_0"],
)  # fmt: skip
def test_what_is_no_address_is_refused_by_its_text(text):
    with pytest.raises(ValueError, match="is not an IP address") as caught:
        canonical_ip(text)
    assert f'"{text}"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("010.0.0.0/08", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::1/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("::ffff:10.0.0.9/104", "10.0.0.0/8"),
    ],
)
def test_cidrs_lose_their_host_bits(text, expected):
    assert canonical_cidr(text) == expected


@pytest.mark.parametrize(
    "text",
    ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "x/8", "::/129", "::ffff:1.2.3.4/8",
     "/8", "1.2.3.4/\u00b2"],
)  # fmt: skip
def test_what_is_no_cidr_is_refused(text):
    with pytest.raises(ValueError, match="is not"):
        canonical_cidr(text)
