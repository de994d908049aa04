"""The channel's framing over a real socket pair, with descriptors, in pieces and cut off."""

import os
import socket
import threading

import pytest

from nfqproxy.api import channel


def test_bound_carries_a_descriptor() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        channel.send_bound(theirs, writing)
        message, descriptor = channel.receive_bound(ours)
    assert isinstance(message, channel.Bound)
    assert descriptor is not None
    os.close(writing)
    os.write(descriptor, b"x")
    os.close(descriptor)
    assert os.read(reading, 2) == b"x"
    os.close(reading)


def test_a_failure_comes_instead() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(channel.encode(channel.Failed("queue 100 is taken")))
        assert channel.receive_bound(ours) == (channel.Failed("queue 100 is taken"), None)


def test_a_frame_in_single_bytes_is_put_together() -> None:
    ours, theirs = socket.socketpair()
    frame = channel.encode(channel.Failed("x" * 300))

    def trickle() -> None:
        for index in range(len(frame)):
            theirs.send(frame[index : index + 1])

    with ours, theirs:
        sender = threading.Thread(target=trickle)
        sender.start()
        message, _ = channel.receive_bound(ours)
        sender.join()
    assert message == channel.Failed("x" * 300)


def test_the_next_frame_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(channel.encode(channel.Failed("a")) + channel.encode(channel.Applied(7)))
        channel.receive_bound(ours)
        assert ours.recv(100) == channel.encode(channel.Applied(7))


@pytest.mark.parametrize("length", range(5))
def test_a_worker_that_ends_early_is_a_connection_error(length: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(channel.encode(channel.Bound())[:length])
        with pytest.raises(ConnectionError, match="ended before"):
            channel.receive_bound(ours)
