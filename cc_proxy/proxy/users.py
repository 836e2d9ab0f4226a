"""What each user has of what the daemon has only so much of, and when its next turn is."""

import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Literal

from cc_proxy.linux.credentials import ROOT
from cc_proxy.settings import LiveSettings

#: What is counted, as the settings call it: once for each user and once for all.
Thing = Literal["connections", "vms", "sessions", "commands", "request_bytes"]

_CALLED: dict[Thing, str] = {
    "connections": "connections",
    "vms": "VMs",
    "sessions": "sessions",
    "commands": "commands that wait",
    "request_bytes": "bytes of ids, and of messages that are on their way",
}

#: Who has any of this is there.
_PRESENCE = frozenset({"connections", "vms"})

#: For each second of a CPU a user's VMs pay with a second of rest, and so many times as much as they had the
#: interpreter longer than this, in seconds at a stretch: that keeps it from as many times as many others.
_STRETCH = 0.000_06
#: So many seconds' requests may come in one go. Starting many containers at once is not an attack.
_IN_ONE_GO = 5
#: Seconds of a CPU that a user's VMs may take before it matters what they take in the long run.
_WORK_IN_ONE_GO = 0.5
#: A new connection is as much work as so many requests.
_CONNECTING = 2
#: Seconds of rest that may be due before it is taken, and that are ever due.
CREDIT = 0.000_03
_MOST_DUE = 10.0
#: So many turns' worth is what a turn typically takes.
_SMOOTH = 8
#: Seconds for which a user's VMs leave the interpreter to others once one of these has been at work, and for
#: which one that was in haste still is.
_LATELY = 1.0
_JUST_NOW = 0.002
#: Seconds that a pump waits at the most for others of the same user to have done what they are at.
_COURTESY = 0.05
#: So many users' parts are kept before those of users who have gone are looked for.
_FEW = 64


class LimitReached(Exception):
    """There is no more of something; the text says of what, and for whom."""


class _Pace:
    """So many a second, after more in one go. One thread at a time."""

    def __init__(self) -> None:
        self._left = 0.0  # what need not wait, at the moment `_at`
        self._at = -math.inf

    def take(self, number: int, rate: int) -> float:
        """Take some; returns the seconds until they are there, which is never more than 0 for the first."""
        now = time.monotonic()
        self._left = min(rate * _IN_ONE_GO, self._left + (now - self._at) * rate) - number
        self._at = now
        return max(0.0, -self._left / rate)

    def used(self, rate: int) -> bool:
        """Whether there are fewer now than for one who is new."""
        return self._left + (time.monotonic() - self._at) * rate < rate * _IN_ONE_GO


class _Latest:
    """Who has done something last and when, and when somebody else has.

    Any thread's, without a lock: what two note in the same moment may be wrong until one of them does again.
    """

    __slots__ = ("_at", "_other", "_others_at", "_who")

    def __init__(self) -> None:
        self._who: Share | None = None
        self._other: Share | None = None
        self._at = self._others_at = -math.inf

    def note(self, who: "Share", now: float) -> None:
        if self._who is not who:
            self._other, self._others_at = self._who, self._at
            self._who = who
        self._at = now

    def other(self, who: "Share") -> tuple["Share | None", float]:
        """Return who that is, other than `who`, and when it was."""
        return (self._other, self._others_at) if self._who is who else (self._who, self._at)


