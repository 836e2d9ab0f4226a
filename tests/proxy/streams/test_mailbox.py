"""Calls for another thread."""

import functools
import select
import threading

import pytest

from cc_proxy.proxy.streams.mailbox import Mailbox
from tests.proxy.support import open_fds
from tests.wire.support import WAIT


def is_readable(mailbox: Mailbox) -> bool:
    return bool(select.select([mailbox], [], [], 0)[0])


def test_calls_are_made_in_order_by_the_thread_that_is_woken() -> None:
    mailbox = Mailbox()
    made: list[tuple[int, int]] = []

    def wait_and_receive() -> None:
        select.select([mailbox], [], [], WAIT)
        mailbox.receive()

    def note(number: int) -> None:
        made.append((number, threading.get_ident()))

    woken = threading.Thread(target=wait_and_receive)
    woken.start()
    for number in range(3):
        assert mailbox.post(functools.partial(note, number))
    woken.join(WAIT)
    mailbox.make_calls()  # what was posted after it had been woken
    assert [number for number, _ in made] == [0, 1, 2]
    assert made[0][1] == woken.ident
    mailbox.close()


def test_what_is_posted_meanwhile_is_called_too() -> None:
    mailbox = Mailbox()
    made: list[str] = []

    def outer() -> None:
        mailbox.post(lambda: made.append("inner"))
        made.append("outer")

    mailbox.post(outer)
    mailbox.make_calls()
    assert made == ["outer", "inner"]
    assert is_readable(mailbox)
    mailbox.receive()
    assert not is_readable(mailbox)
    mailbox.close()


def test_error_of_a_call_loses_none_of_the_others() -> None:
    mailbox = Mailbox()
    made: list[str] = []
    mailbox.post(made.pop)
    mailbox.post(lambda: made.append("next"))
    with pytest.raises(IndexError):
        mailbox.receive()
    mailbox.make_calls()
    assert made == ["next"]
    mailbox.close()


def test_nothing_is_taken_once_it_is_closed_and_what_was_is_not_lost() -> None:
    before = open_fds()
    mailbox = Mailbox()
    made: list[str] = []
    assert mailbox.post(lambda: made.append("in time"))
    mailbox.close()
    assert not mailbox.post(lambda: made.append("too late"))
    mailbox.make_calls()
    assert made == ["in time"]
    assert open_fds() == before
