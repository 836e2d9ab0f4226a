"""The embedded agent as a program: `cc-proxyctl agent`, or the first process of a VM."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from cc_proxy.agent import guest
from cc_proxy.agent.agent import Agent, Surroundings
from cc_proxy.agent.errors import CannotListen, Panic
from cc_proxy.agent.orphans import Orphans
from cc_proxy.agent.quirks import NO_QUIRKS, Quirks
from cc_proxy.agent.virtioport import VirtioPort, find_ports
from cc_proxy.log.printable import printable
from cc_proxy.tokens import TokenBucket

EXIT_POWER_OFF = 0
EXIT_NO_SOCKET = 1
EXIT_PANIC = 2
EXIT_MISUSE = 2

#: In characters. Reasons quote the host, which may have sent any length.
_LONGEST_REASON = 500
#: Refusals that are reported in one burst, and per second in the long run.
_BURST, _PER_SECOND = 100, 2.0

_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
# Popen resets these in its children by itself.
_IGNORED_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})


def run_agent(
    ctl: str | os.PathLike[str],
    io: str | os.PathLike[str],
    quirks: Quirks = NO_QUIRKS,
    *,
    lossless: bool = False,
    on_listening: Callable[[], None] | None = None,
) -> int:
    """Be a VM with these two sockets until it powers off, or SIGTERM or SIGINT comes.

    Returns the exit status: 0 after any of these; 1 if a socket cannot be had, and 2 after a panic, with the
    reason on stderr. The reasons of refused commands go there too. `on_listening` is called once both sockets
    take connections. For `lossless` see `Agent`.

    Call it in the main thread of a process that does nothing else: it takes over all signals and children.
    """
    surroundings = Surroundings(orphans=Orphans(), on_refused=_Refusals())
    return _run(
        lambda: Agent(ctl, io, quirks, lossless=lossless, surroundings=surroundings),
        surroundings,
        on_listening,
    )


def run_guest() -> int:
    """Be the first process of a virtual machine and the agent on its two ports; power it off at the end.

    Returns only if it is not the first process: 2, with the reason on stderr.
    """
    if os.getpid() != 1:
        return _fail("--guest is for the first process of a virtual machine", EXIT_MISUSE)
    guest.be_init(_serve_guest)
    return EXIT_POWER_OFF


def _serve_guest() -> None:
    guest.prepare(_say)
    surroundings = Surroundings(VirtioPort, guest.Guest(_say), Orphans(), _Refusals())
    try:
        ctl, io = find_ports(guest.PORTS)
    except CannotListen as error:
        _say(str(error))
        return
    _run(
        lambda: Agent(ctl, io, lossless=True, surroundings=surroundings),
        surroundings,
        lambda: _say("serves its two ports"),
    )


def _run(
    make: Callable[[], Agent], surroundings: Surroundings, on_listening: Callable[[], None] | None
) -> int:
    """Make an agent and let it serve; returns the exit status."""
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        agent = make()
    except CannotListen as error:
        return _fail(str(error), EXIT_NO_SOCKET)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    with agent, surroundings.orphans or nullcontext(), _signals_for(agent):
        if on_listening is not None:
            on_listening()
        try:
            agent.serve()
        except Panic as panic:
            return _fail(f"panic: {panic}", EXIT_PANIC)
    return EXIT_POWER_OFF


class _Refusals:
    """Reports why commands are refused, at a bounded rate: stderr may be a file on a small disk."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(_BURST)

    def __call__(self, reason: str) -> None:
        now = time.monotonic()
        if self._bucket.has(1, _PER_SECOND, now):
            self._bucket.take(1, _PER_SECOND, now)
            _say(printable(reason)[:_LONGEST_REASON])


def _say(text: str) -> None:
    with suppress(OSError):
        print(f"cc-proxy agent: {text}", file=sys.stderr, flush=True)


def _fail(reason: str, status: int) -> int:
    _say(reason)
    return status


@contextmanager
def _signals_for(agent: Agent) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop the agent, and have its processes start with default signal handling.

    exec resets signals that have a handler. Those that are ignored stay ignored, and background programs are
    often started with SIGINT ignored. So ignored signals get an empty handler.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        agent.stop()

    before = {number: signal.getsignal(number) for number in {*_STOPPING, *_ignored(), signal.SIGCHLD}}
    for number in before:
        signal.signal(number, stop if number in _STOPPING else _do_nothing)
    wakeup_before = signal.set_wakeup_fd(agent.wakeup_fd, warn_on_full_buffer=False)
    mask_before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored() -> set[signal.Signals]:
    numbers = {number for number in signal.valid_signals() if isinstance(number, signal.Signals)}
    return {number for number in numbers - _IGNORED_BY_PYTHON if signal.getsignal(number) is signal.SIG_IGN}


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Stand in for SIG_IGN."""
