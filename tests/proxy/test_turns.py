"""When a VM has its turn while others have something to do, and what it pays."""

from __future__ import annotations

from collections import Counter

import pytest

from cc_proxy.proxy import turns as turns_module
from cc_proxy.proxy import users as shares_module
from cc_proxy.proxy.turns import Place, Turns
from cc_proxy.proxy.users import Share
from cc_proxy.settings import UserLimits
from tests.clock import Clock
from tests.proxy.sharing import ALICE, BOB, ROOT, contended, shares_of, two_users


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


def new_turn(clock: Clock, turns: Turns, other: Share, *, work: float = 0.0) -> float:
    """The other user has just been in haste, and it is the VM's turn; returns what it rested for that."""

    def wait(seconds: float) -> None:
        clock.sleep(seconds)
        other.works(in_haste=True)

    wait(0.0)
    before = clock.now
    while turns.rest(wait, lambda: 100.0):
        pass
    rested = clock.now - before
    clock.worked += work
    return rested


def use_up(clock: Clock, share: Share, other: Share) -> None:
    """Have a user take what there is in one go, and pay for it."""
    for _ in range(2):
        vm_works(clock, share, other, shares_module._WORK_IN_ONE_GO, 0.0)


def test_a_turn_among_others_in_haste_costs_something_however_short_it_is(clock: Clock) -> None:
    alice, bob = two_users()
    turns = Turns(alice)
    assert not turns.alone()
    use_up(clock, alice, bob)
    cost = turns_module._TURN / UserLimits().vm_cpu_share
    for number in range(5):
        assert new_turn(clock, turns, bob) == pytest.approx(cost * bool(number), abs=0.001)
        turns.charge(10, 1)
        turns.charge(10, 1)  # still the same turn
        clock.now += turns_module._LENGTH
    clock.now += shares_module._JUST_NOW
    bob.works()
    turns.charge(10, 1)
    assert alice.book() - clock.now < cost, "nobody is in haste"


def test_answers_of_one_vm_among_equals_are_counted_in_part_and_cost_nothing_else(clock: Clock) -> None:
    alice, bob = two_users()
    turns = Turns(alice)
    assert not turns.alone()
    use_up(clock, alice, bob)
    new_turn(clock, turns, bob)
    turns.charge(1, 1, conversing=True)  # from here on it is the same VM's turn again and again
    new_turn(clock, turns, bob)
    begun = clock.now
    for _ in range(200):
        clock.now += turns_module._LENGTH
        new_turn(clock, turns, bob, work=0.001)
        turns.charge(1, 1, conversing=True)
    used = 200 * 0.001 * turns_module._AMONG_EQUALS / UserLimits().vm_cpu_share
    assert clock.now - begun == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize("answers", [False, True])
def test_turns_of_many_vms_cost_something_and_answers_less(clock: Clock, answers: bool) -> None:
    alice, bob = two_users()
    vms = [Turns(alice) for _ in range(2)]
    assert not any(turns.alone() for turns in vms)
    use_up(clock, alice, bob)
    rested = 0.0
    for number in range(100):
        turns = vms[number % 2]
        rested += new_turn(clock, turns, bob)
        turns.charge(1, 1, conversing=answers)
        clock.now += turns_module._LENGTH
    cost = turns_module._ANSWER if answers else turns_module._TURN
    assert rested == pytest.approx(100 * cost / UserLimits().vm_cpu_share, rel=0.1)


def test_root_that_is_in_haste_goes_before_answers(clock: Clock) -> None:
    shares = shares_of(total=10, each=10)
    for uid in (ALICE, ROOT):
        shares.of(uid).take("connections")
    alice, root = shares.of(ALICE), shares.of(ROOT)
    turns = Turns(alice)
    assert not turns.alone()
    use_up(clock, alice, root)
    spent: list[float] = []
    for _ in range(3):
        new_turn(clock, turns, root, work=0.001)
        alice.last_turn = turns
        before = alice._earned_at
        turns.charge(1, 1, conversing=True)
        spent.append(alice._earned_at - before)
        clock.now += turns_module._LENGTH
    assert spent[1:] == pytest.approx([0.001 / UserLimits().vm_cpu_share] * 2, rel=0.05)


def test_what_a_pump_does_while_it_rests_is_counted_and_its_rest_has_an_end(clock: Clock) -> None:
    alice, bob = two_users()
    turns = Turns(alice)
    assert not turns.alone()
    assert not turns.rest(clock.sleep, lambda: 1.0), "nothing is due"
    clock.sleep(turns_module._LENGTH)
    bob.works()
    clock.worked += 0.002
    turns.charge()

    def wait(seconds: float) -> None:
        clock.sleep(seconds)
        clock.worked += 0.000_5 * (len(clock.slept) == 1)

    clock.slept.clear()
    assert turns.rest(wait, lambda: 1.0)
    assert not turns.rest(wait, lambda: 1.0), "the turn has just begun"
    assert turns.rest(clock.sleep, lambda: 0.0) is False
    assert clock.slept == pytest.approx([0.002])
    clock.worked += 5.0
    turns.charge()
    clock.sleep(turns_module._LENGTH)
    bob.works()
    end = clock.now + 0.3
    assert turns.rest(wait, lambda: end - clock.now)
    assert clock.now == pytest.approx(end)
    assert not turns.rest(wait, lambda: end - clock.now), "no more can be waited for"