class Share:
    """One user's part. Any thread.

    `turn` is held while a request of the user's is carried out, so that of one user's threads, however many
    there are, one at a time competes with the other users' for the interpreter. Whatever waits is done aside.
    """

    def __init__(self, shares: "Shares", uid: int) -> None:
        self._shares = shares
        self.uid = uid
        #: root does not leave its turns to others: it runs the host's containers, and whoever may connect
        #: could slow all of them down by being there.
        self.exempt = uid == ROOT
        # Guards what follows. Others are locked while it is held, but never before.
        self.turn = threading.Lock()
        # One hello of the user's at a time looks for a socket, so that many that fail do not crowd; held over
        # I/O, and nothing else is locked then.
        self.dialing = threading.Lock()
        # One `status` of the user's at a time has pumps tell how they are, which it waits for: together they
        # would have hundreds of pumps at it. Others are locked while it is held, but never before.
        self.asking = threading.Lock()
        # Held by a pump while it has something to do, not while it rests; over I/O, but nobody waits for it
        # longer than _COURTESY.
        self._pumping = threading.Lock()
        self._requests = _Pace()
        self._arrivals = _Pace()  # of connections; the accept thread's
        # When what the user's VMs have taken of the interpreter is paid for. Any thread's, without a lock: of
        # two that pay in the same moment one may pay nothing, which is rare, and cheaper for all.
        self._paid_at = -math.inf
        # The same for what they take in the long run.
        self._earned_at = -math.inf
        # Turns that are still to come, about in their order; how many seconds of rest one typically costs,
        # and what has been spent since one was booked last. Without a lock, likewise.
        self._booked: deque[float] = deque()
        #: Whose turn the last one was; the pump threads' own.
        self.last_turn: object = None
        self._typical = self._spent = 0.0

    def pace(self, requests: int = 1) -> None:
        """Wait if the user asks for more than it may while others are there. Requires holding `turn`.

        One that floods would have the interpreter all the time, however fair it changes hands.
        """
        self.works(in_haste=True)
        if self.others:
            wait = self._requests.take(requests, self._shares.request_rate)
            if wait > 0:
                time.sleep(wait)

    def arrive(self) -> float:
        """Return the seconds until a new connection of the user's is to be served. Accept thread."""
        return self._arrivals.take(_CONNECTING, self._shares.request_rate) if self.others else 0.0

    def works(self, in_haste: bool = False) -> None:
        """Note that the user, or one of the user's VMs, has something to do; `in_haste`: to answer."""
        shares = self._shares
        if shares.several:
            now = time.monotonic()
            shares.at_work.note(self, now)
            if in_haste:
                shares.in_haste.note(self, now)

    @property
    def contended(self) -> bool:
        """Whether other users, to whom it has to leave the interpreter, have had something to do lately."""
        if not self.others:
            return False
        return time.monotonic() - self._shares.at_work.other(self)[1] < _LATELY

    @property
    def disturbed(self) -> "Share | None":
        """Who else is in haste now, if anybody is."""
        other, at = self._shares.in_haste.other(self)
        return other if time.monotonic() - at < _JUST_NOW else None

    def spend(self, seconds: float, stretch: float, more: float = 0.0) -> None:
        """Count time of a CPU that a VM of the user's took; it has to wait before its next turn (`book`).

        `stretch` is for how much of it nobody else had the interpreter. Whoever wants it waits for it after
        each system call: so what takes long at a stretch has to be rare, and all VMs of a user share what
        there is. Who never stops has to be rarer still: how long others wait for their turn is then up to
        how often they meet with one of these, so `more` may be added to what counts in the long run. A rest
        is not worth its while before some of it is due.

        While nobody else is at work none is due: what is taken in one go counts, what is beyond does not.
        """
        if not self.others:
            return
        most_due = _MOST_DUE if self.contended else 0.0
        now = time.monotonic()
        price = seconds * max(1.0, stretch / _STRETCH)
        due = min(max(0.0, self._paid_at - now) + price, most_due)
        self._paid_at = now + due
        if not self._earn(seconds + more, now, most_due):
            self._spent += price

    def _earn(self, seconds: float, now: float, most_due: float) -> bool:
        """Count that in the long run; returns whether that is what has to be waited for."""
        share = self._shares.vm_cpu_share
        earned_at = max(self._earned_at, now - _WORK_IN_ONE_GO / share) + seconds / share
        self._earned_at = min(earned_at, now + most_due)
        if self._earned_at <= now:
            return False
        self._spent += seconds / share
        return True

    def book(self) -> float:
        """Return when one of the user's VMs has its turn that has to wait for one; `time.monotonic`'s.

        Everybody has a time of its own, behind those who have asked before, so none waits for ever.
        """
        now = time.monotonic()
        self._typical += (self._spent - self._typical) / _SMOOTH
        self._spent = 0.0
        with contextlib.suppress(IndexError):  # somebody else has just taken the last one out
            while self._booked[0] <= now:
                self._booked.popleft()
        paid_at = max(self._paid_at, self._earned_at)
        if paid_at <= now + CREDIT:
            return now
        at = min(paid_at + len(self._booked) * self._typical, now + _MOST_DUE)
        self._booked.append(at)
        return at

    @contextlib.contextmanager
    def one_pump(self) -> Iterator[None]:
        """Have one at a time of the user's pumps compete with the other users' threads, as with requests.

        A disk may keep one for long, and none is to wait for another's disk: so it is a courtesy, no lock.
        """
        mine = self._pumping.acquire(timeout=_COURTESY)
        try:
            yield
        finally:
            if mine:
                self._pumping.release()

    @property
    def others(self) -> bool:
        """Whether there are other users to whom it has to leave their turns."""
        return self._shares.several and not self.exempt

    @property
    def paced(self) -> bool:
        """Whether the user has asked for so much lately that it may not ask for as much as one who is new."""
        rate = self._shares.request_rate
        now = time.monotonic()
        owing = self._paid_at > now or self._earned_at > now - _WORK_IN_ONE_GO / self._shares.vm_cpu_share
        return owing or self._requests.used(rate) or self._arrivals.used(rate)

    def take(self, thing: Thing, number: int = 1) -> None:
        """Count some more of something. Raises `LimitReached`, and then nothing is counted."""
        self._shares.take(self.uid, thing, number)

    def give_back(self, thing: Thing, number: int = 1) -> None:
        """Count what was taken no more."""
        self._shares.give_back(self.uid, thing, number)

    @contextlib.contextmanager
    def taken(self, thing: Thing, number: int = 1) -> Iterator[None]:
        """Count something for a while. Raises `LimitReached`."""
        self.take(thing, number)
        try:
            yield
        finally:
            self.give_back(thing, number)

    def aside(self, thing: Thing | None = None) -> "_Aside":
        """Let others of the user have their turn for a while; whatever waits may be counted meanwhile.

        Requires holding `turn`. Raises `LimitReached` as it is entered.
        """
        return _Aside(self, thing)


