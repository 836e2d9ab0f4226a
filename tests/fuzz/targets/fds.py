"""What comes over a socket where one byte `F` with one fd should.

`ProtocolError` may be raised where it did not come, and there only; whatever fds came are closed.
"""

from __future__ import annotations

import array
import os
import socket

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.fdpassing import read_fd
from tests.fuzz.choices import Choices


def run(choices: Choices) -> None:
    """Any bytes, with any number of fds."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        count, tag = choices.number(5), choices.pick((b"F", b"F", b"F?", b"?", b""))
        rights = array.array("i", [ours.fileno()] * count)
        if tag:
            theirs.sendmsg([tag], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else [])
        theirs.sendall(choices.raw())
        theirs.shutdown(socket.SHUT_WR)
        before = len(os.listdir("/proc/self/fd"))
        try:
            os.close(read_fd(ours, timeout=10))
        except ProtocolError:
            assert tag[:1] != b"F" or count != 1
        else:
            assert tag[:1] == b"F"
            assert count == 1
        assert len(os.listdir("/proc/self/fd")) == before
