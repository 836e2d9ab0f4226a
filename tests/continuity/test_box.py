"""A box for fds: what is in it stays, whoever looks, for as long as somebody keeps it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.continuity.box import Box, close_all
from tests.wire.support import at_end


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """More than go into two messages."""
    made = [os.memfd_create(str(number)) for number in range(600)]
    yield made
    close_all(made)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def seen(box: Box) -> tuple[bytes, list[int]]:
    """The state in a box, and the inodes of what else is in it."""
    state, fds = box.look()
    found = inodes(fds)
    close_all(fds)
    return state, found


def test_what_is_in_it_is_seen_again_and_again_in_its_order(fds: list[int]) -> None:
    with closing(Box()) as box:
        assert seen(box) == (b"", [])
        box.put(fds)
        for _ in range(3):
            assert seen(box) == (b"", inodes(fds))
        box.drop(box.messages)
        assert seen(box) == (b"", [])
        box.put(fds[:1])
        assert seen(box) == (b"", inodes(fds[:1]))


def test_a_state_has_its_fds_behind_it_and_the_last_one_counts(fds: list[int]) -> None:
    with closing(Box()) as box:
        box.put(fds[:1])
        box.put_state(b"first", fds[1:2])
        box.put_state(b"second" * 100_000, fds[2:3])
        assert seen(box) == (b"second" * 100_000, inodes(fds[:3]))


def test_the_oldest_is_dropped_first(fds: list[int]) -> None:
    with closing(Box()) as box:
        for fd in fds[:5]:
            box.put([fd])
        box.put(fds[5:8])
        box.drop(4)
        assert seen(box) == (b"", inodes(fds[4:8]))


def test_it_holds_a_state_when_it_is_crowded(fds: list[int]) -> None:
    with closing(Box()) as box:
        while not box.is_crowded:
            box.put(fds[:1])
        before = box.messages
        box.put_state(b"state", fds * 80)
        assert box.messages > before + 80 * 600 // 253


def test_more_than_this_process_may_have(fds: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(Box()) as box:
        box.put(fds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 400, hard))
        try:
            for _ in range(2):
                with pytest.raises(OSError, match="Too many open files"):
                    box.look()
            box.drop(box.messages)
            assert box.look() == (b"", [])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_either_end_may_come_first_in_the_next_process(fds: list[int]) -> None:
    with closing(Box()) as box:
        box.put(fds)
        copies = [end.dup() for end in box.ends]
    for ends in (copies, [end.dup() for end in reversed(copies)]):
        with closing(Box(ends)) as found:
            assert seen(found) == (b"", inodes(fds))
            assert found.messages == len(fds) // 253 + 1


def test_peers_of_what_is_in_it_read_the_end_once_nobody_keeps_it() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with closing(Box()) as box:
            box.put([theirs.fileno()])
            theirs.close()
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        ours.settimeout(5)
        assert at_end(ours)
