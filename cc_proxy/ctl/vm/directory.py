"""The private directory of a VM: one for each user and id, locked as long as a process owns the VM."""

import fcntl
import hashlib
import os
import select
import shutil
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from cc_proxy.ctl.agentlog import DIRECTORY_PREFIX, log_name, parent
from cc_proxy.ctl.errors import Failure, reason
from cc_proxy.ctl.vm.command import SOCKETS
from cc_proxy.linux.socketfile import locked

_PREFIX = f"{DIRECTORY_PREFIX}vm-"
_NAME_LENGTH = 12
_OWNER = "owner"
#: Seconds that an owner has to end its VM: more than it gives QEMU.
_PATIENCE = 10.0
_NO_ROOM = "the directory named by TMPDIR, or else /run or XDG_RUNTIME_DIR, needs some room"


class InUse(Exception):
    """A process already owns the VM with that id."""


class VmDirectory:
    """A VM's directory, which this process has locked. A process that inherits the fd `lock` shares the lock.

    `log` is the path of the file with the guest's console, `errors` of that with QEMU's messages.
    """

    def __init__(self, path: str, lock: int, log: str) -> None:
        self.path = path
        self.lock = lock
        self.log = os.path.join(path, log)
        self.errors = os.path.join(path, "qemu.log")

    def socket_path(self, name: str) -> str:
        """Return the path of one of the VM's sockets."""
        return os.path.join(self.path, name)

    @classmethod
    def make(cls, container_id: str) -> Self:
        """Make and lock the directory for a VM, and remove those that no process owns any longer.

        Raises `InUse`, or `Failure` if it cannot be made.
        """
        path = directory_of(container_id)
        try:
            with locked(parent()):
                _remove_stale()
                try:
                    os.mkdir(path, 0o700)
                except FileExistsError:
                    raise InUse(path) from None
                return cls(path, _lock(path), log_name(container_id))
        except OSError as error:
            raise _no_room(path, error) from None

    def listen(self) -> dict[str, socket.socket]:
        """Return the listening sockets of the VM, by their names. Raises `Failure`; none stays open then."""
        listeners: dict[str, socket.socket] = {}
        try:
            for name in SOCKETS:
                listeners[name] = socket.socket(socket.AF_UNIX)
                listeners[name].bind(self.socket_path(name))
                listeners[name].listen(1)
        except OSError as error:
            for listener in listeners.values():
                listener.close()
            raise _no_room(self.path, error) from None
        return listeners

    def leave_to(self, pid: int) -> None:
        """Leave the lock to the process `pid`, which has inherited it, and note the pid. Raises `Failure`."""
        try:
            Path(self.path, _OWNER).write_text(f"{pid}\n")
        except OSError as error:
            raise _no_room(self.path, error) from None
        self._unlock()

    def remove(self) -> None:
        """Unlock and remove the directory, if it still exists."""
        self._unlock()
        shutil.rmtree(self.path, ignore_errors=True)

    def _unlock(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def _no_room(path: str, error: OSError) -> Failure:
    return Failure(f"{path}: {reason(error)}", hint=_NO_ROOM)


def directory_of(container_id: str) -> str:
    """Return the path of this user's directory for an id. It is a hash: an id may be long or contain `/`."""
    digest = hashlib.sha256(f"{os.geteuid()} {container_id}".encode()).hexdigest()
    return os.path.join(parent(), _PREFIX + digest[:_NAME_LENGTH])


def is_owned(path: str) -> bool:
    """Whether the directory exists, and a process owns its VM."""
    try:
        os.close(_lock(path))
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def was_started(path: str) -> bool:
    """Whether cc-proxyctl has started the VM of a directory: the owner of such a VM is noted there."""
    return Path(path, _OWNER).exists()


def end_owner(path: str) -> None:
    """If a VM has an owner, have it end the VM, and wait until it has. Raises `Failure`."""
    try:
        owner = os.pidfd_open(int(Path(path, _OWNER).read_text()))
    except (OSError, ValueError):
        return
    try:
        # The pid may have been reused by now, but not as long as the owner holds the lock.
        if is_owned(path):
            signal.pidfd_send_signal(owner, signal.SIGTERM)
            poll = select.poll()
            poll.register(owner, select.POLLIN)
            if not poll.poll(_PATIENCE * 1000):
                raise Failure(f"the VM does not end within {_PATIENCE:.0f} s")
    finally:
        os.close(owner)


def _lock(path: str) -> int:
    """Lock a directory; returns the fd. Raises `BlockingIOError` if it is already locked, or an `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_stale() -> None:
    """Remove this user's directories that no process owns any longer, because their owners were killed.

    The lock on the parent keeps `VmDirectory.make` from making one meanwhile that is not locked yet.
    """
    with locked(parent()):
        _remove_stale()


def _remove_stale() -> None:
    for path in Path(parent()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and not is_owned(str(path)):
                shutil.rmtree(path, ignore_errors=True)
