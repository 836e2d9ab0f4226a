"""What each user has: counted for each and for all; and how fast each may ask for more."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack

import pytest

from cc_proxy.proxy import users as users_module
from cc_proxy.proxy.users import LimitReached, Thing, Users
from cc_proxy.settings import Limits, LiveSettings, Settings
from tests.clock import Clock
from tests.proxy.sharing import ALICE, BOB, CARL, ROOT, THINGS, users_of
from tests.wire.support import WAIT, in_background


@pytest.mark.parametrize("thing", THINGS)
def test_no_user_gets_more_than_its_limit_and_all_together_no_more_than_there_is(thing: Thing) -> None:
    users = users_of(total=5, each=2)
    alice, bob, carl = (users.of(uid) for uid in (ALICE, BOB, CARL))
    charges = [user.charge(thing) for user in (alice, alice, bob, bob)]
    for user in (alice, bob):
        with pytest.raises(LimitReached, match=r"^the limit of 2 .* for one user is reached$"):
            user.charge(thing)
    carl.charge(thing)
    with pytest.raises(LimitReached, match=r"^the limit of 5 (?!.*for one user).* is reached$"):
        carl.charge(thing)
    assert [user.has[thing] for user in (alice, bob, carl)] == [2, 2, 1]
    charges[0].give_back()
    carl.charge(thing)


def test_root_may_have_all_there_is() -> None:
    """It runs the host's containers."""
    root = users_of(total=5, each=2).of(ROOT)
    for _ in range(5):
        root.charge("vms")
    with pytest.raises(LimitReached, match=r"^the limit of 5 VMs is reached$"):
        root.charge("vms")


def test_things_are_counted_apart() -> None:
    users = users_of(total=1, each=1)
    for thing in THINGS:
        users.of(ALICE).charge(thing)


def test_a_user_is_the_same_for_as_long_as_it_is_present() -> None:
    users = users_of(1, 1)
    assert users.of(ALICE) is users.of(ALICE)
    assert users.of(ALICE) is not users.of(BOB)


def test_what_is_too_much_at_once_counts_nothing() -> None:
    user = users_of(total=10, each=10).of(ALICE)
    user.charge("request_bytes", 7)
    with pytest.raises(LimitReached):
        user.charge("request_bytes", 4)
    user.charge("request_bytes", 3)


def test_a_charge_gives_itself_back_once() -> None:
    user = users_of(total=3, each=3).of(ALICE)
    user.charge("sessions")
    charge = user.charge("sessions", 2)
    charge.give_back()
    charge.give_back()
    assert user.has["sessions"] == 1


def test_a_charge_for_a_while_is_given_back_whatever_happens() -> None:
    user = users_of(total=1, each=1).of(ALICE)
    with pytest.raises(LimitReached), user.charge("commands"):
        user.charge("commands")
    assert user.has["commands"] == 0


def test_limits_are_those_of_the_settings_now() -> None:
    live = LiveSettings(Settings(limits=Limits(vms=1)))
    user = Users(live).of(ALICE)
    user.charge("vms")
    with pytest.raises(LimitReached):
        user.charge("vms")
    live.replace(Settings(limits=Limits(vms=2)))
    user.charge("vms")


def test_counting_by_many_threads() -> None:
    users = users_of(total=6, each=4)
    beyond: list[int] = []

    def live(seed: int) -> None:
        rng, user = random.Random(seed), users.of(1 + seed % 3)
        for _ in range(500):
            try:
                with user.charge("sessions", rng.randrange(1, 4)):
                    if user.has["sessions"] > 4:
                        beyond.append(seed)
            except LimitReached:
                pass

    with ExitStack() as stack:
        for seed in range(6):
            stack.enter_context(in_background(lambda seed=seed: live(seed)))  # type: ignore[misc]
    assert not beyond
    assert [users.of(uid).has["sessions"] for uid in (1, 2, 3)] == [0, 0, 0]
    assert users.all() == []


