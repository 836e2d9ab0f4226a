"""The daemon as a whole: what is started, in which order, what signals do, and how it stops."""

import contextlib
import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from cc_proxy.access import look_up_again, names_others, unknown_names
from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.api.status import count
from cc_proxy.continuity.format import DaemonState
from cc_proxy.continuity.heirs import Heir, NotReplaced
from cc_proxy.continuity.inheritance import Inheritance, Nothing
from cc_proxy.continuity.memory import BUFFER_SIZE
from cc_proxy.linux.systemd import Notifier, monotonic_usec
from cc_proxy.linux.threads import STACK_SIZE
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.log.stacks import log_stacks
from cc_proxy.log.writing import Logging
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.clients.status import About
from cc_proxy.proxy.ending import stop
from cc_proxy.proxy.replacement import (
    adapt,
    describe_daemon,
    hand_over,
    say_what_was_taken_over,
    take_over,
)
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.watchdog import Watchdog
from cc_proxy.settings import LiveSettings, Reload, Settings
from cc_proxy.settingsfile import SettingsError

#: Seconds between two rounds of what the main thread does unasked (`Supervisor._tick`).
_TICK = 1.0

#: Seconds until unknown users and groups are looked up again: their name service may be up by then.
_LOOK_UP_INTERVAL = 30.0

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = {*_STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}


def block_signals() -> None:
    """Keep signals until `serve` waits for them; threads made from now on never see them. Main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@dataclass(frozen=True)
class Host:
    """What the daemon gets from the program that runs it. Main thread, except for `settings_file`."""

    #: Reads the settings again; raises `SettingsError`.
    read_settings: Callable[[], Settings]
    #: Returns the file that they were read from last; empty if there is none.
    settings_file: Callable[[], str]
    notifier: Notifier
    log: Logging
    #: Started before there are threads; the caller ends it.
    connector: Connector
    inheritance: Inheritance


def serve(listener: Listener, settings: Settings, host: Host, state: DaemonState | None = None) -> int:
    """Serve clients on a listening socket until SIGTERM or SIGINT, or until SIGUSR2 and a replacement.

    With a `state`, go on with what the previous process handed over. Returns the exit status. Raises
    `Nothing` if the previous process goes on itself. Main thread, after `block_signals`.
    """
    threading.stack_size(STACK_SIZE)
    _tune_collector()
    live = LiveSettings(settings)
    while not isinstance(left := _serve(listener, live, host, state), int):
        listener, state = Listener.from_state(left.server.listener), left
    return left


def _serve(
    listener: Listener, live: LiveSettings, host: Host, state: DaemonState | None
) -> DaemonState | int:
    """Serve; returns the exit status, or the state to go on with if no other process does after all."""
    keeper = host.inheritance.keeper()
    registry = Registry(live, host.connector, listener.socket.getsockname(), keeper)
    about = About(host.settings_file)
    if state:
        about = About(host.settings_file, state.known_since, state.replaced)
    with contextlib.ExitStack() as undo:
        try:
            server = undo.enter_context(Server(listener, registry, live, about, keeper))
            if state:
                reading = host.inheritance.reading + take_over(state, server, registry)
            describe = functools.partial(describe_daemon, listener, live, about)
            if error := host.inheritance.take_over(describe):
                logger.warning("a restart of cc-proxy ends all VMs", extra={"error": error})
        except BaseException as error:
            if state:
                listener.hand_over()  # the socket's file still belongs to the previous process
                if isinstance(error, OSError):
                    raise Nothing(str(error)) from None
            raise
        if state:
            adapt(listener, live.current)
        registry.go_on()
        server.start()
        if state:
            say_what_was_taken_over(state, reading)
        logger.info("ready", extra={"socket": listener.socket.getsockname()})
        _warn_of_unknown(live.current)
        supervisor = Supervisor(live, host, listener, registry, Watchdog(server, registry))
        received = supervisor.run(took_over=bool(state))
        if supervisor.heir:
            left = hand_over(server, registry, live.current, supervisor.heir, about)
            return left or supervisor.heir.exit_status
        logger.info("stopping", extra={"signal": received.name})
        host.notifier.tell("STOPPING=1", "STATUS=Stopping")
        host.inheritance.end()
        stop(server, registry)
    return 0


def _tune_collector() -> None:
    """Have the cycle collector look at less, and less often.

    To it, slices of a pump's buffer may be parts of cycles. With the usual threshold of 700 it walks them
    several times in each batch, which takes an eighth of the pump's time. So the threshold is higher than the
    number of slices in any batch. And what exists from the start is frozen, or each full collection would
    walk it while no other thread can run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2 * BUFFER_SIZE // FRAME_HEADER.size)


