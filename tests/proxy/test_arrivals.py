"""Whose turn it is."""

from cc_proxy.proxy.arrivals import Arrivals


def taken(arrivals: Arrivals[str]) -> list[str]:
    found = []
    while (arrival := arrivals.take()) is not None:
        found.append(arrival)
    return found


def test_users_have_turns_and_each_its_order() -> None:
    arrivals: Arrivals[str] = Arrivals()
    for uid, arrival in ((1, "a"), (1, "b"), (1, "c"), (2, "d"), (3, "e"), (2, "f")):
        arrivals.add(uid, arrival)
    assert taken(arrivals) == ["a", "d", "e", "b", "f", "c"]


def test_who_comes_while_others_are_served_is_behind_one_of_each() -> None:
    arrivals: Arrivals[str] = Arrivals()
    for arrival in "abc":
        arrivals.add(1, arrival)
    first = arrivals.take()
    arrivals.add(2, "d")
    arrivals.add(2, "e")
    assert [first, *taken(arrivals)] == ["a", "b", "d", "c", "e"]


def test_nobody_waits() -> None:
    arrivals: Arrivals[str] = Arrivals()
    assert arrivals.take() is None
    arrivals.add(0, "a")
    assert (arrivals.take(), arrivals.take()) == ("a", None)
