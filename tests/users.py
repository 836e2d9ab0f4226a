"""Other users of this host, for tests that run as root."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from cc_proxy.linux import credentials
from cc_proxy.linux.credentials import Credentials, become

T = TypeVar("T")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")

#: Nobody's numbers, so that nothing on the host is theirs.
ALICE = Credentials(0, 54_321, 54_321, ())
BOB = Credentials(0, 54_322, 54_322, (54_321,))  # of Alice's group
MALLORY = Credentials(0, 54_323, 54_323, ())
#: A member of a group that settings may call admins.
ADMIN = Credentials(0, 54_324, 54_324, (54_900,))
ADMINS = 54_900
ROOT = Credentials(0, 0, 0, ())


def give(path: Path, user: Credentials, mode: int = 0o700) -> None:
    """Make `path` the user's alone."""
    os.chown(path, user.uid, user.gid)
    os.chmod(path, mode)


def call_as(who: Credentials, function: Callable[[], T]) -> T:
    """Calls `function` with the rights of `who`, in a thread of its own that is never anybody else again."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            become(who)
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome.result()


def count_as_oneself() -> None:
    """Have what the calling thread puts in flight counted as its own user's, and not as root's.

    For that the kernel goes by the real uid, which `become` leaves as it was.
    """
    *_, setresuid = credentials._calls()  # glibc's own would change all threads
    assert not ctypes.CDLL(None).syscall(setresuid, ctypes.c_uint(os.geteuid()), -1, -1)


#: Starts a daemon as another user without any rights, though only root may be able to read its code.
AS_ALICE = [
    sys.executable,
    "-c",
    f"""
import os, sys
from cc_proxy.cli.daemon import build_parser, main
build_parser()  # which imports what it needs
os.setgroups([])
os.setresgid({ALICE.gid}, {ALICE.gid}, {ALICE.gid})
os.setresuid({ALICE.uid}, {ALICE.uid}, {ALICE.uid})
sys.exit(main(sys.argv[4:]))
""",
]

#: The same, with the rights that its unit gives it.
_CAPABILITIES = "+dac_override,+setuid,+setgid"
AS_SERVICE = [
    "setpriv",
    f"--reuid={ALICE.uid}",
    f"--regid={ALICE.gid}",
    "--clear-groups",
    f"--inh-caps=-all,{_CAPABILITIES}",
    f"--ambient-caps=-all,{_CAPABILITIES}",
]
