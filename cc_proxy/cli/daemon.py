"""`cc-proxy`, the daemon's command line."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import msgspec

from cc_proxy import __version__, settings
from cc_proxy.access import names_others, unknown_names
from cc_proxy.continuity.format import DaemonState
from cc_proxy.continuity.inheritance import Inheritance, Nothing
from cc_proxy.linux import systemd
from cc_proxy.linux.fds import raise_fd_limit
from cc_proxy.linux.memory import have_one_arena
from cc_proxy.linux.standard_fds import give_up_stderr, guard_standard_fds
from cc_proxy.linux.systemd import ActivationError, Notifier
from cc_proxy.log.levels import LEVELS, VERBOSE, LogLevel, logger
from cc_proxy.log.writing import Logging, stderr_is_journal
from cc_proxy.proxy import daemon
from cc_proxy.proxy.clients.listener import Listener, ListenError
from cc_proxy.proxy.daemon import Host
from cc_proxy.proxy.streams.spool import check_directory
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.settings import Settings
from cc_proxy.settingsfile import SettingsError

LOG_LEVEL_VARIABLE = "CC_PROXY_LOG_LEVEL"

EX_CONFIG = 78
EXIT_FAILED = 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="cc-proxy",
        description="Share the channels of virtual machine containers among their clients.",
        epilog=f"If no option sets the log level, the environment variable {LOG_LEVEL_VARIABLE} does.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"read the settings from FILE (default: {settings.DEFAULT_FILE} if it exists)",
    )
    parser.add_argument("--socket-path", metavar="PATH", help="listen at PATH")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--log-level", choices=LEVELS, help="log events of this level and above")
    level.add_argument(
        "-v", type=int, choices=VERBOSE, dest="verbose", metavar="{0,1,2,3}",
        help="log more: 0 nothing more, 1 requests and events, 2 frames too, 3 the VMs' consoles too",
    )  # fmt: skip
    parser.add_argument("--check-config", action="store_true", help="check the settings and exit")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    guard_standard_fds()
    try:
        return _run_as_told(build_parser().parse_args(argv))
    finally:
        give_up_stderr()


def _run_as_told(options: argparse.Namespace) -> int:
    if options.check_config:
        return _check(options)
    # Before there is a second thread, in which an unblocked signal would end the process at once.
    daemon.block_signals()
    raise_fd_limit()
    inheritance = Inheritance(notifier := Notifier(), _directory())
    wrong = ""
    try:
        chosen = choose_settings(options)
    except SettingsError as error:
        if not (kept := inheritance.settings):
            return _refuse(error)
        chosen, wrong = kept, str(error)
    leave_directory(options)
    have_one_arena()  # before the log's thread starts, or that would get an arena of its own
    connector = Connector()
    with contextlib.suppress(OSError):  # no process can be forked: the next hello tries again and reports it
        connector.start()  # this also forks, so it must precede the second thread
    log = Logging(chosen.log.level, chosen.log.format)
    log.start()
    status = EXIT_FAILED
    try:
        with contextlib.closing(connector), contextlib.closing(inheritance):
            if wrong:
                logger.error("settings not read: those from before stay", extra={"error": wrong})
            host = Host(
                lambda: read_again(options),
                lambda: options.config or "",
                notifier,
                log,
                connector,
                inheritance,
            )
            status = _run(chosen, host)
    finally:
        if not log.stop():
            os._exit(status)
    return status


def _directory() -> str:
    """Return the directory that relative paths on the command line start from; `/` if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _check(options: argparse.Namespace) -> int:
    """Check the settings; returns the exit status."""
    try:
        return _check_settings(choose_settings(options), options.config)
    except SettingsError as error:
        return _refuse(error)


def _check_settings(chosen: Settings, path: str | None) -> int:
    """Check what only this machine can tell of the settings, and print the result; returns the exit status.

    Raises `SettingsError` if no file can be made in the spool's directory, or a user or group is unknown.
    """
    _check_spool(chosen.spool.directory)
    file = settings.file_read(path)
    if unknown := unknown_names(chosen.access):
        raise SettingsError(f"{file}: [access]: nobody knows of {', '.join(map(repr, unknown))}")
    print(f"cc-proxy: {file}: the settings are right" if file else "cc-proxy: no file: the defaults")
    return 0


