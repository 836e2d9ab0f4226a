"""An fd over a socket: whatever comes instead of one is refused, and no fd of it stays open."""

from __future__ import annotations

import array
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.fdpassing import read_fd, write_fd


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@given(st.binary(max_size=3), st.integers(0, 5), st.binary(max_size=3))
def test_only_one_byte_with_one_fd_is_taken(tag: bytes, count: int, behind: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_fds()
        rights = array.array("i", [ours.fileno()] * count)
        if tag:
            theirs.sendmsg([tag], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else [])
        theirs.sendall(behind)
        theirs.shutdown(socket.SHUT_WR)
        if tag[:1] == b"F" and count == 1:
            fd = read_fd(ours, timeout=10)
            assert os.path.sameopenfile(fd, ours.fileno())
            assert not os.get_inheritable(fd)
            os.close(fd)
        else:
            with pytest.raises(ProtocolError):
                read_fd(ours, timeout=10)
        assert open_fds() == before


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_fd_comes_alone_between_what_is_sent_around_it(before: bytes, behind: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(before)
        write_fd(theirs, ours.fileno(), timeout=10)
        theirs.sendall(behind)
        assert ours.recv(len(before)) == before
        fd = read_fd(ours, timeout=10)
        try:
            assert os.path.sameopenfile(fd, ours.fileno())
        finally:
            os.close(fd)
        theirs.shutdown(socket.SHUT_WR)
        assert ours.recv(200) == behind
