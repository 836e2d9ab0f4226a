"""Run a module that does not outlive the benchmark: `python -m bench.launch PARENT MODULE ARGUMENT...`.

The benchmark ends what it has started, but cannot if it is killed itself; the kernel can.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def ends_with(parent: int) -> bool:
    """Have this process end when its parent does; False if the parent has ended already.

    To be called again after a change of user: the kernel forgets it then.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before the kernel was asked.
    return os.getppid() == parent


def main() -> None:
    parent, *command = sys.argv[1:]
    if ends_with(int(parent)):
        os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    main()
