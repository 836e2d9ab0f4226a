"""Who may do what: all of it is decided here. No I/O except looking up names of users and groups."""

import grp
import os
import pwd
from typing import Self

import msgspec

from cc_proxy.linux.credentials import ROOT, Credentials

#: What settings call the group the daemon runs as.
OWN_GROUP = "@daemon"

_HIGHEST_ID = 2**32 - 2
_NOBODY = -1


class _Id(int):
    """The number of a user or a group. Settings give it as a name or a number."""

    #: The name, if no lookup has found it so far. The number is then one that nobody has.
    unknown = ""

    @classmethod
    def resolve(cls, given: object) -> Self:
        """Return the number; may wait for a name service.

        Raises `ValueError` for what can be neither a name nor a number.
        """
        kind = cls._kind()
        if isinstance(given, int) and not isinstance(given, bool):
            if 0 <= given <= _HIGHEST_ID:
                return cls(given)
            raise ValueError(f"{given} is no {kind}'s number")
        if not isinstance(given, str):
            raise ValueError(f"expected a {kind}'s name or number, got {given!r}")
        try:
            return cls(cls._look_up(given))
        except KeyError:
            if given and not given.startswith("@"):
                return cls._not_yet(given)
        except ValueError:  # a name with a NUL in it
            pass
        raise ValueError(f"there is no {kind} {given!r}") from None

    def as_given(self) -> int | str:
        """Return the number, or the name if that is unknown so far."""
        return self.unknown or int(self)

    @classmethod
    def _not_yet(cls, name: str) -> Self:
        nobody = cls(_NOBODY)
        nobody.unknown = name
        return nobody

    @classmethod
    def _kind(cls) -> str:
        raise NotImplementedError

    @classmethod
    def _look_up(cls, name: str) -> int:
        raise NotImplementedError


class UserId(_Id):
    """The number of a user."""

    @classmethod
    def _kind(cls) -> str:
        return "user"

    @classmethod
    def _look_up(cls, name: str) -> int:
        return pwd.getpwnam(name).pw_uid


class GroupId(_Id):
    """The number of a group."""

    @classmethod
    def own(cls) -> "GroupId":
        """Return the daemon's own group."""
        return cls(os.getegid())

    @classmethod
    def _kind(cls) -> str:
        return "group"

    @classmethod
    def _look_up(cls, name: str) -> int:
        return cls.own() if name == OWN_GROUP else grp.getgrnam(name).gr_gid


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may connect, and who may use what. Names are numbers here, from the latest lookup."""

    users: tuple[UserId, ...] = ()
    groups: tuple[GroupId, ...] = msgspec.field(default_factory=lambda: (GroupId.own(),))
    admins: tuple[GroupId, ...] = ()


def unknown_names(access: Access) -> list[str]:
    """Return the names that no lookup has found so far: they let nobody in."""
    return [given.unknown for given in (*access.users, *access.groups, *access.admins) if given.unknown]


def look_up_again(access: Access) -> Access:
    """Return `access` with the unknown names looked up again. May wait for a name service."""
    return Access(
        users=tuple(UserId.resolve(user.as_given()) for user in access.users),
        groups=tuple(GroupId.resolve(group.as_given()) for group in access.groups),
        admins=tuple(GroupId.resolve(group.as_given()) for group in access.admins),
    )


def may_connect(access: Access, who: Credentials) -> bool:
    """Whether a client may connect."""
    return may_operate(access, who) or who.uid in access.users or not who.all_groups.isdisjoint(access.groups)


def names_others(access: Access) -> bool:
    """Whether anybody may connect besides root, the daemon's own user and its own group."""
    users = {ROOT, os.geteuid()}.issuperset(access.users)
    return not (users and {GroupId.own()}.issuperset((*access.groups, *access.admins)))


def may_use(access: Access, who: Credentials, owner: int) -> bool:
    """Whether a client may use, or know of, a VM that the user `owner` has registered."""
    return who.uid == owner or is_admin(access, who)


def is_admin(access: Access, who: Credentials) -> bool:
    """Whether a client may use every VM."""
    return who.uid == ROOT or not who.all_groups.isdisjoint(access.admins)


def may_operate(access: Access, who: Credentials) -> bool:
    """Whether a client may change how the daemon works."""
    return who.uid == os.geteuid() or is_admin(access, who)
