"""Whom a process runs as: names and numbers as a command gives them, and what this agent may do about it."""

import grp
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass

from cc_proxy.agent.commands import ProcessSpec
from cc_proxy.agent.errors import Refused

_MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a child has to become before it runs its program."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    def assume(self) -> None:
        """Become it. For the child: the order matters, the first call may be the last that is permitted."""
        os.setgroups(self.groups)
        os.setgid(self.gid)
        os.setuid(self.uid)


def resolve(spec: ProcessSpec) -> Credentials | None:
    """Return whom a process is to run as; None for this agent itself.

    Raises `Refused` for names nobody has, and for anybody else if the agent is not root.
    """
    if not (spec.user or spec.group or spec.additional_groups):
        return None
    uid, entry = _user(spec.user) if spec.user else (os.getuid(), None)
    gid = entry.pw_gid if entry else os.getgid()
    if spec.group:
        gid = _group(spec.group)
    member_of = os.getgrouplist(entry.pw_name, gid) if entry else [gid]
    groups = dict.fromkeys([*member_of, *map(_group, spec.additional_groups)])
    if os.geteuid() == 0:
        return Credentials(uid, gid, tuple(groups))
    _check_own(uid, gid, list(map(_group, spec.additional_groups)))
    return None


def _check_own(uid: int, gid: int, groups: Sequence[int]) -> None:
    own = {os.getgid(), *os.getgroups()}
    if uid != os.getuid() or gid != os.getgid() or not own.issuperset(groups):
        raise Refused("an agent that is not root can run processes only as itself")


def _user(name: str) -> tuple[int, pwd.struct_passwd | None]:
    """Return the uid, and the entry of the user if there is one: numbers do without."""
    number = _number(name)
    try:
        entry = pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except KeyError:
        if number is None:
            raise Refused(f"no user {name!r}") from None
        return number, None
    return entry.pw_uid, entry


def _group(name: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Refused(f"no group {name!r}") from None


def _number(name: str) -> int | None:
    """Return the id that `name` is in decimal; None if it is a name indeed."""
    if not (name.isascii() and name.isdecimal()):
        return None
    if int(name) > _MAX_ID:
        raise Refused(f"{name} is not an id")
    return int(name)
