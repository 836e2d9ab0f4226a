"""Users who share a daemon."""

from __future__ import annotations

from typing import get_args

from cc_proxy.proxy.users import Share, Shares, Thing
from cc_proxy.settings import Limits, LiveSettings, Settings, UserLimits

ROOT, ALICE, BOB, CARL = 0, 1, 2, 3
THINGS: tuple[Thing, ...] = get_args(Thing)


def shares_of(total: int, each: int) -> Shares:
    """Of everything there are so many."""
    user = UserLimits(**dict.fromkeys(THINGS, each))
    return Shares(LiveSettings(Settings(limits=Limits(**dict.fromkeys(THINGS, total), user=user))))


def two_users() -> tuple[Share, Share]:
    """Alice's and Bob's, who are both there."""
    shares = shares_of(total=2_000, each=1_000)
    for uid in (ALICE, BOB):
        shares.of(uid).take("connections")
    return shares.of(ALICE), shares.of(BOB)


def contended(*users: Share) -> list[int]:
    """Who is to leave the interpreter to others."""
    return [user.uid for user in users if user.contended]
