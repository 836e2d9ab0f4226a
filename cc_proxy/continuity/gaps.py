"""Gaps: bytes of streams that a process had read and not passed on when it was killed.

For the main thread; any thread may ask for `counts`.
"""

from collections.abc import Iterable

from cc_proxy.api.status import MOST_LISTED
from cc_proxy.log.levels import logger

_count = _bytes = 0


def note(vm: str, direction: str, streams: Iterable[int], most_bytes: int) -> None:
    """Log and count a gap of at most `most_bytes`.

    It is in one or more of these `streams` of a VM; in any of them if none is named. `direction` is `output`
    or `stdin`.
    """
    global _count, _bytes  # noqa: PLW0603
    _count += 1
    _bytes += most_bytes
    named = sorted(streams)
    fields = {
        "vm": vm,
        "direction": direction,
        "streams": named[:MOST_LISTED],
        "of": len(named),
        "most_bytes": most_bytes,
    }
    logger.error("gap: the previous process was killed with bytes on their way", extra=fields)


def counts() -> tuple[int, int]:
    """Return how many gaps there were, and how many bytes were lost in them at most."""
    return _count, _bytes


def restore(counts: tuple[int, int]) -> None:
    """Count the gaps of earlier processes, too."""
    global _count, _bytes
    _count, _bytes = _count + counts[0], _bytes + counts[1]