class _Aside:
    """A context manager. Not made from a generator: each command of an agent's passes through here."""

    __slots__ = ("_share", "_thing")

    def __init__(self, share: Share, thing: Thing | None) -> None:
        self._share = share
        self._thing = thing

    def __enter__(self) -> None:
        if self._thing:
            self._share.take(self._thing)
        self._share.turn.release()

    def __exit__(self, *exception: object) -> None:
        self._share.turn.acquire()
        if self._thing:
            self._share.give_back(self._thing)


class Shares:
    """All users' parts, and the limits, as the settings are now. Any thread."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._shares: dict[int, Share] = {}  # by uid; those of users who have gone are dropped some time
        self._tidy_at = _FEW  # parts
        self._users: Counter[tuple[int, Thing]] = Counter()
        self._totals: Counter[Thing] = Counter()
        self._here: Counter[int] = Counter()  # by uid: connections and VMs
        #: Whether more than one user has any of these.
        self.several = False
        #: Who has had something to do, and who of these somebody to answer.
        self.at_work, self.in_haste = _Latest(), _Latest()

    def of(self, uid: int) -> Share:
        """Return a user's part: the same one for as long as the user has connections or VMs.

        Parts of users who have none are made by one thread.
        """
        share = self._shares.get(uid)
        if share is None:
            new = Share(self, uid)
            with self._lock:
                if len(self._shares) >= self._tidy_at:
                    self._drop_gone()
                share = self._shares.setdefault(uid, new)
        return share

    def _drop_gone(self) -> None:
        """Drop what is as good as new, so that nobody gets around its pace by going. Requires _lock."""
        self._shares = {uid: share for uid, share in self._shares.items() if uid in self._here or share.paced}
        self._tidy_at = max(_FEW, 2 * len(self._shares))

    def take(self, uid: int, thing: Thing, number: int) -> None:
        """Count some more of something for a user. Raises `LimitReached`, and then nothing is counted."""
        limits = self._live.current.limits
        total, each = getattr(limits, thing), getattr(limits.user, thing)
        with self._lock:
            if self._totals[thing] + number > total:
                raise LimitReached(f"the limit of {total} {_CALLED[thing]} is reached")
            if self._users[uid, thing] + number > each:
                raise LimitReached(f"the limit of {each} {_CALLED[thing]} for one user is reached")
            self._count_here(uid, thing, number)
            self._totals[thing] += number
            self._users[uid, thing] += number

    def give_back(self, uid: int, thing: Thing, number: int) -> None:
        """Count for a user what was taken no more."""
        with self._lock:
            left = self._users[uid, thing] - number
            assert left >= 0, f"{number} {thing} of user {uid} are given back, of {left + number}"
            self._totals[thing] -= number
            if left:
                self._users[uid, thing] = left
            else:
                self._users.pop((uid, thing), None)
            self._count_here(uid, thing, -number)

    def _count_here(self, uid: int, thing: Thing, number: int) -> None:
        """Requires holding _lock."""
        if thing in _PRESENCE:
            self._here[uid] += number
            if not self._here[uid]:
                del self._here[uid]
            self.several = len(self._here) > 1

    @property
    def request_rate(self) -> int:
        """Requests a second that one user may go on with while others are there."""
        return self._live.current.limits.user.request_rate

    @property
    def vm_cpu_share(self) -> float:
        """What all VMs of one user may take of each second of a CPU in the long run, likewise."""
        return self._live.current.limits.user.vm_cpu_share

    def users(self) -> list[int]:
        """Who has anything."""
        with self._lock:
            return sorted({uid for (uid, _), number in self._users.items() if number})

    def used(self, uid: int, thing: Thing) -> int:
        """How much of something a user has now."""
        return self._users[uid, thing]
