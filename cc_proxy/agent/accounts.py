"""Users and groups by name: this system's, or those in the files of another root directory."""

import grp
import os
import pwd
from dataclasses import dataclass
from typing import Protocol

_PASSWD_FIELDS, _GROUP_FIELDS = 7, 4


@dataclass(frozen=True, slots=True)
class Account:
    """A user, and the user's primary group."""

    name: str
    uid: int
    gid: int


class Accounts(Protocol):
    """Where users and groups are looked up. A lookup returns None if there is no such user or group."""

    def user(self, name: str) -> Account | None:
        """Return a user by name."""

    def user_by_id(self, uid: int) -> Account | None:
        """Return a user by number."""

    def group(self, name: str) -> int | None:
        """Return the number of a group."""

    def groups_of(self, user: Account, gid: int) -> list[int]:
        """Return all groups of a user whose primary group is `gid`."""


class SystemAccounts:
    """The users and groups that this system's C library finds."""

    def user(self, name: str) -> Account | None:
        try:
            return _user_of(pwd.getpwnam(name))
        except KeyError:
            return None

    def user_by_id(self, uid: int) -> Account | None:
        try:
            return _user_of(pwd.getpwuid(uid))
        except KeyError:
            return None

    def group(self, name: str) -> int | None:
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            return None

    def groups_of(self, user: Account, gid: int) -> list[int]:
        return os.getgrouplist(user.name, gid)


class FileAccounts:
    """The users and groups in /etc/passwd and /etc/group of a root directory. Bad lines are skipped."""

    def __init__(self, root: str) -> None:
        users = _lines(os.path.join(root, "etc/passwd"), _PASSWD_FIELDS)
        groups = _lines(os.path.join(root, "etc/group"), _GROUP_FIELDS)
        self._users = [Account(user[0], int(user[2]), int(user[3])) for user in users if _are_ids(*user[2:4])]
        self._groups = [(name, int(gid), members) for name, _, gid, members in groups if _are_ids(gid)]

    def user(self, name: str) -> Account | None:
        return next((user for user in self._users if user.name == name), None)

    def user_by_id(self, uid: int) -> Account | None:
        return next((user for user in self._users if user.uid == uid), None)

    def group(self, name: str) -> int | None:
        return next((gid for known, gid, _ in self._groups if known == name), None)

    def groups_of(self, user: Account, gid: int) -> list[int]:
        return [gid, *(other for _, other, members in self._groups if user.name in members.split(","))]


def accounts_in(root: str | None) -> Accounts:
    """Return the accounts that a process with this root directory finds; None stands for the agent's root."""
    return SystemAccounts() if root is None else FileAccounts(root)


def _user_of(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _lines(path: str, fields: int) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            found = [line.rstrip("\n").split(":") for line in file]
    except OSError:
        return []
    return [line for line in found if len(line) == fields]


def _are_ids(*texts: str) -> bool:
    return all(text.isascii() and text.isdecimal() for text in texts)
