"""What the connector's processes do; `connector.py` says what they are for.

All of it runs in processes that are forked off the daemon's, with little else to do than what stands here.
"""

import contextlib
import errno
import fcntl
import gc
import os
import signal
import socket
import stat
import struct
import time
from typing import NoReturn

import msgspec

from cc_proxy.linux.credentials import CannotAct, Credentials, become, forbid_dumps, name_process

#: What `ps -o comm` and the like call them. A name has 15 characters at most.
PROCESS_NAME = "cc-proxy-dial"

#: In place of a socket's number: the child could not be forked, or could not take on the client's rights.
NOT_STARTED, NOT_ALLOWED = -2, -1

#: Seconds between two looks for a socket that is not there yet: at first, and at the most.
_PAUSES = 0.01, 0.25
_NOT_YET = {errno.ENOENT, errno.ECONNREFUSED}

#: A socket pair's end, and the sockets to connect.
_MOST_FDS = 4

REPORT = struct.Struct("@ii")
LENGTH = struct.Struct("@I")


class Request(msgspec.Struct, array_like=True):
    """What a child is told: whose rights to take on, each socket's path, and whether to look again for it."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    targets: list[tuple[bytes, bool]]


_decoder = msgspec.msgpack.Decoder(Request)


# The connector's process ------------------------------------------------------------------------------------


def run_connector(control: socket.socket) -> NoReturn:
    """Fork children until the daemon has gone. It may have been forked by a process with threads."""
    try:
        gc.disable()  # it would only touch memory that is shared with the daemon
        control = _keep_only(control)
        name_process(PROCESS_NAME)
        # What a service manager or a terminal sends to all processes is not for it: it ends with the daemon.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGIO})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
        while _fork_child(control):
            pass
    finally:
        os._exit(0)


def _keep_only(control: socket.socket) -> socket.socket:
    """Close all fds but the standard ones, which lead nowhere, and this one; returns it."""
    fd = os.dup2(control.detach(), 3)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return socket.socket(fileno=fd)


def _fork_child(control: socket.socket) -> bool:
    """Fork a child ahead of the next hello; returns once it has got that, and whether there may be more."""
    taken, theirs = socket.socketpair()
    with taken, theirs:
        try:
            if not _fork_now_or_then(control):
                taken.close()
                _run_child(control, theirs)
        except OSError as error:
            return _refuse(control, error.errno or errno.EAGAIN)
        theirs.close()
        return bool(taken.recv(1))


def _fork_now_or_then(control: socket.socket) -> int:
    """Fork, if that is not possible now, then when there is a hello."""
    try:
        return os.fork()
    except OSError:
        control.recv(1, socket.MSG_PEEK)
        return os.fork()


def _refuse(control: socket.socket, number: int) -> bool:
    """Say to a hello that there is no child for it; returns whether there may be more."""
    message, fds, _, _ = socket.recv_fds(control, 1, _MOST_FDS)
    if fds:
        os.write(fds[0], REPORT.pack(NOT_STARTED, number))
    for fd in fds:
        os.close(fd)
    return bool(message)


# A child ----------------------------------------------------------------------------------------------------


def _run_child(control: socket.socket, taken: socket.socket) -> NoReturn:
    try:
        _, fds, _, _ = socket.recv_fds(control, 1, _MOST_FDS)
        control.close()
        if fds:
            with contextlib.suppress(ConnectionError):  # it was killed: this hello is served all the same
                taken.send(b"t")
            taken.close()
            reports = socket.socket(fileno=fds[0])
            request = _read_request(reports)
            _end_with(reports)
            _carry_out(request, reports, fds[1:])
    finally:
        os._exit(0)


def _carry_out(request: Request, reports: socket.socket, fds: list[int]) -> None:
    try:
        become(Credentials(0, request.uid, request.gid, request.groups))
    except CannotAct as error:
        reports.send(REPORT.pack(NOT_ALLOWED, error.errno))
        return
    forbid_dumps()
    for number, (fd, (path, patient)) in enumerate(zip(fds, request.targets, strict=True)):
        if _connect(reports, number, fd, path, patient) and patient:
            break


def _read_request(reports: socket.socket) -> Request:
    length, *_ = LENGTH.unpack(reports.recv(LENGTH.size, socket.MSG_WAITALL))
    return _decoder.decode(reports.recv(length, socket.MSG_WAITALL))


def _end_with(reports: socket.socket) -> None:
    """Have the kernel end this process once the daemon hangs up."""
    fcntl.fcntl(reports, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reports, fcntl.F_SETFL, os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        reports.recv(1, socket.MSG_DONTWAIT)
        os._exit(0)  # it has done so already


def _connect(reports: socket.socket, number: int, fd: int, path: bytes, patient: bool) -> int:
    """Connect a socket and report how that goes; returns why it could not be, 0 if it is.

    This waits while the backlog of a blocking socket is full.
    """
    sock = socket.socket(fileno=fd)
    pause, longest = _PAUSES
    reported = -1
    while True:
        cause = sock.connect_ex(path)
        if cause == errno.ECONNREFUSED and not _may_be_socket(path):
            cause = errno.ENOTSOCK
        if cause != reported:
            reports.send(REPORT.pack(number, cause))
            reported = cause
        if not patient or cause not in _NOT_YET:
            return cause
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _may_be_socket(path: bytes) -> bool:
    """Whether what is at a path is a socket, as far as this process may know."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True
