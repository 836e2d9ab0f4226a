"""What an embedded agent says on stderr: why it refused a command, since its answer has no room for that."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

#: How the private directories of embedded agents are called.
DIRECTORY_PREFIX = "cc-proxyctl-"
#: Longest path of the directory's parent: a path to a socket has at most 107 bytes.
_LONGEST_PARENT = 70
#: Bytes that are looked at.
_READ_SIZE = 64 * 1024
#: Seconds to wait for a line, and between two looks.
_PATIENCE, _INTERVAL = 0.5, 0.01


def parent() -> str:
    """Return a directory for private ones, that the proxy sees too: it may have a /tmp of its own."""
    for path in (os.environ.get("TMPDIR"), "/run", os.environ.get("XDG_RUNTIME_DIR")):
        if path and len(os.fsencode(path)) <= _LONGEST_PARENT and os.access(path, os.W_OK | os.X_OK):
            return path
    return "/tmp"  # noqa: S108 - the directory made in it is private


def log_name(container_id: str) -> str:
    """Return the name of an agent's log in its directory: an id may have characters that no file name has."""
    return hashlib.sha256(container_id.encode()).hexdigest()[:32] + ".log"


class AgentLog:
    """What the embedded agent that is registered as `container_id` says from now on, if it is this user's.

    Of any other VM there is no log, which is as if it said nothing.
    """

    def __init__(self, container_id: str) -> None:
        self._logs: dict[Path, int] = {}  # and where in them it begins
        for path in Path(parent()).glob(f"{DIRECTORY_PREFIX}*/{log_name(container_id)}"):
            with suppress(OSError):
                status = path.lstat()
                if status.st_uid == os.geteuid():
                    self._logs[path] = status.st_size

    def reason(self, command: str) -> str:
        """Return what was said last about a command; nothing if nothing was.

        What a VM says comes by its console, which may be slower than the answer.
        """
        deadline = time.monotonic() + _PATIENCE
        while not (said := self._last_line(f" {command}: ")) and self._logs and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        return said

    def _last_line(self, mark: str) -> str:
        lines = [line for path, size in self._logs.items() for line in _lines(path, size)]
        return next((line for line in reversed(lines) if mark in line), "")


def _lines(path: Path, offset: int) -> list[str]:
    """Return the lines that have come after the offset, whole ones."""
    with suppress(OSError), path.open("rb") as log:
        log.seek(offset)
        return log.read(_READ_SIZE).decode(errors="replace").rpartition("\n")[0].splitlines()
    return []
