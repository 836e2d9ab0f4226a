"""What each user has: counted for each and for all, and whose turn it is."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from cc_proxy.proxy import users as shares_module
from cc_proxy.proxy.turns import Place
from cc_proxy.proxy.users import LimitReached, Shares, Thing
from cc_proxy.settings import Limits, LiveSettings, Settings, UserLimits
from tests.clock import Clock
from tests.proxy.sharing import ALICE, BOB, CARL, ROOT, THINGS, contended, shares_of, two_users
from tests.wire.support import WAIT, in_background


@pytest.mark.parametrize("thing", THINGS)
def test_no_user_gets_more_than_its_share_and_all_together_no_more_than_there_is(thing: Thing) -> None:
    shares = shares_of(total=5, each=2)
    for uid in (ALICE, BOB):
        for _ in range(2):
            shares.of(uid).take(thing)
        with pytest.raises(LimitReached, match=r"^the limit of 2 .* for one user is reached$"):
            shares.of(uid).take(thing)
    shares.of(CARL).take(thing)
    with pytest.raises(LimitReached, match=r"^the limit of 5 (?!.*for one user).* is reached$"):
        shares.of(CARL).take(thing)
    assert [shares.used(uid, thing) for uid in (ALICE, BOB, CARL)] == [2, 2, 1]
    shares.of(ALICE).give_back(thing)
    shares.of(CARL).take(thing)


def test_things_are_counted_apart() -> None:
    shares = shares_of(total=1, each=1)
    for thing in THINGS:
        shares.of(ALICE).take(thing)


def test_a_user_has_one_share() -> None:
    shares = shares_of(1, 1)
    assert shares.of(ALICE) is shares.of(ALICE)
    assert shares.of(ALICE) is not shares.of(BOB)


def test_what_is_too_much_at_once_takes_nothing() -> None:
    share = shares_of(total=10, each=10).of(ALICE)
    share.take("request_bytes", 7)
    with pytest.raises(LimitReached):
        share.take("request_bytes", 4)
    share.take("request_bytes", 3)


def test_what_is_taken_for_a_while_is_given_back_whatever_happens() -> None:
    shares = shares_of(total=1, each=1)
    with pytest.raises(LimitReached), shares.of(ALICE).taken("commands"):
        shares.of(ALICE).take("commands")
    assert shares.used(ALICE, "commands") == 0


def test_limits_are_those_of_the_settings_now() -> None:
    live = LiveSettings(Settings(limits=Limits(vms=1)))
    share = Shares(live).of(ALICE)
    share.take("vms")
    with pytest.raises(LimitReached):
        share.take("vms")
    live.replace(Settings(limits=Limits(vms=2)))
    share.take("vms")


def test_counting_by_many_threads() -> None:
    shares = shares_of(total=6, each=4)
    beyond: list[int] = []

    def live(seed: int) -> None:
        rng, share = random.Random(seed), shares.of(seed % 3)
        for _ in range(500):
            number = rng.randrange(1, 4)
            try:
                with share.taken("sessions", number):
                    if shares.used(share.uid, "sessions") > 4:
                        beyond.append(seed)
            except LimitReached:
                pass

    with ExitStack() as stack:
        for seed in range(6):
            stack.enter_context(in_background(lambda seed=seed: live(seed)))  # type: ignore[misc]
    assert not beyond
    assert [shares.used(uid, "sessions") for uid in range(3)] == [0, 0, 0]


def test_a_user_is_paced_while_others_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 1_000.0 + sum(slept), sleep=slept.append)
    monkeypatch.setattr(shares_module, "time", clock)
    settings = Settings(limits=Limits(user=UserLimits(request_rate=10)))
    shares = Shares(LiveSettings(settings))
    share = shares.of(ALICE)
    share.take("connections")
    for _ in range(100):
        share.pace()
    assert not slept, "she is alone"
    shares.of(BOB).take("connections")
    for _ in range(10 * shares_module._IN_ONE_GO):
        share.pace()
    assert not slept
    for _ in range(5):
        share.pace()
    share.pace(10)
    assert sum(slept) == pytest.approx(1.5)
    shares.of(BOB).give_back("connections")
    share.pace(1_000)
    assert sum(slept) == pytest.approx(1.5), "she is alone again"


def test_others_have_their_turn_while_one_waits_aside() -> None:
    share = shares_of(1, 1).of(ALICE)
    done = threading.Event()

    def have_turn() -> None:
        with share.turn:
            done.set()

    with share.turn:
        thread = threading.Thread(target=have_turn)
        thread.start()
        assert not done.is_set()
        with share.aside():
            assert done.wait(WAIT)
        assert share.turn.locked()
    thread.join()
    assert not share.turn.locked()


def test_one_pump_of_a_user_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "_COURTESY", WAIT)
    shares = shares_of(1, 1)
    share = shares.of(ALICE)
    served: list[str] = []

    def serve() -> None:
        with share.one_pump():
            served.append("second")

    with ExitStack() as first:
        first.enter_context(share.one_pump())
        with in_background(serve):
            assert not shares.of(BOB)._pumping.locked(), "another user's do not wait"
            served.append("first")
            first.close()
    assert served == ["first", "second"]


def test_pump_does_not_wait_long_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "_COURTESY", 0.01)
    share = shares_of(1, 1).of(ALICE)
    with share.one_pump():
        with share.one_pump():
            pass
        assert share._pumping.locked(), "it is still the first one's"
    assert not share._pumping.locked()


def test_users_who_have_gone_leave_nothing() -> None:
    shares = shares_of(total=10, each=2)
    here = shares.of(1)
    here.take("connections")
    for uid in range(2, 1_500):
        with shares.of(uid).taken("connections"), shares.of(uid).taken("vms"):
            pass
    assert shares.of(1) is here
    assert len(shares._shares) <= shares_module._FEW
    assert list(shares._users) == [(1, "connections")]


def test_nobody_gets_around_its_pace_by_going(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 1_000.0, sleep=lambda seconds: None)
    monkeypatch.setattr(shares_module, "time", clock)
    shares = shares_of(total=10, each=2)
    shares.of(BOB).take("connections")
    alice = shares.of(ALICE)
    with alice.taken("connections"):
        alice.pace(10)
    for uid in range(10, 200):
        shares.of(uid)
    assert shares.of(ALICE) is alice


def test_no_more_is_given_back_than_was_taken() -> None:
    share = shares_of(total=2, each=2).of(ALICE)
    share.take("vms")
    with pytest.raises(AssertionError, match="3 vms of user 1 are given back, of 1"):
        share.give_back("vms", 3)
    share.give_back("vms")


def test_connections_that_come_too_fast_wait_in_their_order(clock: Clock) -> None:
    alice, bob = two_users()
    rate = UserLimits().request_rate / shares_module._CONNECTING
    burst = [alice.arrive() for _ in range(int(rate) * shares_module._IN_ONE_GO)]
    assert not any(burst)
    beyond = [alice.arrive() for _ in range(3)]
    assert beyond == pytest.approx([1 / rate, 2 / rate, 3 / rate])
    assert bob.arrive() == 0.0
    bob.give_back("connections")
    assert alice.arrive() == 0.0, "she is alone"


@pytest.mark.parametrize("busy", [ROOT, BOB, CARL])
def test_one_of_many_who_is_at_work_is_enough(clock: Clock, busy: int) -> None:
    shares = shares_of(total=9, each=9)
    users = [shares.of(uid) for uid in (ROOT, ALICE, BOB, CARL)]
    for user in users:
        user.take("connections")
        user.works()
    clock.sleep(shares_module._LATELY)
    shares.of(busy).works()
    assert contended(*users) == [uid for uid in (ALICE, BOB, CARL) if uid != busy]
    for _ in range(2):
        shares.of(ALICE).works()
    assert contended(*users) == [ALICE, BOB, CARL]
    clock.sleep(shares_module._LATELY / 2)
    shares.of(ALICE).works()
    clock.sleep(shares_module._LATELY / 2)
    assert contended(*users) == [BOB, CARL]


def test_a_request_is_work(clock: Clock) -> None:
    alice, bob = two_users()
    with bob.turn:
        bob.pace()
    assert contended(alice, bob) == [ALICE]
    assert (alice.disturbed, bob.disturbed) == (bob, None), "and has to be answered"
    clock.sleep(2 * shares_module._JUST_NOW)
    assert alice.disturbed is None
    clock.sleep(shares_module._LATELY)
    assert contended(alice, bob) == []


def test_root_is_not_slowed_down_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    shares = Shares(LiveSettings(Settings(limits=Limits(user=UserLimits(request_rate=1)))))
    waits = {}
    for uid in (ALICE, ROOT):
        share = shares.of(uid)
        share.take("connections")
        shares.of(BOB).take("connections")
        waits[uid] = [share.arrive() for _ in range(3)]
        share.pace(100)
        shares.of(BOB).works()
        share.spend(1.0, 1.0)
        assert bool(slept) == bool(Place(share).due()) == (uid == ALICE)
        slept.clear()
    assert waits[ALICE][-1] > 0
    assert waits[ROOT] == [0.0] * 3


def test_who_has_gone_and_left_a_vm_is_there() -> None:
    shares = shares_of(total=10, each=5)
    alice, bob = shares.of(ALICE), shares.of(BOB)
    bob.take("connections")
    alice.take("vms")
    assert bob.others
    with alice.taken("connections"):
        pass
    assert bob.others
    for uid in range(10, 200):
        shares.of(uid)
    assert shares.of(ALICE) is alice
    alice.give_back("vms")
    assert not bob.others
