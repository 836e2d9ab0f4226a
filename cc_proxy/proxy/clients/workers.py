"""Threads that serve connections: one each, and the next one when that has gone."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from cc_proxy.linux.threads import start_thread

#: What a thread is called meanwhile, and what it does; None is the end.
Job = tuple[str, Callable[[], object]] | None

#: Seconds that a thread waits for another job before it ends, and how many threads wait at the most.
_LINGER = 0.1
_MOST_SPARE = 16


class Crew:
    """Threads that do jobs, each as soon as it comes and in a thread of its own.

    To start a thread and to end it takes longer than to serve a client that comes, asks and goes; so one that
    has nothing to do waits a little while for another job.
    """

    def __init__(self) -> None:
        # Where those wait who have nothing to do, the last one last. Who takes one out puts a job there,
        # once. Appending, popping and removing are single steps of the interpreter, which need no lock.
        self._spare: deque[queue.SimpleQueue[Job]] = deque()
        self._members: set[threading.Thread] = set()  # likewise
        self._closed = False

    def hand_over(self, name: str, work: Callable[[], object]) -> None:
        """Have something done. Raises `RuntimeError` if there is no thread to be had. Any thread."""
        try:
            spare = self._spare.pop()
        except IndexError:
            self._start(name, work)
        else:
            try:
                spare.put((name, work))
            except BaseException:  # there is no memory; it goes on waiting
                self._spare.append(spare)
                raise

    def close(self) -> None:
        """Let the threads end as soon as they have nothing to do. Any thread."""
        self._closed = True
        # Not while there is one: who has waited long enough takes itself out at any moment.
        with contextlib.suppress(IndexError):
            while True:
                self._spare.pop().put(None)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for all threads to end; returns whether they have.

        After `close`, when nobody hands over anything any more: who is just being started is not waited for.
        """
        deadline = time.monotonic() + timeout
        for member in list(self._members):
            with contextlib.suppress(RuntimeError):  # it has not begun, as Python sees it
                member.join(max(0.0, deadline - time.monotonic()))
        return not self._members

    def _start(self, name: str, work: Callable[[], object]) -> None:
        jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        jobs.put((name, work))
        member = threading.Thread(target=self._do_all, args=(jobs,), name=name, daemon=True)
        self._members.add(member)
        try:
            start_thread(member)
        except BaseException:
            self._members.discard(member)
            raise

    # A member's thread ------------------------------------------------------------------------------------

    def _do_all(self, jobs: "queue.SimpleQueue[Job]") -> None:
        me = threading.current_thread()
        job = jobs.get()
        try:
            while job:
                me.name = job[0]
                job[1]()
                me.name = "spare"
                job = None  # nothing of what is done is kept meanwhile
                job = self._next(jobs)
        finally:
            self._members.discard(me)

    def _next(self, jobs: "queue.SimpleQueue[Job]") -> Job:
        """Return another job; None if there has been none for a while."""
        if self._closed or len(self._spare) >= _MOST_SPARE:
            return None
        self._spare.append(jobs)
        try:
            return jobs.get(timeout=_LINGER)
        except queue.Empty:
            pass
        try:
            self._spare.remove(jobs)
        except ValueError:
            return jobs.get()  # somebody has just taken it out
        return None
