"""Run a module that does not outlive the benchmark: `python -m bench.launch PARENT MODULE ARGUMENT...`.

The benchmark ends the processes that it has started. If it is killed, the kernel ends them.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def ends_with(parent: int) -> bool:
    """Have this process end when its parent does; returns False if the parent has ended already.

    Call it again after a change of user, which makes the kernel forget it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have ended before the kernel was asked.
    return os.getppid() == parent


def main() -> None:
    parent, *command = sys.argv[1:]
    if ends_with(int(parent)):
        os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    main()
