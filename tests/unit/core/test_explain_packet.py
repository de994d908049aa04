"""The packet as a person writes it."""

import pytest

from nfqproxy.core.explain import Packet, parse_packet
from nfqproxy.errors import InputError
from nfqproxy.model import Protocol


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (
            "10.0.0.2",
            "172.30.0.41:80/tcp",
            Packet(source="10.0.0.2", destination="172.30.0.41", protocol=Protocol.TCP, port=80),
        ),
        (
            "010.0.0.2%veth1234@if5",
            "10.96.0.10:53/udp",
            Packet(
                source="10.0.0.2",
                interface="veth1234@if5",
                destination="10.96.0.10",
                protocol=Protocol.UDP,
                port=53,
            ),
        ),
        (
            "10.0.0.2",
            "172.30.0.41:80/TCP",  # as manifests write it
            Packet(source="10.0.0.2", destination="172.30.0.41", protocol=Protocol.TCP, port=80),
        ),
        (
            "FD00::1%eth0",
            "[fd00:10:96::0010]:65535/sctp",
            Packet(
                source="fd00::1",
                interface="eth0",
                destination="fd00:10:96::10",
                protocol=Protocol.SCTP,
                port=65535,
            ),
        ),
        (
            "[fd00::1]",
            "fd00::2/icmpv6",
            Packet(source="fd00::1", destination="fd00::2", protocol=None, port=0),
        ),
        (
            "10.0.0.2",
            "10.0.0.3/icmp",
            Packet(source="10.0.0.2", destination="10.0.0.3", protocol=None, port=0),
        ),
    ],
)
def test_packets(source: str, destination: str, expected: Packet) -> None:
    packet = parse_packet(source, destination)
    assert packet == expected
    # As the running proxy is asked.
    assert parse_packet(source, str(packet)) == expected


@pytest.mark.parametrize(
    ("source", "destination", "problem"),
    [
        ("10.0.0", "10.0.0.3:80/tcp", '"10.0.0" is not an IP address'),
        ("10.0.0.256", "10.0.0.3:80/tcp", "a part is above 255"),
        ("10.0.0.2:4000", "10.0.0.3:80/tcp", "without a port"),
        ("10.0.0.2%", "10.0.0.3:80/tcp", "no name of an interface"),
        ("10.0.0.2%much-too-long-name", "10.0.0.3:80/tcp", "no name of an interface"),
        ("", "10.0.0.3:80/tcp", '"" is not an IP address'),
        ("10.0.0.2", "", "names no protocol"),
        ("10.0.0.2", "10.0.0.3", "names no protocol"),
        ("10.0.0.2", "10.0.0.3:80", "names no protocol"),
        ("10.0.0.2", "10.0.0.3:80/", '"" is no protocol'),
        ("10.0.0.2", "10.0.0.3:80/tpc", '"tpc" is no protocol'),
        ("10.0.0.2", "10.0.0.3/tcp", "names no port"),
        ("10.0.0.2", "10.0.0.3:/tcp", '"" is no port'),
        ("10.0.0.2", "10.0.0.3:0/tcp", '"0" is no port'),
        ("10.0.0.2", "10.0.0.3:65536/tcp", '"65536" is no port'),
        ("10.0.0.2", "10.0.0.3:٣/tcp", "is no port"),
        ("10.0.0.2", "example.com:80/tcp", '"example.com" is not an IP address'),
        ("fd00::1", "fd00::2:80/tcp", "names no port"),
        ("fd00::1", "10.0.0.3:80/tcp", "one family"),
        ("10.0.0.2", "10.0.0.3/icmpv6", "other address family"),
    ],
)
def test_bad_packets_are_answered_in_one_sentence(
    source: str, destination: str, problem: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_packet(source, destination)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
