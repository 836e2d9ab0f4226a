"""A receipt says what was sent, and nothing else."""

from __future__ import annotations

import mmap
import socket

import pytest

from cc_proxy.linux.receipt import WORDS, Receipt, taken


@pytest.fixture
def words() -> memoryview:
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")[:WORDS]


def test_it_says_how_much_was_taken(words: memoryview) -> None:
    receipt = Receipt(words)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert taken(words) == 0
        receipt.send(ours.fileno(), b"hello")
        assert taken(words) == 5
        receipt.clear()
        assert taken(words) == 0
        receipt.send(ours.fileno(), b"")
        assert taken(words) == 0
        receipt.send(ours.fileno(), b" you")
        assert theirs.recv(100) == b"hello you"


def test_what_does_not_fit_is_not_taken(words: memoryview) -> None:
    receipt = Receipt(words)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(BlockingIOError):
            fill(receipt, ours)
        assert taken(words) == 0
        theirs.close()
        with pytest.raises(BrokenPipeError):
            receipt.send(ours.fileno(), b"hello")
        assert taken(words) == 0


def fill(receipt: Receipt, sock: socket.socket) -> None:
    while True:
        receipt.clear()
        receipt.send(sock.fileno(), bytes(4096))


def test_an_fd_goes_with_it(words: memoryview) -> None:
    receipt = Receipt(words)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receipt.send_fd(ours.fileno(), b"F", theirs.fileno())
        assert taken(words) == 1
        receipt.send(ours.fileno(), b"none")
        data, [fd], _, _ = socket.recv_fds(theirs, 1, 8)
        assert data == b"F"
        with socket.socket(fileno=fd) as passed:
            ours.send(b"!")
            assert socket.recv_fds(passed, 100, 8)[:2] == (b"none!", [])
