"""epoll for the pump, on top of selectors2.

selectors2 2.0.2 imports `Mapping` from `collections`, which has lacked it since Python 3.10. So selectors2 is
loaded with an `__import__` of its own that provides it. Nothing else in the process sees that.
"""

import builtins
import collections
import collections.abc
import errno
import importlib.util
import select
from types import ModuleType, SimpleNamespace
from typing import Any

#: Events to wait for. Hang-ups are always reported.
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR
NOTHING_ELSE = 0

#: The most events that one poll returns.
MOST_EVENTS = 256


def _load_selectors2() -> ModuleType:
    spec = importlib.util.find_spec("selectors2")
    if spec is None or spec.loader is None:
        raise ImportError("the package selectors2 is not installed", name="selectors2")
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _import_for_selectors2}
    spec.loader.exec_module(module)
    return module


def _import_for_selectors2(name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "collections":
        return SimpleNamespace(namedtuple=collections.namedtuple, Mapping=collections.abc.Mapping)
    return builtins.__import__(name, *args, **kwargs)


_selectors2 = _load_selectors2()


class Selector:
    """One epoll instance. Its own fd becomes readable when something is ready, so instances can be nested.

    One thread at a time.
    """

    def __init__(self) -> None:
        self._selector = _selectors2.EpollSelector()
        # Unlike epoll, selectors cannot watch an fd for hang-ups alone, or change its events cheaply.
        self._epoll: select.epoll = self._selector._epoll

    def fileno(self) -> int:
        """The fd of the epoll instance."""
        return self._epoll.fileno()

    def add(self, fd: int, events: int) -> None:
        """Watch `fd` for `events`, or with `NOTHING_ELSE` only for hang-ups.

        Raises `OSError` if the kernel watches no more fds for this user, or has no memory for it.
        """
        try:
            self._selector.register(fd, _selectors2.EVENT_READ)
        except OSError as error:
            self._selector.unregister(fd)  # selectors2 took it for watched before epoll refused it
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches is reached") from None
            raise
        if events != READ:
            self._epoll.modify(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Change the events that an fd is watched for."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; call this before it is closed. Does nothing if it is not watched."""
        if self.watches(fd):
            self._selector.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether `fd` is watched."""
        return fd in self._selector.get_map()

    def poll(self, timeout: float | None, most: int = MOST_EVENTS) -> list[tuple[int, int]]:
        """Wait `timeout` seconds (None: for ever); returns what is ready as pairs of fd and events.

        If more than `most` are ready, the others come first next time.
        """
        return self._epoll.poll(timeout, most)

    def close(self) -> None:
        """Close the epoll instance. The fds it watched stay open."""
        self._selector.close()
