"""Threads that serve connections: one for each at a time, and used again."""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import cast

import pytest

from cc_proxy.proxy.clients import workers as module
from cc_proxy.proxy.clients.workers import Job, Workers
from tests.wire.support import wait_until


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()
    assert workers.join(5)


def do(workers: Workers, name: str = "job") -> threading.Thread:
    """Have something done, and return the thread that did it."""
    by: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    workers.start(name, lambda: by.put(threading.current_thread()))
    return by.get(timeout=5)


def wait_for_spare(workers: Workers, number: int) -> None:
    wait_until(lambda: len(workers._spare) == number, f"{number} have nothing to do")


def test_each_job_has_a_thread_of_its_own(workers: Workers) -> None:
    together = threading.Barrier(3, timeout=5)
    for _ in range(2):
        workers.start("waits", together.wait)
    together.wait()


def test_a_thread_is_called_what_it_does(workers: Workers) -> None:
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in ("one", "two"):
        workers.start(name, lambda: names.put(threading.current_thread().name))
        assert names.get(timeout=5) == name
        wait_for_spare(workers, 1)


def test_an_idle_thread_does_the_next_job(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 60)
    first = do(workers)
    wait_for_spare(workers, 1)
    assert do(workers) is first


def test_a_thread_that_was_idle_for_a_while_ends(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 0.001)
    do(workers).join(5)
    wait_until(lambda: not workers._threads, "it has ended")
    assert not workers._spare


def test_job_that_comes_as_a_thread_gives_up_is_done(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Snatched(deque["queue.SimpleQueue[Job]"]):
        """Whoever waits here is taken out before it can take itself out."""

        def append(self, waiting: "queue.SimpleQueue[Job]") -> None:
            taken.put(waiting)

    taken: queue.SimpleQueue[queue.SimpleQueue[Job]] = queue.SimpleQueue()
    monkeypatch.setattr(module, "_LINGER", 0)
    workers._spare = Snatched()
    first = do(workers)
    by: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    taken.get(timeout=5).put(("late", lambda: by.put(threading.current_thread())))
    assert by.get(timeout=5) is first
    taken.get(timeout=5).put(None)


def test_only_so_many_wait(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 60)
    together = threading.Barrier(module._MOST_SPARE + 4, timeout=5)
    for _ in range(module._MOST_SPARE + 3):
        workers.start("waits", together.wait)
    together.wait()
    wait_until(lambda: len(workers._threads) == module._MOST_SPARE, "the others have ended")
    wait_for_spare(workers, module._MOST_SPARE)


def test_a_job_that_cannot_be_handed_over_costs_no_thread(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LINGER", 60)
    thread = do(workers)
    wait_for_spare(workers, 1)
    jobs = workers._spare.pop()

    class NoMemory:
        def put(self, _job: Job) -> None:
            raise MemoryError

    spare = cast("queue.SimpleQueue[Job]", NoMemory())
    workers._spare.append(spare)
    with pytest.raises(MemoryError):
        workers.start("job", lambda: None)
    assert list(workers._spare) == [spare]
    workers._spare[0] = jobs
    assert do(workers) is thread


def test_nothing_is_kept_of_a_thread_that_cannot_start(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError):
        workers.start("job", lambda: None)
    assert not workers._threads


def test_nothing_is_kept_of_what_was_done(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 60)
    gone = threading.Event()

    class Kept:
        def work(self) -> None:
            pass

        def __del__(self) -> None:
            gone.set()

    workers.start("job", Kept().work)
    assert gone.wait(5)
    wait_for_spare(workers, 1)


def test_one_that_gives_up_at_the_end_is_missed_by_nobody(workers: Workers) -> None:
    class JustLeft(deque["queue.SimpleQueue[Job]"]):
        """Whoever was here has taken itself out since somebody looked."""

        def __bool__(self) -> bool:
            return True

    workers._spare = JustLeft()
    workers.close()


def test_after_the_end_threads_end_when_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 60)
    workers = Workers()
    do(workers)
    wait_for_spare(workers, 1)
    release = threading.Event()
    workers.start("busy", release.wait)
    do(workers)
    wait_for_spare(workers, 1)
    workers.close()
    assert not workers.join(0.001)
    release.set()
    assert workers.join(5)


def test_thread_that_is_just_being_started_is_no_error_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hands over may be slow, and nobody waits for it for ever."""
    workers = Workers()
    start, begun, go_on = threading.Thread.start, threading.Event(), threading.Event()

    def start_late(thread: threading.Thread) -> None:
        begun.set()
        assert go_on.wait(5)
        start(thread)

    slow = threading.Thread(target=lambda: workers.start("job", lambda: None))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_late)
        start(slow)
        assert begun.wait(5)
        workers.close()
        assert not workers.join(5)
        go_on.set()
        slow.join(5)
    assert workers.join(5)
