"""When a VM has its turn while others have something to do, and what it pays."""

from __future__ import annotations

from collections import Counter

import pytest

from cc_proxy.proxy import shares as shares_module
from cc_proxy.proxy import turns as turns_module
from cc_proxy.proxy.shares import Share
from cc_proxy.proxy.turns import Place, Turns
from cc_proxy.settings import UserLimits
from tests.clock import Clock
from tests.proxy.sharing import ALICE, BOB, contended, two_users


def vm_works(clock: Clock, share: Share, other: Share, seconds: float, stretch: float) -> float:
    """A VM works while the other user does, and rests; returns for how long."""
    other.works()
    share.spend(seconds, stretch)
    rest, place = 0.0, Place(share)
    while due := place.due():
        clock.sleep(due)
        other.works()
        rest += due
    return rest


def test_what_vms_take_is_paid_for_and_the_dearer_the_longer_the_stretch(clock: Clock) -> None:
    alice, bob = two_users()
    assert vm_works(clock, alice, bob, 0.002, 0.0) == pytest.approx(0.002)
    assert vm_works(clock, bob, alice, 0.002, 3 * shares_module._STRETCH) == pytest.approx(0.006)


def test_a_vm_that_is_as_busy_as_can_be_with_a_frame_at_a_time_does_not_rest(clock: Clock) -> None:
    alice, bob = two_users()
    turn = 0.000_025
    for _ in range(1_000):
        clock.sleep(turn)  # as long as it took, at least
        assert vm_works(clock, alice, bob, turn, 0.000_001) == 0.0


def test_vms_of_a_user_pay_together_and_those_of_who_is_alone_do_not(clock: Clock) -> None:
    alice, bob = two_users()
    rests = sum(vm_works(clock, alice, bob, 0.000_02, 0.0) for _ in range(400))
    assert rests == pytest.approx(400 * 0.000_02, abs=shares_module.CREDIT)
    bob.give_back("connections")
    assert vm_works(clock, alice, bob, 1.0, 1.0) == 0.0


def test_while_nobody_else_is_at_work_nobody_rests(clock: Clock) -> None:
    alice, bob = two_users()
    assert contended(alice, bob) == []
    alice.works()
    assert contended(alice, bob) == [BOB]
    alice.spend(0.1, 0.1)
    assert not Place(alice).due()
    bob.works()
    alice.works()
    assert contended(alice, bob) == [ALICE, BOB], "whoever was the last"
    assert vm_works(clock, alice, bob, 0.002, 0.0) == pytest.approx(0.002), "nothing is owed"
    clock.sleep(shares_module._LATELY)
    assert contended(alice, bob) == []
    alice.spend(1.0, 1.0)
    assert not Place(alice).due()


def test_what_was_taken_in_one_go_before_others_were_at_work_was_taken(clock: Clock) -> None:
    alice, bob = two_users()
    turn, share = 0.001, UserLimits().vm_cpu_share
    for _ in range(round(2 * shares_module._WORK_IN_ONE_GO / turn)):
        alice.spend(turn, 0.0)
        assert not Place(alice).due()
    assert vm_works(clock, alice, bob, turn, 0.0) == pytest.approx(turn / share)


def test_vms_that_never_stop_have_a_small_share_of_a_cpu_in_the_long_run(clock: Clock) -> None:
    alice, bob = two_users()
    turn = 0.001
    share = UserLimits().vm_cpu_share
    in_one_go = shares_module._WORK_IN_ONE_GO

    def work(seconds: float) -> float:
        """The rest for each second of work."""
        return sum(vm_works(clock, alice, bob, turn, 0.0) for _ in range(round(seconds / turn))) / seconds

    assert work(in_one_go / 2) == pytest.approx(1.0, abs=0.01)
    work(in_one_go)
    assert work(0.01) == pytest.approx(1 / share)
    assert vm_works(clock, bob, alice, turn, 0.0) == pytest.approx(turn)


def test_a_long_rest_is_taken_in_pieces_and_has_an_end(clock: Clock) -> None:
    alice, bob = two_users()
    before = len(clock.slept)
    assert vm_works(clock, alice, bob, 1.0, 1.0) == pytest.approx(
        shares_module._MOST_DUE, abs=shares_module.CREDIT
    )
    assert max(clock.slept[before:]) == turns_module._LONGEST_REST


def test_who_asked_first_has_the_first_turn_and_everybody_has_one(clock: Clock) -> None:
    """However many there are, and however often one of them asks."""
    alice, bob = two_users()
    turn, share = 0.001, UserLimits().vm_cpu_share
    vm_works(clock, alice, bob, shares_module._WORK_IN_ONE_GO, 0.0)
    places = [Place(alice) for _ in range(20)]
    turns: list[int] = []
    begun = 0.0
    while len(turns) < 500:
        if len(turns) <= 100:  # until it is known what a turn takes
            begun = clock.monotonic()
        bob.works()
        dues = [place.due() for place in places]
        for number, due in enumerate(dues):
            if not due:
                turns.append(number)
                alice.spend(turn, 0.0)
        if all(dues):
            clock.sleep(min(dues))
    assert Counter(turns) == pytest.approx(dict.fromkeys(range(20), 25), abs=5)
    assert 400 * turn / (clock.monotonic() - begun) == pytest.approx(share, rel=0.2)


def test_what_a_pump_takes_while_it_is_alone_is_not_counted(clock: Clock) -> None:
    alice, bob = two_users()
    turns = Turns(alice)
    bob.give_back("connections")
    assert turns.alone()
    clock.worked += 5.0
    bob.take("connections")
    assert not turns.alone()
    assert turns.charge() == 0.0
    bob.works()
    assert not Place(alice).due()
    clock.worked += 0.001
    assert not turns.alone()
    turns.charge()
    assert Place(alice).due() == pytest.approx(0.001)


@pytest.mark.parametrize(("frames", "stretch"), [(0, 0.0), (10, 10 * turns_module._FRAME), (10_000, 0.002)])
def test_a_stretch_is_no_longer_than_the_frames_take_or_than_it_took(
    clock: Clock, frames: int, stretch: float
) -> None:
    turns = Turns(two_users()[0])
    assert not turns.alone()
    clock.worked += 0.002
    assert turns.charge(frames) == pytest.approx(stretch)


def test_what_a_pump_does_while_it_rests_is_counted_and_its_rest_has_an_end(clock: Clock) -> None:
    alice, bob = two_users()
    turns = Turns(alice)
    assert not turns.alone()
    assert not turns.rest(clock.sleep, lambda: 1.0), "nothing is due"
    bob.works()
    clock.worked += 0.002
    turns.charge()

    def wait(seconds: float) -> None:
        clock.sleep(seconds)
        clock.worked += 0.000_5 * (len(clock.slept) == 1)

    assert turns.rest(wait, lambda: 1.0)
    assert turns.rest(wait, lambda: 1.0), "it pays for what it did in its rest"
    assert clock.slept == pytest.approx([0.002, 0.000_5])
    clock.worked += 5.0
    turns.charge()
    end = clock.now + 0.3
    assert turns.rest(wait, lambda: end - clock.now)
    assert clock.now == pytest.approx(end)
    assert not turns.rest(wait, lambda: end - clock.now), "no more can be waited for"
