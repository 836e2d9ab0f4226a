"""Who may do what, as a table."""

from __future__ import annotations

import grp
import os
import pwd
from types import SimpleNamespace

import pytest

from cc_proxy.access import (
    Access,
    GroupId,
    UserId,
    is_admin,
    look_up_again,
    may_connect,
    may_operate,
    may_use,
    names_others,
    unknown_names,
)
from cc_proxy.linux.credentials import Credentials
from tests.users import call_as, needs_root

# Nobody's numbers: whoever runs the tests is none of them.
OWNER, USER, STRANGER = 54_321, 54_322, 54_323
MEMBERS, ADMINS = 54_900, 54_901
#: The daemon's own user.
DAEMON = Credentials(0, 54_377, 54_377)
ACCESS = Access(users=(UserId(OWNER), UserId(USER)), groups=(GroupId(MEMBERS),), admins=(GroupId(ADMINS),))

# Whether one may connect, use Owner's VM, and operate the daemon.
TABLE = {
    "root": (Credentials(1, 0, 5), True, True, True),
    "the daemon's own user": (Credentials(1, DAEMON.uid, 5), True, False, True),
    "the owner": (Credentials(1, OWNER, 5), True, True, False),
    "another user": (Credentials(1, USER, 5), True, False, False),
    "a member": (Credentials(1, STRANGER, MEMBERS), True, False, False),
    "a member by the way": (Credentials(1, STRANGER, 5, (4, MEMBERS)), True, False, False),
    "an admin": (Credentials(1, STRANGER, ADMINS), True, True, True),
    "an admin by the way": (Credentials(1, STRANGER, 5, (ADMINS,)), True, True, True),
    "a stranger": (Credentials(1, STRANGER, OWNER, (USER,)), False, False, False),
}


@needs_root
@pytest.mark.parametrize("who", TABLE)
def test_who_may_do_what(who: str) -> None:
    client, connects, uses, operates = TABLE[who]

    def may() -> tuple[bool, ...]:
        use = may_use(ACCESS, client, OWNER), is_admin(ACCESS, client)
        return may_connect(ACCESS, client), may_operate(ACCESS, client), *use

    assert call_as(DAEMON, may) == (connects, operates, uses, uses and client.uid != OWNER)


def test_by_default_the_daemons_group_may_connect_and_only_root_is_an_admin() -> None:
    member = Credentials(1, STRANGER, 5, (os.getegid(),))
    assert may_connect(Access(), member)
    assert not is_admin(Access(), member)
    assert not may_connect(Access(groups=()), member)


@pytest.mark.parametrize(
    ("access", "others"),
    [
        (Access(), False),
        (Access(users=(UserId(0), UserId(os.geteuid())), groups=()), False),
        (Access(users=(UserId(OWNER),)), True),
        (Access(groups=(GroupId(MEMBERS),)), True),
        (Access(admins=(GroupId(ADMINS),)), True),
    ],
)
def test_whether_the_socket_is_for_others_than_the_daemons_group(access: Access, others: bool) -> None:
    assert names_others(access) is others


def test_a_name_that_nobody_has_lets_nobody_in_until_somebody_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the name service is not up yet."""
    access = Access(users=(UserId.resolve("later"),), groups=(), admins=(GroupId.resolve("later"),))
    client = Credentials(1, USER, MEMBERS)
    assert unknown_names(access) == ["later", "later"]
    assert not may_connect(access, client)
    assert names_others(access), "the socket is theirs already"
    assert look_up_again(access) == access
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_uid={"later": USER}[name]))
    access = look_up_again(access)
    assert unknown_names(access) == ["later"]
    assert may_connect(access, client)
    assert not is_admin(access, client)
    monkeypatch.setattr(grp, "getgrnam", lambda name: SimpleNamespace(gr_gid={"later": MEMBERS}[name]))
    assert is_admin(look_up_again(access), client)