class Supervisor:
    """The main thread while the daemon serves: does what signals ask for, and tells the service manager.

    It waits for signals, so nothing ever runs in a signal handler.
    """

    def __init__(
        self, live: LiveSettings, host: Host, listener: Listener, registry: Registry, watchdog: Watchdog
    ) -> None:
        self._live = live
        self._host = host
        self._listener = listener
        self._registry = registry
        self._watchdog = watchdog
        self._actions = {
            signal.SIGHUP: self._reload,
            signal.SIGUSR1: log_stacks,
            signal.SIGUSR2: self._prepare_heir,
            signal.SIGALRM: self._tick,
        }
        self._status = "STATUS=Ready"
        self._told = ""  # the status that the manager knows
        self._heard = True  # whether it took the last message
        # Half of what the manager allows, so that one message may be late.
        self._interval = host.notifier.watchdog / 2 if host.notifier.watchdog else None
        self._served_at = time.monotonic()
        self._reading: Future[Settings] | None = None  # the settings that are being read
        self._looking_up: Future[Settings] | None = None  # the same settings, with names looked up again
        self._read_again = False  # whether SIGHUP came while they were read
        self._looked_up_at = self._served_at
        #: What goes on after this process; None while there is nothing.
        self.heir: Heir | None = None

    def run(self, *, took_over: bool = False) -> signal.Signals:
        """Work until a signal ends this process; returns it. SIGUSR2 does if another process can go on."""
        received = signal.SIGUSR2
        self._tell("READY=1", self._new_status())
        if took_over and self._is_started_again():
            self._prepare_heir()
        tick = min(_TICK, (self._interval or _TICK) / 2)
        # A timer, because sigtimedwait may return a signal that nobody sent if this process was stopped for
        # longer than the timeout (CPython does not check then whether the call was interrupted).
        signal.setitimer(signal.ITIMER_REAL, tick, tick)
        while not self.heir and (received := _next_signal()) not in _STOP_SIGNALS:
            try:
                self._actions[received]()
            except Exception:  # whatever it is, VMs and their clients can do without
                faults.note("signal not carried out", signal=received.name)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return received

    def _is_started_again(self) -> bool:
        """Whether the manager sent a stop signal before it knew that this process was ready.

        Then it has not run `ExecStop=`, which tells a restart from a stop, and only the manager knows which
        of them this is. So everything is left to the next process. If it is a stop, the manager drops it.
        """
        notifier = self._host.notifier
        return notifier.wanted and notifier.is_heard() and bool(signal.sigpending() & _STOP_SIGNALS)

    def _tick(self) -> None:
        self._serve_watchdog()
        self._listener.look_after()
        self._take_settings()
        self._look_up_names()
        self._host.log.report_suppressed()
        self._host.inheritance.keep_daemon()
        if self._host.notifier.wanted and self._new_status() != self._told:
            self._tell(self._status, wait=False)

    def _serve_watchdog(self) -> None:
        now = time.monotonic()
        if self._interval is None or now - self._served_at < self._interval:
            return
        if self._watchdog.check(self._interval) and self._tell("WATCHDOG=1", wait=False):
            self._served_at = now

    def _new_status(self) -> str:
        if self._registry.is_free(0.1):  # if the lock is stuck, this thread must not get stuck too
            vms = self._registry.vms()
            sessions = sum(vm.sessions for vm in vms)
            self._status = f"STATUS={count(len(vms), 'VM')}, {count(sessions, 'session')}"
        return self._status

    def _reload(self) -> None:
        """Begin to read the settings; `_take_settings` goes on with them."""
        if self._reading:
            logger.warning("the settings are still being read: they are read again after that")
            self._read_again = True
            return
        self._looking_up = None
        self._reading = _read_aside(self._host.read_settings)
        self._tell("RELOADING=1", monotonic_usec(), "STATUS=Reading the settings again")

    def _take_settings(self) -> None:
        """Replace the settings if new ones have been read."""
        if self._reading is None or not self._reading.done():
            return
        reading, self._reading = self._reading, None
        try:
            self._apply(self._live.replace(reading.result()))
        except SettingsError as error:
            logger.error("settings not reloaded: the old ones stay", extra={"error": str(error)})
        except Exception:
            faults.note("settings not reloaded: the old ones stay")
        finally:
            self._tell("READY=1", self._new_status())
        if self._read_again:
            self._read_again = False
            self._reload()

    def _prepare_heir(self) -> None:
        """Have another process go on with everything, if there can be one."""
        heir = self._host.inheritance.heir()
        try:
            heir.prepare()
        except NotReplaced as error:
            logger.error("not replaced: this process goes on", extra={"error": str(error)})
        else:
            self.heir = heir

    def _look_up_names(self) -> None:
        """Look up unknown users and groups again, and let them in once they are known."""
        if self._looking_up and self._looking_up.done():
            looked_up, self._looking_up = self._looking_up, None
            if looked_up.result() != self._live.current:
                self._apply(self._live.replace(looked_up.result()))
        due = time.monotonic() - self._looked_up_at >= _LOOK_UP_INTERVAL
        if due and not self._reading and not self._looking_up and unknown_names(self._live.current.access):
            self._looked_up_at = time.monotonic()
            current = self._live.current
            self._looking_up = _read_aside(
                lambda: msgspec.structs.replace(current, access=look_up_again(current.access))
            )

    def _apply(self, reload: Reload) -> None:
        current = self._live.current
        # Even if the settings have not changed: a client may have changed the level since.
        self._host.log.set_level(current.log.level)
        self._listener.open_to(for_all=names_others(current.access))
        logger.info("settings reloaded", extra={"changed": reload.changed})
        if reload.waiting:
            logger.warning("settings that take effect after a restart", extra={"waiting": reload.waiting})
        _warn_of_unknown(current)

    def _tell(self, *assignments: str, wait: bool = True) -> bool:
        """Tell the manager; returns whether it took the message, or wants none. Logs it once if not."""
        notifier = self._host.notifier
        if not notifier.wanted:
            return True
        heard = notifier.tell(*assignments, wait=wait)
        if self._heard and not heard:
            logger.warning("the service manager cannot be told", extra={"error": notifier.error})
        self._heard = heard
        if heard:
            self._told = self._status if self._status in assignments else self._told
        return heard


def _read_aside(read: Callable[[], Settings]) -> "Future[Settings]":
    """Read in a thread of its own, since a file or a name service may not answer for long.

    Returns the future result. A tick comes as soon as it is there. The thread ends when it has read, or with
    the process.
    """
    future: Future[Settings] = Future()

    def run() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)
        _wake()

    threading.Thread(target=run, name="settings", daemon=True).start()
    return future


def _wake() -> None:
    os.kill(os.getpid(), signal.SIGALRM)  # to the process: a signal for this thread would stay blocked


def _warn_of_unknown(settings: Settings) -> None:
    if names := unknown_names(settings.access):
        logger.warning("[access] names users or groups that nobody knows so far", extra={"names": names})


def _next_signal() -> signal.Signals:
    """Wait for a signal and return it. SIGUSR2 comes first, then those that stop the daemon.

    The kernel would return the lowest number, and ticks may come as fast as they are handled. SIGUSR2 may
    come together with SIGTERM, and then another process is to go on.
    """
    pending = signal.sigpending() & {signal.SIGUSR2} or signal.sigpending() & _STOP_SIGNALS
    return signal.Signals(signal.sigwait(pending or _SIGNALS))
