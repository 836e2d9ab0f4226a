"""The generators' two ends of a flow, against each other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from bench.flow import End, Generator, StalledError
from bench.streams import WrongBytesError


@pytest.fixture
def sides() -> Iterator[tuple[Generator, Generator]]:
    """One with the ends that the other's are connected to, of three streams on two VMs."""
    one, other = Generator(), Generator()
    for vm, seq in ((0, 1), (0, 2), (1, 1)):
        for side, sock in zip((one, other), socket.socketpair(), strict=True):
            side.ends.append(End(sock, vm, (seq,)))
    for side in (one, other):
        side.prepare(1000, 20)
    yield one, other
    for side in (one, other):
        side.close_ends()


def test_everything_arrives(sides: tuple[Generator, Generator]) -> None:
    sender, receiver = sides
    times = []
    thread = threading.Thread(target=lambda: times.append(sender.send(50)))
    thread.start()
    ended = receiver.receive(50)
    thread.join()
    assert times[0] < ended


def test_streams_that_are_mixed_up_are_found(sides: tuple[Generator, Generator]) -> None:
    sender, receiver = sides
    sender.ends.reverse()
    sender.send(1)
    with pytest.raises(WrongBytesError, match="of VM"):
        receiver.receive(1)


def test_more_than_was_sent_is_found(sides: tuple[Generator, Generator]) -> None:
    sender, receiver = sides
    sender.send(2)
    with pytest.raises(WrongBytesError, match=r"more than|nobody sent"):
        receiver.receive(1)


def test_an_end_before_everything_has_come_is_found(sides: tuple[Generator, Generator]) -> None:
    sender, receiver = sides
    sender.send(1)
    sender.close_ends()
    with pytest.raises(StalledError, match="hung up before everything had come"):
        receiver.receive(2)


def test_nothing_to_receive(sides: tuple[Generator, Generator]) -> None:
    sides[1].receive(0)
