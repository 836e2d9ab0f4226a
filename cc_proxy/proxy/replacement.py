"""Handing the whole daemon over from one process to the next. Main thread."""

import contextlib
import time

from msgspec.structs import replace

from cc_proxy import __version__
from cc_proxy.access import names_others
from cc_proxy.continuity import gaps
from cc_proxy.continuity.format import DaemonRecord, DaemonState, encode, encode_settings
from cc_proxy.continuity.heirs import Heir, NotReplaced
from cc_proxy.log import faults
from cc_proxy.log.levels import LEVELS, current_level, logger, set_level
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.clients.status import About
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import LiveSettings, Settings

#: Seconds that clients' threads get to come to rest, and the pumps after them.
_TIMEOUT = 3.0


def hand_over(
    server: Server, registry: Registry, settings: Settings, heir: Heir, about: About
) -> DaemonState | None:
    """Have `heir` go on with everything. If it does not, return the state, for this process to go on with."""
    if not server.rest(_TIMEOUT):
        logger.error("not handed over: connections whose threads hang")
    rested_at = time.monotonic()
    for vm in registry.rest_pumps(_TIMEOUT):
        logger.error("not handed over: its pump hangs", extra={"vm": vm.container_id})
    users = registry.users.state()
    connections, vms = server.hand_over()
    state = DaemonState(
        program=__version__,
        rested_at=rested_at,
        settings=encode_settings(settings),
        log_level=_log_level(settings),
        known_since=about.known_since,
        replaced=replace(about.replaced, restarts=about.replaced.restarts + 1, last="restart"),
        gaps=gaps.counts(),
        faults=faults.counts(),
        users=users,
        registry=vms,
        server=connections,
    )
    with contextlib.closing(heir):
        try:
            data, fds = encode(state)
            heir.hand_over(data, fds)
        except NotReplaced as error:
            logger.error("not replaced: this process goes on", extra={"error": str(error)})
        except Exception:  # whatever it is, this process still has everything
            faults.note("not replaced: this process goes on")
        else:
            logger.info("replaced: another process goes on")
            return None
    # Without faults and gaps, which this process has counted already.
    return replace(state, replaced=about.replaced, faults={}, gaps=(0, 0))


def describe_daemon(listener: Listener, live: LiveSettings, about: About) -> DaemonRecord:
    """Return what to keep of the daemon itself."""
    settings = live.current
    return DaemonRecord(
        program=__version__,
        settings=encode_settings(settings),
        log_level=_log_level(settings),
        known_since=about.known_since,
        replaced=about.replaced,
        gaps=gaps.counts(),
        listener=listener.state,
    )


def _log_level(settings: Settings) -> str | None:
    """Return the log's level, if it is not that of the settings."""
    level = current_level()
    return None if level == settings.log.level else level


def take_over(state: DaemonState, server: Server, registry: Registry) -> float:
    """Restore everything except the threads, which are started later. Raises `OSError`.

    Returns the seconds that it took.
    """
    begun = time.monotonic()
    registry.users.restore(state.users)
    server.restore(state.server, registry.restore(state.registry))
    faults.restore(state.faults)
    gaps.restore(state.gaps)
    for level in LEVELS:
        if level == state.log_level:
            set_level(level)
    return time.monotonic() - begun


def adapt(listener: Listener, settings: Settings) -> None:
    """Have the previous process's socket follow the settings, except for its path, which cannot change."""
    listener.open_to(for_all=names_others(settings.access))
    path = listener.socket.getsockname()
    if listener.own and path != settings.socket_path:
        fields = {"waiting": {"socket_path": (path, settings.socket_path)}}
        logger.warning("settings that take effect after a stop and a start", extra=fields)


def say_what_was_taken_over(state: DaemonState, reading: float) -> None:
    """Log what was taken over, the time since everything came to rest, and the time for `reading` alone."""
    channels = [vm.channel for vm in state.registry.vms if vm.channel]
    fields = {
        "vms": len(channels),
        "sessions": sum(len(channel.streams.sessions) for channel in channels),
        "connections": len(state.server.connections),
        "from": state.program,
        "seconds": round(time.monotonic() - state.rested_at, 3),
        "reading": round(reading, 3),
    }
    logger.info("taken over from the previous process", extra=fields)
