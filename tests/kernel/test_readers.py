"""The project's own queue reader against messages that the kernel lays out in many ways."""

import select
import socket

from nfqproxy.kernel.netns import NamespaceGroup
from nfqproxy.worker.readers import Answer, NetlinkReader

QUEUE = 120


def test_mixed_layouts_are_read_and_remembered() -> None:
    """Sizes beyond the copy range, marks and priorities add attributes; all of them interleaved."""
    with NamespaceGroup() as group:
        group.declare(["host"])
        group.create(["host"])
        host = group["host"]
        host.ip("link set lo up")
        target = f"NFQUEUE --queue-num {QUEUE}"
        host.run("iptables", "-t", "raw", "-A", "OUTPUT", "-p", "udp", "-j", *target.split())
        reader = host.call(lambda: NetlinkReader(QUEUE))
        reader.queue_socket.set_length(1000)
        senders = [host.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(4)]
        sink = host.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sink.bind(("127.0.0.1", 0))
            sink.settimeout(5)
            senders[1].setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
            senders[2].setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 5)
            sent = [
                b"%d:" % number + b"x" * (500 if number % 3 == 0 else 20) for number in range(60)
            ]
            for number, text in enumerate(sent):
                senders[number % 4].sendto(text, sink.getsockname())
            read: list[bytes] = []
            layouts = []
            while len(read) < len(sent):
                assert select.select([reader.fileno()], [], [], 5)[0], "a packet is missing"
                packets = reader.read()
                read += [payload for _id, _hook, payload in packets]
                reader.answer(packets, Answer())
                layouts.append(len(reader._layouts))
            # IPv4 header 20 bytes, UDP header 8, cut at 128.
            assert [payload[28:128] for payload in read] == [text[:100] for text in sent]
            assert [sink.recv(1000) for _ in sent] == sent
            # One for each combination, plus the one it starts with: none was learnt twice.
            assert layouts[-1] <= 1 + 3 * 2
        finally:
            for sock in (*senders, sink):
                sock.close()
            reader.queue_socket.release()
        assert reader.verdict_errors == 0
