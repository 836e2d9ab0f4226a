"""Waiting for clients that say nothing: their threads are woken a few at a time."""

import contextlib
import os
import queue
import select
import socket
import threading

from cc_proxy import faults

#: So many threads of a user are woken before this one has to get the interpreter again, as they then have to.
_AT_ONCE = 16


class Idle:
    """Wakes the threads of connections once there is something to read, each user's in turn.

    Threads that wait in recv(2) are all woken by the kernel when thousands of clients go at once, and while
    they fight for the interpreter nobody else gets it, for seconds.
    """

    def __init__(self) -> None:
        self._users = select.epoll()  # has the epoll instance of each
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._users.register(self._wake, select.EPOLLIN)
        self._stopping = False
        self._asked = False  # the thread has been asked whether it is alive; it takes that back
        # By uid, and by their fds; as many as there are users who may connect.
        self._clients: dict[int, select.epoll] = {}
        self._by_fd: dict[int, select.epoll] = {}
        # By fd. Each thread adds and removes its own: single steps of the interpreter, which need no lock.
        self._waiting: dict[int, queue.SimpleQueue[None]] = {}
        self._thread = threading.Thread(target=self._wake_all, name="idle", daemon=True)

    def start(self) -> None:
        """Begin to wake. Main thread."""
        self._thread.start()

    def close(self) -> None:
        """Wake those who still wait, and nobody any more. Main thread."""
        if self._thread.ident is not None:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for waiting in list(self._waiting.values()):
            waiting.put(None)
        for epoll in (*self._clients.values(), self._users):
            epoll.close()
        os.close(self._wake)

    def answers(self) -> bool:
        """Whether the thread has answered the last call of this, and ask it again. Main thread."""
        if self._asked:
            return False
        self._asked = True
        os.eventfd_write(self._wake, 1)
        return True

    def admit(self, uid: int) -> None:
        """Be ready for connections of a user. One thread."""
        if uid not in self._clients:
            epoll = select.epoll()
            self._by_fd[epoll.fileno()] = self._clients[uid] = epoll
            self._users.register(epoll, select.EPOLLIN)

    def wait(self, uid: int, sock: socket.socket, timeout: float | None) -> None:
        """Return once a user's socket has something to read or is closed, or after `timeout` seconds.

        Any thread.
        """
        epoll = self._clients[uid]
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        fd = sock.fileno()
        self._waiting[fd] = woken
        try:
            epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
            with contextlib.suppress(queue.Empty):
                woken.get(timeout=timeout)
        finally:
            del self._waiting[fd]
            with contextlib.suppress(OSError, ValueError):  # it may be closed by now
                epoll.unregister(fd)

    def _wake_all(self) -> None:
        """Wake until the end, whatever happens."""
        while not self._stopping:
            try:
                self._wake_ready()
            except Exception:
                faults.note("waking connections failed")

    def _wake_ready(self) -> None:
        """Wake some of each user's that are ready."""
        for fd, _ in self._users.poll():
            if fd == self._wake:
                os.eventfd_read(fd)
                self._asked = False
            else:
                self._wake_some(self._by_fd[fd])

    def _wake_some(self, epoll: select.epoll) -> None:
        for fd, _ in epoll.poll(0, _AT_ONCE):
            waiting = self._waiting.get(fd)
            if waiting:
                waiting.put(None)
