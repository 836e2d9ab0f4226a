"""Who may do what: the one place where that is decided. No I/O but for the names of users and groups."""

import grp
import os
import pwd
from collections.abc import Callable

import msgspec

from cc_proxy.linux.credentials import ROOT, Credentials

#: What settings call the group that the daemon runs as.
OWN_GROUP = "@daemon"

_HIGHEST_ID = 2**32 - 2


class UserId(int):
    """A user, which settings give by name or number."""

    @classmethod
    def resolve(cls, given: object) -> "UserId":
        """Return the user's number. Raises `ValueError`."""
        return cls(_resolve(given, "user", lambda name: pwd.getpwnam(name).pw_uid))


class GroupId(int):
    """A group, which settings give by name or number."""

    @classmethod
    def resolve(cls, given: object) -> "GroupId":
        """Return the group's number. Raises `ValueError`."""
        if given == OWN_GROUP:
            return cls.own()
        return cls(_resolve(given, "group", lambda name: grp.getgrnam(name).gr_gid))

    @classmethod
    def own(cls) -> "GroupId":
        """Return the group that the daemon runs as."""
        return cls(os.getegid())


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may connect, and use what. Names are numbers here: of the moment when the file was read."""

    users: tuple[UserId, ...] = ()
    groups: tuple[GroupId, ...] = msgspec.field(default_factory=lambda: (GroupId.own(),))
    admins: tuple[GroupId, ...] = ()


def may_connect(access: Access, who: Credentials) -> bool:
    """Whether a client is served at all."""
    return may_operate(access, who) or who.uid in access.users or not who.all_groups.isdisjoint(access.groups)


def names_others(access: Access) -> bool:
    """Whether any may connect but root, the daemon's own user and its own group."""
    users = {ROOT, os.geteuid()}.issuperset(access.users)
    return not (users and {GroupId.own()}.issuperset((*access.groups, *access.admins)))


def may_use(access: Access, who: Credentials, owner: int) -> bool:
    """Whether a client may use, or hear of, a VM that the user `owner` has registered."""
    return who.uid == owner or is_admin(access, who)


def is_admin(access: Access, who: Credentials) -> bool:
    """Whether a client may use every VM."""
    return who.uid == ROOT or not who.all_groups.isdisjoint(access.admins)


def may_operate(access: Access, who: Credentials) -> bool:
    """Whether a client may change how the daemon does its work."""
    return who.uid == os.geteuid() or is_admin(access, who)


def _resolve(given: object, kind: str, look_up: Callable[[str], int]) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        if 0 <= given <= _HIGHEST_ID:
            return given
        raise ValueError(f"{given} is no {kind}'s number")
    if not isinstance(given, str):
        raise ValueError(f"expected a {kind}'s name or number, got {given!r}")
    try:
        return look_up(given)
    except (KeyError, ValueError):  # a name with a NUL in it
        raise ValueError(f"there is no {kind} {given!r}") from None
