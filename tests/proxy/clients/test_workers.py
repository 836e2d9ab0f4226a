"""Threads that serve connections: one for each at a time, and used again."""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cc_proxy.proxy.clients.workers import Job, Workers
from tests.faults import broken
from tests.shortages import no_threads
from tests.wire.support import wait_until


@contextmanager
def running(**options: Any) -> Iterator[Workers]:
    workers = Workers(**options)
    try:
        yield workers
    finally:
        workers.close()
        assert workers.join(5)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Workers whose threads are used again, however long the next job takes to come."""
    with running(linger=60) as workers:
        yield workers


def do(workers: Workers, name: str = "job") -> threading.Thread:
    """Have something done, and return the thread that did it."""
    by: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    workers.start(name, lambda: by.put(threading.current_thread()))
    return by.get(timeout=5)


def wait_for_spare(number: int) -> None:
    wait_until(lambda: names().count("spare") == number, f"{number} have nothing to do")


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_each_job_has_a_thread_of_its_own(workers: Workers) -> None:
    together = threading.Barrier(3, timeout=5)
    for _ in range(2):
        workers.start("waits", together.wait)
    together.wait()


def test_a_thread_is_called_what_it_does(workers: Workers) -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in ("one", "two"):
        workers.start(name, lambda: said.put(threading.current_thread().name))
        assert said.get(timeout=5) == name
        wait_for_spare(1)


def test_an_idle_thread_does_the_next_job(workers: Workers) -> None:
    first = do(workers)
    wait_for_spare(1)
    assert do(workers) is first


def test_a_thread_that_was_idle_for_a_while_ends() -> None:
    with running(linger=0.001) as workers:
        first = do(workers)
        first.join(5)
        assert not first.is_alive()
        assert do(workers) is not first, "nobody waits for one that has ended"


class GivenUp(queue.SimpleQueue[Job]):
    """One whose thread has stopped waiting for a second job just as it comes."""

    def get(self, block: bool = True, timeout: float | None = None) -> Job:
        if timeout is None:
            return super().get()
        self.put(super().get(timeout=5))
        raise queue.Empty


def test_job_that_comes_as_a_thread_gives_up_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(linger=60) as workers:
        with monkeypatch.context() as patch:
            patch.setattr(queue, "SimpleQueue", GivenUp)
            workers.start("job", lambda: None)
        wait_for_spare(1)
        do(workers)


class NoMemory(queue.SimpleQueue[Job]):
    """A queue for a job that there is no memory for, at the second one."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self, item: Job, block: bool = True, timeout: float | None = None) -> None:
        self.puts += 1
        if self.puts == 2:
            raise MemoryError
        super().put(item, block, timeout)


def test_a_job_that_cannot_be_handed_over_costs_no_thread(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(queue, "SimpleQueue", NoMemory)
        workers.start("job", lambda: None)
    wait_for_spare(1)
    with pytest.raises(MemoryError):
        workers.start("job", lambda: None)
    assert do(workers).name in names()
    wait_for_spare(1)


def test_nothing_is_kept_of_a_thread_that_cannot_start(workers: Workers) -> None:
    with no_threads(), pytest.raises(RuntimeError):
        workers.start("job", lambda: None)
    workers.close()
    assert workers.join(0)


def test_nothing_is_kept_of_what_was_done(workers: Workers) -> None:
    gone = threading.Event()

    class Kept:
        def work(self) -> None:
            pass

        def __del__(self) -> None:
            gone.set()

    workers.start("job", Kept().work)
    assert gone.wait(5)
    wait_for_spare(1)


def test_one_that_gives_up_at_the_end_is_missed_by_nobody(workers: Workers) -> None:
    class JustLeft(deque["queue.SimpleQueue[Job]"]):
        """Whoever was here has taken itself out since somebody looked."""

        def __bool__(self) -> bool:
            return True

    # Nothing from outside makes a thread leave between two steps of `close`.
    workers._spare = JustLeft()
    workers.close()


def test_after_the_end_threads_end_when_they_are_done() -> None:
    workers = Workers(linger=60)
    do(workers)
    wait_for_spare(1)
    release = threading.Event()
    workers.start("busy", release.wait)
    do(workers)
    wait_for_spare(1)
    workers.close()
    assert not workers.join(0.001)
    release.set()
    assert workers.join(5)


def test_thread_that_is_just_being_started_is_no_error_at_the_end() -> None:
    """Who hands over may be slow, and nobody waits for it for ever."""
    workers = Workers()
    begun, go_on = threading.Event(), threading.Event()

    def start_late(thread: threading.Thread) -> bool:
        if thread is not slow:
            begun.set()
            assert go_on.wait(5)
        return False

    slow = threading.Thread(target=lambda: workers.start("job", lambda: None))
    with broken(threading.Thread, "start", when=start_late):
        slow.start()
        assert begun.wait(5)
        workers.close()
        assert not workers.join(5)
        go_on.set()
        slow.join(5)
    assert workers.join(5)
