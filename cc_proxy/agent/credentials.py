"""The user and groups that a process runs as: looking them up, and checking what this agent may assume."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from cc_proxy.agent.accounts import Account, Accounts, accounts_in
from cc_proxy.agent.commands import ProcessSpec
from cc_proxy.agent.errors import CommandRefused

_MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and groups that a child takes on before it runs its program."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    def assume(self) -> None:
        """Take them on. Called in the child. `setuid` comes last, as it gives up the right to the others."""
        os.setgroups(self.groups)
        os.setgid(self.gid)
        os.setuid(self.uid)


def resolve(spec: ProcessSpec, root: str | None = None) -> Identity | None:
    """Return what a process is to run as; None if that is what the agent runs as.

    `root` is its root directory, if that is not the agent's. Raises `CommandRefused` for unknown names, and
    for any other user or group if the agent is not root.
    """
    if not (spec.user or spec.group or spec.additional_groups):
        return None
    accounts = accounts_in(root)
    uid, user = _user(accounts, spec.user) if spec.user else (os.getuid(), None)
    gid = user.gid if user else os.getgid()
    if spec.group:
        gid = _group(accounts, spec.group)
    additional = [_group(accounts, group) for group in spec.additional_groups]
    member_of = accounts.groups_of(user, gid) if user else [gid]
    if os.geteuid() == 0:
        return Identity(uid, gid, tuple(dict.fromkeys([*member_of, *additional])))
    _check_own(uid, gid, additional)
    return None


def _check_own(uid: int, gid: int, groups: Sequence[int]) -> None:
    own = {os.getgid(), *os.getgroups()}
    if uid != os.getuid() or gid != os.getgid() or not own.issuperset(groups):
        raise CommandRefused("an agent that is not root can run processes only as itself")


def _user(accounts: Accounts, name: str) -> tuple[int, Account | None]:
    """Return the uid, and the user if there is one: a number needs no user."""
    number = _number(name)
    user = accounts.user(name) if number is None else accounts.user_by_id(number)
    if user is not None:
        return user.uid, user
    if number is None:
        raise CommandRefused(f"no user {name!r}")
    return number, None


def _group(accounts: Accounts, name: str) -> int:
    number = _number(name)
    gid = accounts.group(name) if number is None else number
    if gid is None:
        raise CommandRefused(f"no group {name!r}")
    return gid


def _number(name: str) -> int | None:
    """Return the id if `name` is a decimal number; None if it is a name."""
    if not (name.isascii() and name.isdecimal()):
        return None
    if int(name) > _MAX_ID:
        raise CommandRefused(f"{name} is not an id")
    return int(name)
