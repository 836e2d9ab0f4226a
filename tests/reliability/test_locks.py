"""Locks: each has a place in the document, and what watches them in every test sees what it should."""

from __future__ import annotations

import ast
import queue
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import cc_proxy
from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.locks import LockWatch, WatchedLock, lock_of
from tests.wire.daemon import CHECKOUT


def locks_in(tree: ast.AST, owner: str) -> Iterator[str]:
    """The name of each lock that is made there; one of a module's has no owner."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "threading.Lock()":
            yield ast.unparse(node.targets[0]).replace("self", owner)
        else:
            yield from locks_in(node, node.name if isinstance(node, ast.ClassDef) else owner)


def test_each_lock_is_in_the_document_and_no_other() -> None:
    package = Path(cc_proxy.__file__).parent
    made: list[str] = []
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("ctl", "agent"):
            continue  # other programs
        text = path.read_text()
        found = [name if "." in name else f"{path.stem}.{name}" for name in locks_in(ast.parse(text), "")]
        assert len(found) == len(re.findall(r"\b(?:R?Lock|Condition|Semaphore)\(", text)), path
        made += dict.fromkeys(found)  # one that may be replaced is made in two places
    document = (CHECKOUT / "docs/architecture.md").read_text()
    (paragraph,) = (part for part in document.split("\n\n") if part.startswith("Locks: "))
    listed = re.findall(r"`(\w+\.\w+)`", paragraph.partition(".\n")[0] + ".")
    assert sorted(listed) == sorted(made)


def test_locks_of_the_project_are_watched_and_no_others(space: SpoolSpace) -> None:
    assert lock_of(space).name == "SpoolSpace._lock"
    assert not isinstance(queue.Queue[int]().mutex, WatchedLock)


def test_lock_that_is_taken_while_another_is_held_is_noted() -> None:
    watch = LockWatch()
    outer, inner = WatchedLock("outer", watch), WatchedLock("inner", watch)
    with outer:
        pass
    with inner:
        assert watch.held() == ["inner"]
    assert not watch.mistakes
    with outer, inner:
        assert not inner.acquire(blocking=False)
    assert watch.mistakes == ["inner was taken while outer was held, by MainThread"]
    assert not watch.held()


def test_threads_hold_locks_of_their_own() -> None:
    watch = LockWatch()
    mine, theirs = WatchedLock("mine", watch), WatchedLock("theirs", watch)

    def take() -> None:
        with theirs:
            pass

    with mine:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert not watch.mistakes
