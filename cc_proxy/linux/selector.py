"""epoll for the pump, by selectors2.

selectors2 2.0.2 asks `collections` for `Mapping`, which has not been there since Python 3.10. It is given
that while it is loaded, in its own namespace, and nothing else of the process sees it.
"""

import builtins
import collections
import collections.abc
import importlib.util
import select
from types import ModuleType, SimpleNamespace
from typing import Any

#: What may be waited for. Hang-ups are always reported.
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR
NOTHING_ELSE = 0

#: So many fds are looked at together.
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
    """One epoll instance. Its own fd becomes readable when something is ready, so that they nest.

    One thread uses it, or several that keep out of each other's way.
    """

    def __init__(self) -> None:
        self._selector = _selectors2.EpollSelector()
        # selectors know neither an fd that is only watched for hang-ups, nor a cheap change of mind.
        self._epoll: select.epoll = self._selector._epoll

    def fileno(self) -> int:
        """The fd of the epoll instance."""
        return self._epoll.fileno()

    def add(self, fd: int, events: int) -> None:
        """Watch `fd` for `events`, which may be `NOTHING_ELSE` than hang-ups."""
        self._selector.register(fd, _selectors2.EVENT_READ)
        if events != READ:
            self._epoll.modify(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch an fd that is watched already for other `events`."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Watch `fd` no more; to be called before it is closed. No matter if it was not watched."""
        if self.watches(fd):
            self._selector.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether `fd` is watched."""
        return fd in self._selector.get_map()

    def poll(self, timeout: float | None, most: int = MOST_EVENTS) -> list[tuple[int, int]]:
        """Wait `timeout` seconds (None: for ever) and return what is ready as pairs of fd and events.

        If more than `most` are ready, the others are first the next time.
        """
        return self._epoll.poll(timeout, most)

    def close(self) -> None:
        """Close the epoll instance; what it watched stays open."""
        self._selector.close()
