"""Users who share a daemon."""

from __future__ import annotations

from typing import get_args

from cc_proxy.proxy.users import Thing, Users
from cc_proxy.settings import Limits, LiveSettings, Settings, UserLimits

ROOT, ALICE, BOB, CARL = 0, 1, 2, 3
THINGS: tuple[Thing, ...] = get_args(Thing)


def users_of(total: int, each: int, rate: int = 100) -> Users:
    """There may be `total` of everything, and `each` for a user."""
    user = UserLimits(**dict.fromkeys(THINGS, each), request_rate=rate)
    return Users(LiveSettings(Settings(limits=Limits(**dict.fromkeys(THINGS, total), user=user))))
