"""A box for fds: what is in it stays, whoever looks, for as long as somebody keeps it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.continuity.box import Box
from tests.wire.support import at_end


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """More than go into two messages."""
    made = [os.memfd_create(str(number)) for number in range(600)]
    yield made
    for fd in made:
        os.close(fd)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def test_what_is_in_it_is_seen_again_and_again_in_its_order(fds: list[int]) -> None:
    with closing(Box()) as box:
        assert box.is_empty
        box.fill(fds)
        for _ in range(3):
            seen = box.look()
            assert inodes(seen) == inodes(fds)
            for fd in seen:
                os.close(fd)
        box.empty()
        assert box.is_empty
        box.fill(fds[:1])
        [seen_fd] = box.look()
        os.close(seen_fd)


def test_more_than_this_process_may_have(fds: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(Box()) as box:
        box.fill(fds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 400, hard))
        try:
            for _ in range(2):
                with pytest.raises(OSError, match="Too many open files"):
                    box.look()
            box.empty()
            assert box.is_empty
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_either_end_may_come_first_in_the_next_process(fds: list[int]) -> None:
    with closing(Box()) as box:
        box.fill(fds)
        copies = [end.dup() for end in box.ends]
    for ends in (copies, [end.dup() for end in reversed(copies)]):
        with closing(Box(ends)) as found:
            seen = found.look()
            assert inodes(seen) == inodes(fds)
            for fd in seen:
                os.close(fd)


def test_peers_of_what_is_in_it_read_the_end_once_nobody_keeps_it() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with closing(Box()) as box:
            box.fill([theirs.fileno()])
            theirs.close()
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        ours.settimeout(5)
        assert at_end(ours)


def test_it_is_known_whether_somebody_keeps_the_other_end() -> None:
    with closing(Box()) as box:
        with box.ends[1].dup():
            box.leave_to_keeper()
            assert box.is_kept
        assert not box.is_kept
