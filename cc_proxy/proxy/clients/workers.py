"""Threads for jobs that may take long. A thread does one job at a time, and may then get another."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from cc_proxy.linux.threads import start_thread

#: The thread's name during the job, and what to do; None ends the thread.
Job = tuple[str, Callable[[], object]] | None

#: Seconds that a thread waits for another job before it ends.
_LINGER = 0.1


class Workers:
    """Starts each job at once, in a thread of its own.

    Starting and ending a thread takes longer than most jobs, so a thread whose job is done waits a little
    for another.
    """

    def __init__(self, *, linger: float = _LINGER) -> None:
        self._linger = linger
        # The queues of threads without a job, the latest last. Taking one out means putting one job into it.
        # No lock: appending, popping and removing are atomic under the GIL, and the same goes for `_threads`.
        self._spare: deque[queue.SimpleQueue[Job]] = deque()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Start a job. Raises `RuntimeError` if no thread can be started. Any thread."""
        try:
            spare = self._spare.pop()
        except IndexError:
            self._start_thread(name, work)
            return
        try:
            spare.put((name, work))
        except BaseException:  # no memory; the thread goes on waiting
            self._spare.append(spare)
            raise

    def close(self) -> None:
        """Have the threads end when their jobs are done. Any thread."""
        self._closed = True
        # Until it is empty. (A thread that has waited long enough takes itself out at any moment.)
        with contextlib.suppress(IndexError):
            while True:
                self._spare.pop().put(None)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for all threads to end; returns whether they have. After `close`."""
        deadline = time.monotonic() + timeout
        for thread in list(self._threads):
            with contextlib.suppress(RuntimeError):  # it has not quite started yet
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
                job = None  # a thread that waits must not keep its last job's objects
                job = self._next_job(me, jobs)
        finally:
            self._threads.discard(me)

    def _next_job(self, me: threading.Thread, jobs: "queue.SimpleQueue[Job]") -> Job:
        """Wait for another job; returns None if the thread is to end."""
        if self._closed:
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
            return jobs.get()  # another thread has just taken the queue, and will put a job in
        return None
