"""The connector's processes: what a client can do to the one that has its uid, and what hangs there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from bench.adopted import children
from cc_proxy.api.payloads import Hello
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.proxy.vms.connector_process import PROCESS_NAME
from cc_proxy.proxy.vms.dialer import CannotConnect, Dialer
from tests.faults import broken
from tests.hanging import HangingMount
from tests.proxy.support import dialer_of
from tests.users import ALICE, BOB, MALLORY, call_as, needs_root
from tests.wire.support import WAIT, in_background, wait_until

pytestmark = needs_root

LATE = "not accepted in time"
#: So many attempts of a user may hang.
MOST_LEFT = 32
_libc = ctypes.CDLL(None, use_errno=True)
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4


@pytest.fixture
def full(open_dir: Path) -> Iterator[str]:
    """A socket whose backlog is full: who connects to it waits."""
    path = str(open_dir / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        Path(path).chmod(0o777)
        first.connect(path)
        yield path


@pytest.fixture
def there(open_dir: Path) -> Iterator[str]:
    """A socket that accepts."""
    path = str(open_dir / "there")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1_000)
        Path(path).chmod(0o777)
        yield path


@pytest.fixture
def others() -> set[int]:
    """The children that this process has before a test begins."""
    return set(children())


@pytest.fixture
def own(others: set[int]) -> Iterator[Connector]:
    """One that a test may break."""
    with closing(Connector()) as own:
        own.start()
        yield own


def children_but(others: set[int]) -> set[int]:
    """The processes of the connectors that a test has."""
    return set(children()) - others


def refusal(dialer: Dialer, path: str, timeout: float = WAIT) -> str:
    with pytest.raises(CannotConnect) as error:
        dialer.connect(Hello("vm", path, path), timeout)
    return str(error.value).removeprefix(f"ctlSerial: cannot connect to {path}: ")


def reaches(dialer: Dialer, path: str) -> bool:
    with dialer.connect(Hello("vm", path, path), WAIT):
        return True


def children_as(user: Credentials) -> list[int]:
    """The processes of this one's connectors that have a user's effective uid."""
    processes = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            processes[int(status.parent.name)] = fields

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in processes and is_ours(int(processes[pid]["PPid"])))

    return [
        pid
        for pid, fields in processes.items()
        if fields["Name"].strip() == PROCESS_NAME
        and fields["Uid"].split()[1] == str(user.uid)
        and is_ours(pid)
    ]


def is_running(pid: int) -> bool:
    """Whoever its parent is by now, and though that may not have waited for it."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def child_as(user: Credentials) -> int:
    wait_until(lambda: len(children_as(user)) == 1, "a process with the client's uid")
    [pid] = children_as(user)
    return pid


@contextlib.contextmanager
def waiting(user: Credentials, path: str) -> Iterator[tuple[int, list[str]]]:
    """A hello that waits for a socket while the block lasts; yields its process, and what refuses it."""
    wanted = threading.Event()
    wanted.set()
    refusals: list[str] = []

    def hello() -> None:
        try:
            dialer_of(user).connect(Hello("vm", path, path), WAIT, still_wanted=wanted.is_set)
        except CannotConnect as error:
            refusals.append(str(error))

    with in_background(hello):
        try:
            yield child_as(user), refusals
        finally:
            wanted.clear()


# What has a client's uid ----------------------------------------------------------------------------------


def test_no_thread_of_the_daemon_has_a_clients_uid(full: str) -> None:
    with waiting(BOB, full):
        for status in Path("/proc/self/task").glob("*/status"):
            assert f"\t{BOB.uid}\t" not in status.read_text()


def test_the_daemon_may_still_dump_its_core(there: str) -> None:
    assert _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    assert reaches(dialer_of(BOB), there)
    assert _libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1


def test_a_client_can_neither_end_its_process_nor_look_into_it(full: str) -> None:
    with waiting(BOB, full) as (pid, _):
        commands = [["kill", "-STOP", str(pid)], ["ls", f"/proc/{pid}/fd"], ["cat", f"/proc/{pid}/maps"]]
        for command in commands:
            said = subprocess.run(
                command,
                user=BOB.uid,
                group=BOB.gid,
                extra_groups=(),
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            ).stderr
            assert "not permitted" in said or "Permission denied" in said, said


def test_the_process_of_a_client_holds_nothing_of_the_daemons(full: str) -> None:
    with waiting(BOB, full) as (pid, _):
        leads_to = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    others = [target for target in leads_to if target != os.devnull]
    assert len(leads_to) - len(others) == 3
    assert len(others) == 3, "where it reports, and two channels"
    assert all(target.startswith("socket:") for target in others)


