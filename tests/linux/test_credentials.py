"""Whom a client is, and acting as that client: what the kernel says of the threads meanwhile."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cc_proxy.linux.credentials import CannotAct, Credentials
from tests.users import ALICE, BOB, ROOT, call_as, needs_root

RIGHTS = ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapInh", "CapAmb")


def rights() -> dict[str, list[str]]:
    """Of the thread that asks: real, effective, saved and file system's ids, and so on."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: fields[name].split() for name in RIGHTS}


def test_a_peer_is_this_process() -> None:
    near, far = socket.socketpair()
    with near, far:
        who = Credentials.of_peer(near)
    assert who == Credentials.own()
    assert who.pid == os.getpid()
    assert (who.uid, who.gid, set(who.groups)) == (os.geteuid(), os.getegid(), set(os.getgroups()))


@needs_root
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5_000])
def test_a_peer_has_all_its_groups(count: int) -> None:
    user = Credentials(os.getpid(), 2**32 - 2, 54_321, tuple(range(70_000, 70_000 + count)))
    near, far = call_as(user, socket.socketpair)
    with near, far:
        assert Credentials.of_peer(near) == user


@needs_root
def test_acting_as_a_user_has_nothing_of_root_but_what_no_other_process_can_use() -> None:
    """The real ids stay: by them the kernel says who may send a signal, or trace."""
    before = rights()
    during = call_as(BOB, rights)
    uid, gid = str(BOB.uid), str(BOB.gid)
    assert during["Uid"] == ["0", uid, "0", uid]
    assert during["Gid"] == [before["Gid"][0], gid, before["Gid"][2], gid]
    assert during["Groups"] == ["54321"]
    assert {during[name][0] for name in RIGHTS[3:]} == {"0" * 16}
    assert rights() == before


@needs_root
def test_acting_as_a_user_changes_no_other_thread(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        assert leave.wait(10)

    before = rights()
    thread = threading.Thread(target=call_as, args=(ALICE, stay))
    thread.start()
    try:
        assert inside.wait(10)
        assert rights() == before
        (tmp_path / "root's").write_text("")
    finally:
        leave.set()
        thread.join()


@needs_root
def test_what_a_user_may_not_do_it_does_not_do(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("")
    secret.chmod(0o600)
    with pytest.raises(PermissionError):
        call_as(ALICE, secret.read_text)
    assert call_as(ROOT, secret.read_text) == ""


def test_what_it_returns_or_raises_is_passed_on() -> None:
    own = Credentials.own()
    assert call_as(own, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_as(own, lambda: 1 // 0)


@needs_root
def test_errors_are_passed_on_from_another_user() -> None:
    with pytest.raises(ZeroDivisionError):
        call_as(ALICE, lambda: 1 // 0)


@needs_root
@pytest.mark.parametrize(
    "nobody",
    [
        Credentials(0, 2**32 - 1, 54_321),  # which would be no change
        Credentials(0, 54_321, 2**32 - 1),
        Credentials(0, 54_321, 54_321, (2**32 - 1,)),
    ],
)
def test_who_cannot_be_is_refused_before_anything_is_done(nobody: Credentials) -> None:
    done: list[bool] = []
    with pytest.raises(CannotAct, match=f"the daemon cannot act as user {nobody.uid}: "):
        call_as(nobody, lambda: done.append(True))
    assert not done


ALICES_DAEMON = """
import os
from cc_proxy.linux.credentials import CannotAct, Credentials
from tests.users import call_as

os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
for who in (Credentials(0, 54322, 54321), Credentials(0, 0, 0), Credentials(0, 54321, 54321, (7,))):
    try:
        call_as(who, lambda: print("done"))
    except CannotAct as error:
        print(error)
print(call_as(Credentials(0, 54321, 54321), os.geteuid))
"""


@needs_root
def test_without_the_rights_to_it_nothing_is_done() -> None:
    """Not even for the same user if that has other groups: it might be kept out for one of them."""
    result = subprocess.run([sys.executable, "-c", ALICES_DAEMON], capture_output=True, text=True, check=True)
    refusals = [
        f"the daemon cannot act as user {uid}: Operation not permitted" for uid in (54_322, 0, 54_321)
    ]
    assert result.stdout.splitlines() == [*refusals, "54321"]


@needs_root
@pytest.mark.parametrize("machine", ["m68k", ""])
def test_machine_that_nobody_has_tried(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(CannotAct, match=rf"not known how on this machine \({machine}\)"):
        call_as(ALICE, lambda: None)