def leave_directory(options: argparse.Namespace) -> None:
    """Change to `/`, so that a client that names a path through /proc/self/cwd gains nothing."""
    _stay_with_file(options)
    if options.socket_path is not None:
        options.socket_path = os.path.abspath(options.socket_path)
    os.chdir("/")


def _stay_with_file(options: argparse.Namespace) -> None:
    """Remember which file was read, so that later the daemon reads that one even if it has vanished."""
    options.config = settings.file_read(options.config) or None


def read_again(options: argparse.Namespace) -> Settings:
    """Read the settings again, as they are now. Raises `SettingsError`."""
    chosen = choose_settings(options)
    _stay_with_file(options)
    return chosen


def _refuse(error: SettingsError) -> int:
    """Say on stderr, or in the journal, why the daemon does not start; returns the exit status."""
    if sys.stderr and stderr_is_journal(sys.stderr):
        log = Logging("info", "auto")
        log.start()
        logger.error("cannot start", extra={"error": str(error)})
        log.stop()
    elif sys.stderr:  # else it was closed from the start, and print() would write to stdout
        with contextlib.suppress(OSError):  # the exit status says it too
            print(f"cc-proxy: {error}", file=sys.stderr)
    return EX_CONFIG


def choose_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of the file, overridden by the command line and the environment.

    Raises `SettingsError`.
    """
    chosen = settings.load(options.config)
    level = options.log_level or VERBOSE.get(options.verbose) or _level_of_environment()
    if level:
        chosen = msgspec.structs.replace(chosen, log=msgspec.structs.replace(chosen.log, level=level))
    if options.socket_path is not None:
        path = os.path.abspath(options.socket_path)
        chosen = msgspec.structs.replace(chosen, socket_path=path)
    return chosen


def _level_of_environment() -> LogLevel | None:
    """Return the level that the environment sets, by its name or by a number as for `-v`.

    Raises `SettingsError`.
    """
    given = os.environ.get(LOG_LEVEL_VARIABLE)
    if not given:
        return None
    levels: dict[str, LogLevel] = {level: level for level in LEVELS}
    levels |= {str(number): level for number, level in VERBOSE.items()}
    if given not in levels:
        raise SettingsError(f"{LOG_LEVEL_VARIABLE}: expected one of {', '.join(levels)}, got {given!r}")
    return levels[given]


def _run(chosen: Settings, host: Host) -> int:
    """Serve until the daemon has to stop; returns the exit status."""
    with contextlib.closing(host.notifier):
        try:
            try:
                _check_spool(chosen.spool.directory)
            except SettingsError as error:
                if not host.inheritance.settings:
                    raise
                logger.error("no spool, but VMs to take over", extra={"error": str(error)})
            state = host.inheritance.wait()
            if host.inheritance.error:
                fields = {"error": host.inheritance.error}
                logger.error("nothing is taken over: all VMs end", extra=fields)
            listener = _listener(chosen, state)
        except Nothing as error:
            logger.error("nothing to take over", extra={"error": str(error)})
            return EXIT_FAILED
        except (SettingsError, ListenError, ActivationError) as error:
            logger.error("cannot start", extra={"error": str(error)})
            host.notifier.tell(f"STATUS=Cannot start: {error}")
            return EXIT_FAILED if isinstance(error, ListenError) else EX_CONFIG
        try:
            return daemon.serve(listener, chosen, host, state)
        except Nothing as error:
            logger.error("nothing was taken over", extra={"error": str(error)})
            return EXIT_FAILED
        finally:
            listener.remove()


def _listener(chosen: Settings, state: DaemonState | None) -> Listener:
    """Return the socket that systemd has passed, else that of the previous process, else a new one."""
    try:
        inherited = systemd.take_listener()
    except ActivationError as error:
        if not state:
            raise
        inherited = None  # the connected clients and the VMs do not depend on it
        logger.error("no new socket to listen on: the one from before stays", extra={"error": str(error)})
    if inherited:
        if state:
            os.close(state.server.listener.fd.number)
        return Listener(inherited)
    if state:
        return Listener.from_state(state.server.listener)
    return Listener.bind(chosen.socket_path, for_all=names_others(chosen.access))


def _check_spool(directory: str) -> None:
    try:
        check_directory(directory)
    except OSError as error:
        raise SettingsError(
            f"spool.directory: no file can be made in {directory}: {error.strerror}; "
            "make it a directory that the daemon may write to, or name another"
        ) from None
