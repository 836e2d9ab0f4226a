"""Starting threads when memory is short: said at once, and nobody waits for what never begins."""

import subprocess
import sys
import threading

import pytest

from cc_proxy.linux.threads import start_thread

_IN_LITTLE_ROOM = """
import resource, threading
from pathlib import Path
from cc_proxy.linux.threads import start_thread

threading.stack_size(512 * 1024)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + {more}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
thread = threading.Thread(target=print, args=["begun"])
try:
    start_thread(thread)
except RuntimeError as error:
    print(error)
"""


def test_thread_is_started() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    start_thread(thread)
    thread.join()
    assert done.is_set()


@pytest.mark.parametrize(
    ("more", "says"),
    [(0, "no memory for another thread"), (1 << 20, "no memory for another thread"), (16 << 20, "begun")],
)
def test_thread_for_which_there_is_no_room_is_refused(more: int, says: str) -> None:
    program = _IN_LITTLE_ROOM.format(more=more)
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=20
    )
    assert result.stdout.strip() == says