def test_a_user_is_held_back_while_others_are_present(clock: Clock) -> None:
    users = users_of(total=2_000, each=1_000, rate=10)
    alice, bob = users.of(ALICE), users.of(BOB)
    alice.charge("connections")
    assert alice.delay(100) == 0.0, "she is alone"
    charge = bob.charge("connections")
    assert alice.delay(50) == 0.0, "five seconds' worth in one go"
    assert alice.delay() == pytest.approx(0.1)
    assert alice.delay(9) == pytest.approx(1.0), "behind those before"
    assert bob.delay() == 0.0
    clock.now += 0.5
    assert alice.delay(0) == pytest.approx(0.5)
    charge.give_back()
    assert alice.delay(1_000) == 0.0, "she is alone again"


def test_connections_that_come_and_go_owe_no_more_than_a_burst(clock: Clock) -> None:
    users = users_of(total=2_000, each=1_000, rate=10)
    alice, bob = users.of(ALICE), users.of(BOB)
    alice.charge("connections")
    bob.charge("connections")
    for _ in range(75):
        alice.note_connection()
    assert alice.delay(0) == pytest.approx(2.5), "beyond the five seconds' worth in one go"
    for _ in range(100_000):
        alice.note_connection()
    assert alice.delay(0) == pytest.approx(5.0)


def test_root_is_never_held_back() -> None:
    users = users_of(total=10, each=10, rate=1)
    root, bob = users.of(ROOT), users.of(BOB)
    root.charge("connections")
    bob.charge("vms")
    assert users.several
    assert root.delay(1_000) == 0.0
    assert not root.is_limited
    assert bob.is_limited


def test_a_user_whose_connections_have_gone_is_present_while_it_has_a_vm() -> None:
    users = users_of(10, 10)
    alice, bob = users.of(ALICE), users.of(BOB)
    alice.charge("connections")
    connection, vm = bob.charge("connections"), bob.charge("vms")
    connection.give_back()
    assert users.several
    vm.give_back()
    assert not users.several


def test_one_batch_of_a_user_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_module, "_COURTESY", WAIT)
    users = users_of(1, 1)
    alice, bob = users.of(ALICE), users.of(BOB)
    served: list[str] = []

    def serve() -> None:
        with alice.one_batch(large=True):
            served.append("second")

    with ExitStack() as first:
        first.enter_context(alice.one_batch(large=True))
        thread = threading.Thread(target=serve)
        thread.start()
        with in_background(lambda: bob.one_batch(large=True).__enter__()):
            pass
        served.append("first")
        first.close()
        thread.join(WAIT)
    assert served == ["first", "second"], "but another user's does not wait"


def test_a_small_batch_waits_for_a_large_one_only_while_others_are_present() -> None:
    users = users_of(10, 10)
    alice = users.of(ALICE)
    served: list[str] = []

    def serve() -> None:
        with alice.one_batch(large=False):
            served.append("small")

    with ExitStack() as large:
        large.enter_context(alice.one_batch(large=True))
        with in_background(serve):
            pass
        with alice.charge("vms"), users.of(BOB).charge("connections"):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join(0.05)  # as long as it may have, to go ahead
            served.append("large")
            large.close()
            thread.join(WAIT)
    assert served == ["small", "large", "small"]


def test_a_batch_does_not_wait_long_for_another() -> None:
    alice = users_of(1, 1).of(ALICE)

    def serve() -> None:
        with alice.one_batch(large=True):
            pass

    with alice.one_batch(large=True):
        begun = time.monotonic()
        for _ in range(20):
            with in_background(serve):
                pass
        assert time.monotonic() - begun < 1.0, "and nobody waits for it again"
    with alice.one_batch(large=True):
        pass


def test_users_who_have_left_are_forgotten() -> None:
    users = users_of(10, 10)
    first = users.of(1)
    for uid in range(2, 1_000):
        users.of(uid)
    assert users.of(1) is not first


def test_nobody_gets_around_the_rate_by_leaving(clock: Clock) -> None:
    users = users_of(total=2_000, each=1_000, rate=10)
    alice, bob = users.of(ALICE), users.of(BOB)
    bob.charge("connections")
    with alice.charge("connections"):
        alice.delay(1_000)
    for uid in range(100, 1_000):
        users.of(uid)
    assert users.of(ALICE) is alice
    clock.now += 1_000
    for uid in range(1_000, 3_000):
        users.of(uid)
    assert users.of(ALICE) is not alice, "nothing is owed any more"


def test_no_more_is_given_back_than_was_taken() -> None:
    with pytest.raises(AssertionError, match="given back too often"):
        users_of(1, 1).of(ALICE).count("vms", -1)
