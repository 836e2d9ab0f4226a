"""epoll by selectors2, which must leave no trace in the process."""

from __future__ import annotations

import builtins
import collections
import contextlib
import errno
import importlib.util
import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from cc_proxy.linux import selector
from cc_proxy.linux.selector import HANG_UP, NOTHING_ELSE, READ, WRITE, Selector


@pytest.fixture
def chosen() -> Iterator[Selector]:
    chosen = Selector()
    yield chosen
    chosen.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        yield near, far


def import_anew(spec: ModuleSpec) -> ModuleType:
    """The module as if nobody had imported it before."""
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loading_selectors2_leaves_the_process_as_it_was(ends: tuple[socket.socket, socket.socket]) -> None:
    before = dict(vars(collections)), dict(vars(builtins)), dict(sys.modules)
    module = import_anew(selector.__spec__)
    assert (dict(vars(collections)), dict(vars(builtins)), dict(sys.modules)) == before
    assert sys.modules["collections"] is collections
    assert not hasattr(collections, "Mapping")
    with contextlib.closing(module.Selector()) as anew:
        anew.add(ends[0].fileno(), READ)
        assert anew.watches(ends[0].fileno()), "by a mapping, which it has nevertheless"


def test_selectors2_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "selectors2", None)
    with pytest.raises(ImportError, match="selectors2 is not installed") as error:
        import_anew(selector.__spec__)
    assert error.value.name == "selectors2"


def test_what_is_watched_is_reported(chosen: Selector, ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    chosen.add(near.fileno(), READ)
    assert chosen.poll(0) == []
    far.send(b"x")
    assert chosen.poll(0) == [(near.fileno(), READ)]
    assert chosen.poll(None) == [(near.fileno(), READ)]


def test_what_cannot_be_watched_is_not_watched(
    chosen: Selector, ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    with (tmp_path / "regular file").open("w") as file:
        fd = file.fileno()
        with pytest.raises(PermissionError):
            chosen.add(fd, READ)
        assert not chosen.watches(fd)
        chosen.remove(fd)
        os.dup2(ends[0].fileno(), fd)  # another file gets the same number
        chosen.add(fd, WRITE)
        assert chosen.poll(0) == [(fd, WRITE)]
        chosen.remove(fd)


class FullOnce:
    """An epoll instance whose user has as many watches as the kernel allows, but for a moment only.

    The limit is one of the whole host, not of a process.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._full = True

    def register(self, fd: int, events: int) -> None:
        if self._full:
            self._full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


def test_watches_that_have_run_out_are_called_that(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FullOnce()
    monkeypatch.setattr(select, "epoll", lambda: full)
    with contextlib.closing(Selector()) as chosen:
        with pytest.raises(OSError, match="max_user_watches is reached"):
            chosen.add(ends[0].fileno(), READ)
        assert not chosen.watches(ends[0].fileno())
        chosen.add(ends[0].fileno(), READ)
        assert chosen.watches(ends[0].fileno())


def test_hang_ups_alone_can_be_watched(chosen: Selector, ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    chosen.add(near.fileno(), NOTHING_ELSE)
    far.send(b"x")
    assert chosen.poll(0) == []
    far.shutdown(socket.SHUT_WR)
    assert chosen.poll(0) == []
    far.close()
    assert [(fd, events & ~HANG_UP, bool(events & HANG_UP)) for fd, events in chosen.poll(0)] == [
        (near.fileno(), 0, True)
    ]


@pytest.mark.parametrize("first", [READ, WRITE, NOTHING_ELSE, READ | WRITE])
@pytest.mark.parametrize("then", [READ, WRITE, NOTHING_ELSE, READ | WRITE])
def test_a_change_of_mind(
    chosen: Selector, ends: tuple[socket.socket, socket.socket], first: int, then: int
) -> None:
    near, far = ends
    far.send(b"x")  # readable and writable from now on
    chosen.add(near.fileno(), first)
    assert chosen.poll(0) == [(near.fileno(), first)] * bool(first)
    chosen.change(near.fileno(), then)
    assert chosen.poll(0) == [(near.fileno(), then)] * bool(then)


def test_what_is_removed_is_not_reported_and_may_come_back(
    chosen: Selector, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    chosen.add(near.fileno(), READ)
    assert chosen.watches(near.fileno())
    chosen.remove(near.fileno())
    assert not chosen.watches(near.fileno())
    chosen.remove(near.fileno())
    far.close()
    assert chosen.poll(0) == []
    chosen.add(near.fileno(), READ)
    assert [fd for fd, _ in chosen.poll(0)] == [near.fileno()]


def test_one_is_readable_for_another_while_something_is_ready(
    chosen: Selector, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    inner = Selector()
    inner.add(near.fileno(), READ)
    chosen.add(inner.fileno(), READ)
    assert chosen.poll(0) == []
    far.send(b"x")
    assert chosen.poll(0) == [(inner.fileno(), READ)]
    inner.change(near.fileno(), NOTHING_ELSE)
    assert chosen.poll(0) == []
    inner.change(near.fileno(), READ)
    assert chosen.poll(0) == [(inner.fileno(), READ)]
    near.recv(1)
    assert chosen.poll(0) == []
    chosen.remove(inner.fileno())
    inner.close()


def test_more_than_one_poll_takes_are_reported_in_turn(chosen: Selector) -> None:
    with ExitStack() as stack:
        fds = {os.eventfd(1) for _ in range(selector.MOST_EVENTS + 50)}
        for fd in fds:
            stack.callback(os.close, fd)
            chosen.add(fd, READ)
        first, second = chosen.poll(0), chosen.poll(0)
        assert len(first) == len(second) == selector.MOST_EVENTS
        assert {fd for fd, _ in first + second} == fds


def test_who_was_not_among_the_few_that_were_looked_at_is_first_the_next_time(chosen: Selector) -> None:
    with ExitStack() as stack:
        fds = {os.eventfd(1) for _ in range(9)}
        for fd in fds:
            stack.callback(os.close, fd)
            chosen.add(fd, READ)
        found = [chosen.poll(0, 3) for _ in range(3)]
        assert [len(some) for some in found] == [3, 3, 3]
        assert {fd for some in found for fd, _ in some} == fds


def test_closing_it_leaves_open_what_it_watched(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    closed = Selector()
    closed.add(near.fileno(), READ)
    fd = closed.fileno()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert far.send(b"x") == 1
    assert near.recv(1) == b"x"


def test_its_events_are_epolls() -> None:
    assert (READ, WRITE, HANG_UP) == (select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR)
