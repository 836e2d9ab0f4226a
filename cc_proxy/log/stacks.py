"""Logs what every thread is doing (SIGUSR1)."""

import logging
import sys
import threading
import traceback
from collections import defaultdict
from types import FrameType

from cc_proxy.log.levels import logger

#: The most stacks that are logged, those of most threads first; and the most threads named for each.
_MOST_STACKS = 64
_MOST_NAMES = 8

_Place = tuple[str, int, str]


def log_stacks() -> None:
    """Log the stacks of all threads. Any thread.

    Threads with the same stack share a line, because there may be thousands. The lines have level info, but
    are logged whatever the log level is, because somebody has asked for them.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    groups: dict[tuple[_Place, ...], list[str]] = defaultdict(list)
    for ident, frame in sys._current_frames().items():
        groups[_places(frame)].append(names.get(ident, f"thread {ident}"))
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    for places, members in ordered[:_MOST_STACKS]:
        stack = "".join(traceback.format_list([traceback.FrameSummary(*place) for place in places]))
        _log("stack", count=len(members), threads=members[:_MOST_NAMES], stack=stack)
    if left := ordered[_MOST_STACKS:]:
        _log("stacks left out", count=sum(len(members) for _, members in left))


def _places(frame: FrameType | None) -> tuple[_Place, ...]:
    """Return where a thread is, outermost frame first, without looking up any source line."""
    places: list[_Place] = []
    while frame:
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(reversed(places))


def _log(event: str, **fields: object) -> None:
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, event, (), None, extra=fields))
