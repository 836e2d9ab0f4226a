"""A box for fds: what is in it stays, whoever looks, for as long as somebody keeps it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest

from cc_proxy.continuity.box import Box, close_all
from cc_proxy.linux.fds import Identity, identity_of
from tests.wire.support import at_end


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """More than go into two messages."""
    made = [os.memfd_create(str(number)) for number in range(600)]
    yield made
    close_all(made)


def inodes(fds: Iterable[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def known(*fds: int) -> dict[int, Identity]:
    return {fd: identity_of(fd) for fd in fds}


def seen(box: Box) -> tuple[bytes, list[int]]:
    """The state in a box, and the inodes of what else is in it."""
    state, fds = box.look()
    found = inodes(fds)
    close_all(fds)
    return state, found


def test_what_is_in_it_is_seen_again_and_again_in_its_order(fds: list[int]) -> None:
    with closing(Box()) as box:
        assert seen(box) == (b"", [])
        box.put(known(*fds))
        for _ in range(3):
            assert seen(box) == (b"", inodes(fds))
        box.drop(box.messages)
        assert seen(box) == (b"", [])
        box.put(known(*fds[:1]))
        assert seen(box) == (b"", inodes(fds[:1]))


def test_a_state_has_its_fds_behind_it_and_the_last_one_counts(fds: list[int]) -> None:
    with closing(Box()) as box:
        box.put(known(*fds[:1]))
        box.put_state(b"first", known(*fds[1:2]))
        box.put_state(b"second" * 100_000, known(*fds[2:3]))
        assert seen(box) == (b"second" * 100_000, inodes(fds[:3]))


def test_the_oldest_is_dropped_first(fds: list[int]) -> None:
    with closing(Box()) as box:
        for fd in fds[:5]:
            box.put(known(fd))
        box.put(known(*fds[5:8]))
        box.drop(4)
        assert seen(box) == (b"", inodes(fds[4:8]))


def test_a_state_does_not_bring_what_is_there(fds: list[int]) -> None:
    with closing(Box()) as box:
        box.put(known(*fds[:2]))
        box.put_state(b"state", known(*fds[:3]))
        assert seen(box) == (b"state", inodes(fds[:3]))
        copies = [end.dup() for end in box.ends]
        with closing(Box(copies)) as found:
            seen(found)
            found.put_state(b"next", known(*fds[:4]))
            assert seen(found) == (b"next", inodes(fds[:4]))


def test_what_is_packed_is_all_that_stays(fds: list[int]) -> None:
    with closing(Box()) as box:
        for fd in fds[:300]:
            box.put(known(fd))
        box.put_state(b"state", known(*fds[300:400]))
        assert box.is_crowded
        box.pack(known(*fds[100:350]))
        assert seen(box) == (b"", inodes(fds[100:350]))
        assert box.messages == 1
        box.pack(known(*fds))  # some of which are not there
        assert sorted(seen(box)[1]) == sorted(inodes(fds))
        assert box.messages == 3
        box.pack({})
        assert seen(box) == (b"", [])
        box.put(known(*fds[:3]))
        assert seen(box) == (b"", inodes(fds[:3]))


def test_nothing_is_ever_missing_while_it_is_packed(fds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Box()) as box:
        box.put(known(*fds))
        most = 0
        drop = box.drop

        def look_and_drop(messages: int) -> None:
            nonlocal most
            most = max(most, len(seen(box)[1]))
            drop(messages)
            assert set(inodes(fds)) <= set(seen(box)[1])

        monkeypatch.setattr(box, "drop", look_and_drop)
        for _ in range(3):
            box.pack(known(*reversed(fds)))
        assert most <= len(fds) + 253


def test_it_holds_a_state_when_it_is_crowded(fds: list[int]) -> None:
    with closing(Box()) as box:
        while not box.is_crowded:
            box.put(known(*fds[:1]))
        before = box.messages
        box.put_state(b"state", {})
        for _ in range(64):
            box.put(known(*fds))
        assert box.messages == before + 1 + 64 * 3


def test_more_than_this_process_may_have(fds: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(Box()) as box:
        box.put(known(*fds))
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
        box.put(known(*fds))
        copies = [end.dup() for end in box.ends]
    for ends in (copies, [end.dup() for end in reversed(copies)]):
        with closing(Box(ends)) as found:
            assert seen(found) == (b"", inodes(fds))
            assert found.messages == len(fds) // 253 + 1


def test_peers_of_what_is_in_it_read_the_end_once_nobody_keeps_it() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with closing(Box()) as box:
            box.put(known(theirs.fileno()))
            theirs.close()
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        ours.settimeout(5)
        assert at_end(ours)
