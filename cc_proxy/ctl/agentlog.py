"""The log of an embedded agent. It says why the agent refused a command; the agent's answer cannot."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

#: The names of the private directories of embedded agents begin with this.
DIRECTORY_PREFIX = "cc-proxyctl-"
#: Longest path of such a directory's parent: sockets are made in it, whose paths have at most 107 bytes.
_LONGEST_PARENT = 70
#: Bytes of a log that are searched.
_READ_SIZE = 64 * 1024
#: Seconds to wait for a line, and between two looks.
_PATIENCE, _INTERVAL = 0.5, 0.01


def parent() -> str:
    """Return the directory to make private ones in. The proxy must see it, and may have its own /tmp."""
    for path in (os.environ.get("TMPDIR"), "/run", os.environ.get("XDG_RUNTIME_DIR")):
        if path and len(os.fsencode(path)) <= _LONGEST_PARENT and os.access(path, os.W_OK | os.X_OK):
            return path
    return "/tmp"  # noqa: S108 - the directory made in it is private


def log_name(container_id: str) -> str:
    """Return the name of an agent's log. It is a hash: an id may have characters that a file name may not."""
    return hashlib.sha256(container_id.encode()).hexdigest()[:32] + ".log"


class AgentLog:
    """What the agent registered as `container_id` logs from now on.

    Only an embedded agent that this user started has a log. Any other VM seems to say nothing.
    """

    def __init__(self, container_id: str) -> None:
        self._logs: dict[Path, int] = {}  # each with its size by now
        for path in Path(parent()).glob(f"{DIRECTORY_PREFIX}*/{log_name(container_id)}"):
            with suppress(OSError):
                status = path.lstat()
                if status.st_uid == os.geteuid():
                    self._logs[path] = status.st_size

    def reason(self, command: str) -> str:
        """Return the last line about a command; empty if there is none.

        It waits for one: the log of a VM is its console, which may be slower than the agent's answer.
        """
        deadline = time.monotonic() + _PATIENCE
        while not (said := self._last_line(f" {command}: ")) and self._logs and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        return said

    def _last_line(self, mark: str) -> str:
        lines = [line for path, size in self._logs.items() for line in _lines(path, size)]
        return next((line for line in reversed(lines) if mark in line), "")


def _lines(path: Path, offset: int) -> list[str]:
    """Return the whole lines after the offset."""
    with suppress(OSError), path.open("rb") as log:
        log.seek(offset)
        return log.read(_READ_SIZE).decode(errors="replace").rpartition("\n")[0].splitlines()
    return []
