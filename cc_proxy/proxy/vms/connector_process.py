"""What the connector's processes do; `connector.py` says what they are for.

They are forked from the daemon, and run nothing but this.
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

#: The processes' name in `ps -o comm` and the like, which show at most 15 characters.
PROCESS_NAME = "cc-proxy-dial"

#: What a report has in place of a socket's number if there is no child, or if the child could not take on the
#: client's rights.
NOT_STARTED, NOT_ALLOWED = -2, -1

#: Seconds between two tries to connect to a socket that does not exist yet: at first, and at most.
_PAUSES = 0.01, 0.25
_NOT_YET = {errno.ENOENT, errno.ECONNREFUSED}

#: The most fds that come with a request: an end of a socket pair, and the sockets to connect.
_MOST_FDS = 4
#: More than a request can have: a process has at most 65,536 groups.
MOST_BYTES = 1024 * 1024

REPORT = struct.Struct("@ii")


class DialRequest(msgspec.Struct, array_like=True):
    """What a child is to do: whose rights to take on, and each socket's path.

    The fds with it are an end of a socket pair, for reports, and the sockets.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    paths: list[bytes]


_decoder = msgspec.msgpack.Decoder(DialRequest)


# The connector's process ------------------------------------------------------------------------------------


def run_connector(control: socket.socket) -> NoReturn:
    """Fork children until the daemon has gone. It may have had threads when it forked this process."""
    try:
        gc.disable()  # or it would write to, and so copy, memory that is shared with the daemon
        control = _keep_only(control)
        name_process(PROCESS_NAME)
        # A service manager or a terminal may send signals to all processes. They are blocked, because this
        # process ends with the daemon.
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {signal.SIGIO})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that children need not be waited for
        while _serve(control):
            pass
    finally:
        os._exit(0)


def _keep_only(control: socket.socket) -> socket.socket:
    """Close all other fds, and open the standard ones on /dev/null; returns the socket under its new fd."""
    fd = os.dup2(control.detach(), 3)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return socket.socket(fileno=fd)


def _serve(control: socket.socket) -> bool:
    """Have a child carry out the next request; returns whether more may come."""
    request, fds, _, _ = socket.recv_fds(control, MOST_BYTES, _MOST_FDS)
    if not fds:
        return False
    try:
        if not os.fork():
            control.close()
            _run_child(request, fds)
    except OSError as error:
        with contextlib.suppress(ConnectionError):  # nobody waits for it any more
            os.write(fds[0], REPORT.pack(NOT_STARTED, error.errno or errno.EAGAIN))
    for fd in fds:
        os.close(fd)
    return True


# A child ----------------------------------------------------------------------------------------------------


def _run_child(request: bytes, fds: list[int]) -> NoReturn:
    try:
        reports = socket.socket(fileno=fds[0])
        _end_with(reports)
        _carry_out(_decoder.decode(request), reports, fds[1:])
    finally:
        os._exit(0)


def _carry_out(request: DialRequest, reports: socket.socket, fds: list[int]) -> None:
    try:
        become(Credentials(0, request.uid, request.gid, request.groups))
    except CannotAct as error:
        reports.send(REPORT.pack(NOT_ALLOWED, error.errno))
        return
    forbid_dumps()
    for number, (fd, path) in enumerate(zip(fds, request.paths, strict=True)):
        if not _connect(reports, number, fd, path):
            break


def _end_with(reports: socket.socket) -> None:
    """Have the kernel end this process when the daemon hangs up."""
    fcntl.fcntl(reports, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reports, fcntl.F_SETFL, os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        reports.recv(1, socket.MSG_DONTWAIT)
        os._exit(0)  # it has hung up already


def _connect(reports: socket.socket, number: int, fd: int, path: bytes) -> bool:
    """Connect a socket and report how that goes; returns whether it is connected.

    A blocking socket is tried again while nobody listens there; connect(2) waits while the backlog is full.
    """
    sock, is_patient = socket.socket(fileno=fd), os.get_blocking(fd)
    pause, longest = _PAUSES
    reported = -1
    while True:
        cause = sock.connect_ex(path)
        if cause == errno.ECONNREFUSED and not _may_be_socket(path):
            cause = errno.ENOTSOCK
        if cause != reported:
            reports.send(REPORT.pack(number, cause))
            reported = cause
        if not is_patient or cause not in _NOT_YET:
            return not cause
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _may_be_socket(path: bytes) -> bool:
    """Whether there is a socket at a path, or this process cannot tell."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True