def test_a_process_that_is_starved_by_its_client_holds_up_that_client_only(full: str, there: str) -> None:
    with waiting(MALLORY, full) as (pid, _):
        call_as(MALLORY, lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
        assert reaches(dialer_of(BOB), there)
        assert reaches(dialer_of(MALLORY), there)
    # It may end later than it is waited for; then it is looked at with the next hello.
    wait_until(lambda: children_as(MALLORY) == [], "it has ended")
    assert reaches(dialer_of(MALLORY), there)


# Its end --------------------------------------------------------------------------------------------------


def test_the_process_ends_with_its_hello(full: str) -> None:
    with waiting(BOB, full):
        pass
    wait_until(lambda: children_as(BOB) == [], "it has ended")
    assert refusal(dialer_of(BOB), full, 0.05) == LATE
    wait_until(lambda: children_as(BOB) == [], "it has ended")


def test_a_process_that_is_killed_is_an_error(full: str) -> None:
    with waiting(BOB, full) as (pid, refusals):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bool(refusals), "the hello is refused")
    killed = "the process that was to connect has been killed"
    assert refusals == [f"ctlSerial: cannot connect to {full}: {killed}"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_connector_that_is_killed_is_started_again(own: Connector, there: str, others: set[int]) -> None:
    dialer = Dialer(BOB, own)
    for _ in range(3):
        (pid,) = children_but(others)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert reaches(dialer, there)


def test_nothing_is_left_of_a_connector_whose_daemon_has_gone(full: str) -> None:
    """Killed, that is, and in the middle of a hello."""
    pid = os.fork()
    if not pid:
        try:
            with closing(Connector()) as connector:
                Dialer(ALICE, connector).connect(Hello("vm", full, full), WAIT)
        finally:
            os._exit(0)
    child = child_as(ALICE)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not is_running(child), "it has ended")


def test_terminals_and_service_managers_do_not_end_it(own: Connector, there: str, others: set[int]) -> None:
    assert reaches(Dialer(BOB, own), there), "it has begun"
    (pid,) = children_but(others)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert reaches(Dialer(BOB, own), there)
    assert children_but(others) == {pid}


#: Root is not counted.
NO_PROCESS = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_no_process_to_be_had_is_said(own: Connector, there: str) -> None:
    own.close()
    with broken(os, "fork", NO_PROCESS):
        assert refusal(Dialer(BOB, own), there) == "Resource temporarily unavailable"


def test_connector_that_can_fork_no_child_says_so(there: str) -> None:
    me = os.getpid()
    no_grandchild = broken(os, "fork", NO_PROCESS, when=lambda: os.getpid() != me)
    with no_grandchild, closing(Connector()) as connector:
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"^no process to connect from: Resource temporarily unavail"
            ):
                Dialer(BOB, connector).connect(Hello("vm", there, there), WAIT)


# What hangs in the kernel ---------------------------------------------------------------------------------


@pytest.fixture
def hanging(open_dir: Path) -> Iterator[str]:
    """A path on a file system that never answers."""
    mount = open_dir / "mount"
    mount.mkdir()
    with HangingMount(mount):
        yield str(mount / "x")


@pytest.mark.parametrize("user", [Credentials.own(), BOB], ids=["the daemon's own user", "another"])
def test_path_that_hangs_is_given_up_in_time_and_stops_no_other_hello(
    own: Connector, hanging: str, there: str, user: Credentials
) -> None:
    dialer = Dialer(user, own)
    start = time.monotonic()
    assert refusal(dialer, hanging, 0.1) == LATE
    assert time.monotonic() - start < 2
    assert reaches(dialer, there)


def test_hello_is_answered_while_another_of_its_user_hangs(own: Connector, hanging: str, there: str) -> None:
    dialer, wanted = Dialer(BOB, own), threading.Event()
    wanted.set()

    def hang() -> None:
        with contextlib.suppress(CannotConnect):
            dialer.connect(Hello("vm", hanging, hanging), WAIT, still_wanted=wanted.is_set)

    with in_background(hang):
        child_as(BOB)
        assert reaches(dialer, there)
        wanted.clear()


def test_what_hangs_is_bounded_for_each_user_and_counts_until_it_ends(
    own: Connector, open_dir: Path, there: str
) -> None:
    bob, alice, stuck = Dialer(BOB, own), Dialer(ALICE, own), list[str]()
    mount = open_dir / "mount"
    mount.mkdir()
    with HangingMount(mount):
        path = str(mount / "x")
        with ExitStack() as stack:
            for _ in range(MOST_LEFT):
                stack.enter_context(in_background(lambda: stuck.append(refusal(bob, path, 0.5))))
        assert stuck == [LATE] * MOST_LEFT
        for somewhere in (path, there):
            hang = f"{MOST_LEFT} earlier attempts of user {BOB.uid} still hang in the kernel"
            assert refusal(bob, somewhere) == hang
        assert reaches(alice, there)
    wait_until(lambda: children_as(BOB) == [], "they have ended")
    assert reaches(bob, there)


def test_console_that_hangs_costs_the_console(own: Connector, hanging: str, there: str) -> None:
    hello = Hello("vm", there, there, hanging)
    with Dialer(BOB, own).connect(hello, WAIT) as connected:
        assert connected.console is None
        assert connected.console_error == f"console: cannot connect to {hanging}: {LATE}"


def test_many_at_once(own: Connector, there: str) -> None:
    outcomes: list[bool] = []
    with ExitStack() as stack:
        for user in (ALICE, BOB) * 20:
            dialer = Dialer(user, own)
            stack.enter_context(in_background(lambda dialer=dialer: outcomes.append(reaches(dialer, there))))  # type: ignore[misc]
    assert outcomes == [True] * 40
