"""Faults put into the program: what no client and no kernel can be made to do at the right moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

UNEXPECTED = KeyError("nobody expects it")


@contextmanager
def broken(
    owner: object, name: str, error: BaseException = UNEXPECTED, *, when: Callable[..., object] | None = None
) -> Iterator[threading.Event]:
    """Meanwhile calls of `owner.name` fail, or those of which `when` says so; yields whether one has failed.

    `when` gets the arguments of the call. It may be what makes others wait, or note that they are there.
    """
    real = getattr(owner, name)
    failed = threading.Event()

    def call(*args: object, **named: object) -> object:
        if when and not when(*args, **named):
            return real(*args, **named)
        failed.set()
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield failed


def once() -> Callable[..., bool]:
    """For `when`: the first call alone."""
    left = [True]
    return lambda *_, **__: bool(left) and left.pop()
