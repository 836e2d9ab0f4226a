"""Threads for whatever may take long: one for each job, and the next job's when that is done."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from cc_proxy.linux.threads import start_thread

#: What the thread is called meanwhile, and what it does; None is the end.
Job = tuple[str, Callable[[], object]] | None

#: Seconds that a thread without a job waits for one before it ends; and how many may wait at once.
_LINGER = 0.1
_MOST_SPARE = 16


class Workers:
    """Threads that do jobs, each at once and in a thread of its own.

    Starting and ending a thread takes longer than most jobs, so a thread that has nothing to do waits a
    little while for another one.
    """

    def __init__(self, *, linger: float = _LINGER, most_spare: int = _MOST_SPARE) -> None:
        """A thread without a job waits for one for `linger` seconds, if fewer than `most_spare` do so."""
        self._linger = linger
        self._most_spare = most_spare
        # Threads without a job, the last one last. A thread that takes one out puts one job into its queue.
        # Appending, popping and removing are atomic under the GIL, so there is no lock; the same holds for
        # `_threads`.
        self._spare: deque[queue.SimpleQueue[Job]] = deque()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Begin a job. Raises `RuntimeError` if no thread can be started. Any thread."""
        try:
            spare = self._spare.pop()
        except IndexError:
            self._start_thread(name, work)
            return
        try:
            spare.put((name, work))
        except BaseException:  # no memory: the thread goes on waiting
            self._spare.append(spare)
            raise

    def close(self) -> None:
        """Let the threads end as soon as their jobs are done. Any thread."""
        self._closed = True
        # A thread that has waited long enough takes itself out at any moment, so an empty deque is no
        # surprise.
        with contextlib.suppress(IndexError):
            while True:
                self._spare.pop().put(None)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for all threads to end; returns whether they have. After `close`."""
        deadline = time.monotonic() + timeout
        for thread in list(self._threads):
            with contextlib.suppress(RuntimeError):  # Python does not consider it started yet
                thread.join(max(0.0, deadline - time.monotonic()))
        return not self._threads

    def _start_thread(self, name: str, work: Callable[[], object]) -> None:
        jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        jobs.put((name, work))
        thread = threading.Thread(target=self._do_jobs, args=(jobs,), name=name, daemon=True)
        self._threads.add(thread)
        try:
            start_thread(thread)
        except BaseException:
            self._threads.discard(thread)
            raise

    # A worker's thread ------------------------------------------------------------------------------------

    def _do_jobs(self, jobs: "queue.SimpleQueue[Job]") -> None:
        me = threading.current_thread()
        job = jobs.get()
        try:
            while job:
                me.name = job[0]
                job[1]()
                job = None  # a thread that waits must not keep what it worked on
                job = self._next_job(me, jobs)
        finally:
            self._threads.discard(me)

    def _next_job(self, me: threading.Thread, jobs: "queue.SimpleQueue[Job]") -> Job:
        """Return another job; None if there was none for a while."""
        if self._closed or len(self._spare) >= self._most_spare:
            return None
        self._spare.append(jobs)
        me.name = "spare"
        try:
            return jobs.get(timeout=self._linger)
        except queue.Empty:
            pass
        try:
            self._spare.remove(jobs)
        except ValueError:
            return jobs.get()  # somebody has just taken it out, and brings a job
        return None
