"""Lines that the log could not write."""

from __future__ import annotations

from cc_proxy.log.writing import Logging


def lost(log: Logging) -> int:
    """How many lines could not be written since one was.

    The log says that in the next line alone, and a test has to know it before it lets that be written.
    """
    return log._sink.lost
