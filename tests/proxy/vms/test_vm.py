"""One VM's life: its states, its end in each of them, and what a hello that fails leaves behind."""

from __future__ import annotations

import gc
import logging
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from cc_proxy.agent import Quirks
from cc_proxy.api.payloads import Hello
from cc_proxy.continuity.cells import AT_SENT, State
from cc_proxy.hyperstart.codes import Code
from cc_proxy.linux.credentials import ROOT
from cc_proxy.linux.fds import may_hold_fds
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.rest import Resting
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import Users
from cc_proxy.proxy.vms import sessions
from cc_proxy.proxy.vms.sessions import session_pair
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import Limits, LiveSettings, Settings, StdinSettings, VmSettings
from tests.agent.running import AgentProgram
from tests.faults import broken
from tests.proxy.conftest import Logged
from tests.proxy.support import DIALER, CellKeeper, new_user, open_fds, pair
from tests.shortages import few_fds, no_threads
from tests.users import ALICE, call_as, needs_root
from tests.wire.support import (
    ACK,
    ERROR,
    PING,
    READY,
    WAIT,
    FakeVm,
    at_end,
    command,
    frame,
    in_background,
    is_silent,
    unread_by_peer,
    wait_until,
)

SETTINGS = Settings(
    vm=VmSettings(ready_timeout=60, ready_ping_after=50, command_timeout=60, bye_linger=3_600),
    stdin=StdinSettings(window=0),
)


class Life:
    """A VM, the agent behind it, and the states it has been in."""

    def __init__(self, directory: Path, space: SpoolSpace, settings: Settings = SETTINGS) -> None:
        self.agent = FakeVm(directory, "vm")
        self.states: list[State] = []
        self.live = LiveSettings(settings)
        self.vm = Vm("pod", ROOT, self.live, space, lambda vm, state: self.states.append(state))
        self.hello = Hello("pod", str(self.agent.ctl_path), str(self.agent.io_path))
        self._clients: list[socket.socket] = []

    def start(self) -> None:
        """Up and running."""
        with in_background(self.say_ready):
            self.vm.start(self.hello, DIALER, new_user())

    def take_command(self) -> None:
        self.agent.acknowledge()

    def say_ready(self) -> None:
        self.agent.accept()
        self.agent.say(READY)

    def open(self, streams: int = 1) -> tuple[int, socket.socket]:
        base, client = self.vm.open_session(streams, new_user())
        client.settimeout(WAIT)
        self._clients.append(client)
        return base, client

    def wait_for(self, state: State) -> None:
        wait_until(lambda: self.vm.life.state is state, str(state))

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.agent.close()
        self.vm.abort()
        if State.UP in self.states:
            assert self.vm.join(WAIT)


def ends(sock: socket.socket) -> bool:
    """Whether the peer closes, though it may have left something unread."""
    try:
        return at_end(sock)
    except ConnectionResetError:
        return True


FD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.fixture
def keeps_fd_limit() -> Iterator[None]:
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, FD_LIMIT)


@pytest.fixture
def life(tmp_sock_dir: Path, space: SpoolSpace) -> Iterator[Life]:
    life = Life(tmp_sock_dir, space)
    yield life
    life.close()


@pytest.fixture
def hasty_life(tmp_sock_dir: Path, space: SpoolSpace) -> Iterator[Life]:
    limits = VmSettings(ready_timeout=0.5, ready_ping_after=0.05, command_timeout=0.05, bye_linger=0.05)
    life = Life(tmp_sock_dir, space, msgspec.structs.replace(SETTINGS, vm=limits))
    yield life
    life.close()


@pytest.mark.parametrize("accepted_before", [False, True])
def test_end_of_a_vm_that_has_refused_to_power_off_is_not_what_was_asked_for(
    life: Life, logged: Logged, accepted_before: bool
) -> None:
    """But it is if it was told twice, and refuses the second time because it is at it already."""
    life.start()
    if accepted_before:
        with in_background(life.take_command):
            life.vm.command(Code.DESTROY_POD, b"")

    def refuse() -> None:
        life.agent.read_command()
        life.agent.say(ERROR)

    with in_background(refuse), pytest.raises(VmError, match="ERROR"):
        life.vm.command(Code.DESTROY_POD, b"")
    life.agent.close()
    life.wait_for(State.GONE)
    assert life.vm.life.failed != accepted_before
    assert ("VM lost" in logged.at(logging.WARNING)) != accepted_before


def test_end_of_a_vm_that_refused_to_power_off_too_late_is_not_what_was_asked_for(
    tmp_sock_dir: Path, space: SpoolSpace, logged: Logged
) -> None:
    limits = VmSettings(command_timeout=0.05)
    with closing(Life(tmp_sock_dir, space, msgspec.structs.replace(SETTINGS, vm=limits))) as life:
        life.start()
        with pytest.raises(VmError, match="no answer from the VM"):
            life.vm.command(Code.DESTROY_POD, b"")
        life.agent.read_command()
        life.agent.say(ERROR)
        control = life.vm.control
        assert control
        wait_until(lambda: control.unanswered == 0, "the answer is taken")
        life.agent.close()
        life.wait_for(State.GONE)
        assert life.vm.life.failed
        assert "VM lost" in logged.at(logging.WARNING)


def test_session_that_there_is_no_memory_for_leaves_nothing(life: Life) -> None:
    life.start()
    user = new_user()
    before = open_fds()
    with broken(Pump, "add", MemoryError()), pytest.raises(MemoryError):
        life.vm.open_session(1, user)
    assert open_fds() == before
    assert user.has["sessions"] == 0


# States ---------------------------------------------------------------------------------------------------


def test_from_hello_to_the_end(life: Life) -> None:
    life.start()
    assert life.states == [State.UP]
    life.vm.leave()
    life.vm.leave()
    assert life.states == [State.UP, State.LEAVING]
    with in_background(life.take_command):
        life.vm.command(Code.PING, b"")
    base, client = life.open()
    life.agent.send_frame(base, b"still delivered")
    assert client.recv(100) == frame(base, b"still delivered")
    life.agent.hang_up()
    assert at_end(client)
    life.wait_for(State.GONE)
    assert life.states[:2] == [State.UP, State.LEAVING]
    assert life.states[-1] is State.GONE
    assert len(set(life.states)) == len(life.states)


def test_linger_ends_it(hasty_life: Life) -> None:
    hasty_life.start()
    _, client = hasty_life.open()
    hasty_life.vm.leave()
    assert at_end(client)
    assert hasty_life.agent.is_hung_up()
    hasty_life.wait_for(State.GONE)
    assert hasty_life.states == [State.UP, State.LEAVING, State.LOST, State.GONE]


@pytest.mark.parametrize("say_bye", [False, True])
@pytest.mark.parametrize("power_off", [False, True])
def test_losing_it_is_told_once_and_as_loudly_as_it_is_unexpected(
    life: Life, logged: Logged, say_bye: bool, power_off: bool
) -> None:
    life.start()
    if power_off:
        with in_background(life.take_command):
            life.vm.command(Code.DESTROY_POD, b"")
    if say_bye:
        life.vm.leave()
    for cause in ("the first cause", "another"):
        life.vm.lose(cause)
    assert life.agent.is_hung_up()
    life.wait_for(State.GONE)
    life.vm.lose("much later")
    expected = say_bye or power_off
    said = {"vm": "pod", "reason" if expected else "error": "the first cause"}
    assert logged.fields("VM gone" if expected else "VM lost") == [said]
    assert bool(logged.at(logging.WARNING)) != (say_bye or power_off)
    with pytest.raises(VmError, match="VM gone: the first cause"):
        life.vm.command(Code.PING, b"")
    with pytest.raises(VmError, match="VM gone: the first cause"):
        life.vm.open_session(1, new_user())


@contextmanager
def as_it_starts(action: Callable[[Pump], object]) -> Iterator[None]:
    """Something happens between READY and the moment the VM is up."""
    pump_start = Pump.start

    def start(pump: Pump) -> None:
        pump_start(pump)
        action(pump)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pump, "start", start)
        yield


def test_lost_as_it_starts(life: Life) -> None:
    lost = as_it_starts(lambda _: life.vm.lose("right away"))
    with lost, pytest.raises(VmError, match="VM gone: right away"):
        life.start()
    life.wait_for(State.GONE)
    assert State.UP not in life.states
    assert life.agent.is_hung_up()


def test_ended_as_it_starts(life: Life) -> None:
    def end(pump: Pump) -> None:
        life.agent.hang_up()
        assert pump.join(WAIT)

    with as_it_starts(end), pytest.raises(VmError, match="VM gone: the VM hung up its"):
        life.start()
    assert life.vm.life.state is State.GONE


# Hello that fails -----------------------------------------------------------------------------------------


def hang_up_control(life: Life) -> None:
    life.agent.accept()
    life.agent.ctl.close()


def hang_up_io(life: Life) -> None:
    life.agent.accept()
    life.agent.io.close()


def talk_nonsense(life: Life) -> None:
    life.agent.accept()
    life.agent.ctl.sendall(command(READY, length=3))


def no_control_socket(life: Life) -> None:
    life.agent.ctl_path.unlink()


def no_io_socket(life: Life) -> None:
    life.agent.io_path.unlink()


def not_listening(life: Life) -> None:
    life.agent.listeners[1].close()


def no_answer(life: Life) -> None:
    life.agent.accept()


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        (hang_up_control, "the VM hung up its control channel"),
        (hang_up_io, "the VM hung up its I/O channel"),
        (talk_nonsense, "control channel: ready with a total length of 3"),
        (no_control_socket, "ctlSerial: cannot connect to .*: No such file or directory"),
        (no_io_socket, "ioSerial: cannot connect to .*: No such file or directory"),
        (not_listening, "ioSerial: cannot connect to .*: Connection refused"),
        (no_answer, r"no READY from the VM in 0\.5 s"),
    ],
)
def test_hello_that_fails_leaves_nothing_open(
    hasty_life: Life, trouble: Callable[[Life], None], cause: str
) -> None:
    threads = threading.active_count()
    with ExitStack() as stack:
        if trouble in {no_control_socket, no_io_socket, not_listening}:
            trouble(hasty_life)
        else:
            stack.enter_context(in_background(lambda: trouble(hasty_life)))
        with pytest.raises(VmError, match=cause):
            hasty_life.vm.start(hasty_life.hello, DIALER, new_user())
    assert hasty_life.vm.life.state is State.GONE
    assert hasty_life.states == [State.GONE]
    assert threading.active_count() == threads


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Short of fds, the daemon cannot wait until somebody collects those it has forgotten."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("without_collector")
def test_hello_without_fds_leaves_nothing_open(tmp_sock_dir: Path, space: SpoolSpace) -> None:
    """Whichever it is that it cannot have."""
    limits = VmSettings(ready_timeout=60, ready_ping_after=0.01)
    live = LiveSettings(msgspec.structs.replace(SETTINGS, vm=limits))
    causes: list[str] = []
    with AgentProgram(tmp_sock_dir, Quirks()) as agent:
        before = open_fds()
        while True:
            vm = Vm("pod", ROOT, live, space, lambda _vm, _state: None)
            try:
                with few_fds(len(causes)):
                    vm.start(Hello("pod", str(agent.ctl), str(agent.io)), DIALER, new_user())
                break
            except VmError as error:  # pytest.raises would keep what it refers to
                causes.append(str(error))
            assert vm.life.state is State.GONE
            assert open_fds() == before
        vm.abort()
        assert vm.join(WAIT)
    assert len(causes) > 5
    assert [cause for cause in causes if not cause.endswith("Too many open files")] == []


@pytest.mark.usefixtures("without_collector")
def test_hello_without_a_thread_leaves_nothing_open(life: Life) -> None:
    before = open_fds()
    with in_background(life.say_ready), no_threads():
        try:
            life.vm.start(life.hello, DIALER, new_user())
        except VmError as error:  # pytest.raises would keep what it refers to
            cause = str(error)
    life.agent.hang_up()
    assert open_fds() == before
    assert cause.startswith("the daemon is short of resources: ")
    assert life.vm.life.state is State.GONE


def test_console_that_was_open_is_closed_when_hello_fails(life: Life, logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    hello = msgspec.structs.replace(life.hello, console=str(life.agent.ctl_path.with_suffix(".console")))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(hello.console)
        listener.listen()
        listener.settimeout(WAIT)
        with (
            in_background(life.say_ready),
            no_threads(),
            pytest.raises(VmError, match="short of resources"),
        ):
            life.vm.start(hello, DIALER, new_user())
        console, _ = listener.accept()
        with console:
            assert at_end(console)
    gc.collect()


class Screen:
    """The console of a VM, read by the daemon or not."""

    def __init__(self, life: Life) -> None:
        path = str(life.agent.ctl_path.with_suffix(".console"))
        life.hello = msgspec.structs.replace(life.hello, console=path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(WAIT)
        self._listener.bind(path)
        self._listener.listen()
        self.far: socket.socket | None = None

    def accept(self) -> socket.socket:
        self.far, _ = self._listener.accept()
        self.far.settimeout(WAIT)
        return self.far

    def close(self) -> None:
        self._listener.close()
        if self.far:
            self.far.close()


@pytest.fixture
def screen(life: Life) -> Iterator[Screen]:
    screen = Screen(life)
    yield screen
    screen.close()


PANIC = b"[    0.0] Linux version 4.9\n[    0.9] Kernel panic - not syncing: no init found.\r\n"


@pytest.mark.parametrize("how", ["hangs up both", "hangs up its I/O", "stays silent"])
def test_guest_that_panics_while_it_boots_says_so(life: Life, screen: Screen, how: str) -> None:
    """At the level of the log that is usual, in the answer to hello."""
    assert not logger.isEnabledFor(CONSOLE)
    if how == "stays silent":
        limits = VmSettings(ready_timeout=0.5, ready_ping_after=50)
        life.live.replace(msgspec.structs.replace(SETTINGS, vm=limits))

    def panic() -> None:
        life.agent.accept()
        console = screen.accept()
        console.sendall(PANIC)
        wait_until(lambda: unread_by_peer(console) == 0, "it is read while the guest boots")
        console.sendall(b"Rebooting in 1 seconds..")
        if how == "hangs up its I/O":
            life.agent.io.close()
        elif how == "hangs up both":
            life.agent.hang_up()

    before = open_fds()
    with in_background(panic), pytest.raises(VmError) as error:
        life.vm.start(life.hello, DIALER, new_user())
    cause = {
        "hangs up both": "the VM hung up its",
        "hangs up its I/O": "the VM hung up its I/O channel",
        "stays silent": "no READY from the VM in 0.5 s",
    }[how]
    lines = (
        "[    0.0] Linux version 4.9 | [    0.9] Kernel panic - not syncing: no init found. | Rebooting in"
    )
    assert str(error.value).startswith(cause)
    assert str(error.value).endswith(f"; the console's last lines: {lines} 1 seconds..")
    assert life.vm.life.trouble
    assert life.vm.life.trouble.text == str(error.value)
    assert screen.far
    screen.far.close()
    life.agent.hang_up()
    assert open_fds().keys() <= before.keys()


@pytest.mark.parametrize("level", [logging.INFO, CONSOLE])
def test_console_is_read_on_only_if_the_log_wants_it(
    life: Life, screen: Screen, logged: Logged, level: int
) -> None:
    """Else others may have it: it takes one at a time."""
    logger.setLevel(level)

    def boot() -> None:
        life.agent.accept()
        screen.accept().sendall(b"booting\n")
        life.agent.say(READY)

    with in_background(boot):
        life.vm.start(life.hello, DIALER, new_user())
    assert screen.far
    if level == CONSOLE:
        screen.far.sendall(b"up\n")
        lines = [{"vm": "pod", "line": line} for line in ("booting", "up")]
        wait_until(lambda: logged.fields("console") == lines, "both lines")
    else:
        assert ends(screen.far)
        assert logged.fields("console") == []


@pytest.mark.parametrize("output", [b"", b"x", b"\n" * 5_000, b"last words\n"])
def test_console_that_ends_early_holds_nobody_up(life: Life, screen: Screen, output: bytes) -> None:
    def boot() -> None:
        life.agent.accept()
        with screen.accept() as console:
            console.sendall(output)
        life.agent.say(READY)

    with in_background(boot):
        life.vm.start(life.hello, DIALER, new_user())
    assert life.vm.life.state is State.UP


# Commands and sessions ------------------------------------------------------------------------------------


def test_answers(life: Life) -> None:
    life.start()

    def answer() -> None:
        life.agent.acknowledge(b"content")
        life.agent.read_command()
        life.agent.say(ERROR)
        life.agent.read_command()
        life.agent.say(ERROR, b"what went wrong \xff")

    with in_background(answer):
        assert life.vm.command(Code.READ_FILE, b"{}").payload == b"content"
        with pytest.raises(VmError, match=r"^ERROR received from Hyperstart$"):
            life.vm.command(Code.PING, b"")
        with pytest.raises(VmError, match=r"^ERROR received from Hyperstart: what went wrong \ufffd$"):
            life.vm.command(Code.PING, b"")


def test_command_that_is_too_long_is_not_sent(life: Life) -> None:
    life.start()
    with pytest.raises(VmError, match="message too long 10241"):
        life.vm.command(Code.PING, bytes(10_233))
    assert is_silent(life.agent.ctl)


def test_command_without_an_answer(hasty_life: Life) -> None:
    hasty_life.start()
    with pytest.raises(VmError, match=r"no answer from the VM in 0\.05 s"):
        hasty_life.vm.command(Code.PING, b"")
    assert hasty_life.vm.life.state is State.UP
    assert hasty_life.agent.read_command().code == PING
    hasty_life.agent.say(ACK)


@pytest.mark.parametrize("how", ["hangs up", "hangs up its I/O channel", "talks nonsense"])
def test_command_in_flight_when_it_is_lost(life: Life, how: str) -> None:
    life.start()

    def die() -> None:
        life.agent.read_command()
        if how == "talks nonsense":
            life.agent.ctl.sendall(command(ACK, length=3))
        else:
            (life.agent.ctl if how == "hangs up" else life.agent.io).close()

    with (
        in_background(die),
        pytest.raises(VmError, match=r"VM gone: (the VM hung up its|control channel: ack)"),
    ):
        life.vm.command(Code.PING, b"")
    assert State.LOST in life.states, "whoever finds out says so"
    life.wait_for(State.GONE)


def test_it_takes_neither_commands_nor_sessions_before_it_is_up(space: SpoolSpace) -> None:
    vm = Vm("pod", ROOT, LiveSettings(SETTINGS), space, lambda vm, state: None)
    with pytest.raises(VmError, match="VM gone"):
        vm.command(Code.PING, b"")
    with pytest.raises(VmError, match="VM gone"):
        vm.open_session(1, new_user())
    vm.leave()
    vm.stop()
    vm.abort()
    assert vm.join(0)
    assert vm.life.state is State.STARTING


def test_seqs_are_counted_by_many_threads(life: Life) -> None:
    life.start()
    bases: list[tuple[int, int]] = []

    def open_some() -> None:
        for streams in (1, 2, 2, 1, 2):
            base, client = life.vm.open_session(streams, new_user())
            client.close()
            bases.append((base, streams))

    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(in_background(open_some))
    seqs = [seq for base, streams in bases for seq in range(base, base + streams)]
    assert sorted(seqs) == list(range(1, 6 * 8 + 1))


def test_session_without_resources_uses_no_seq_and_no_fd(life: Life) -> None:
    life.start()
    before = set(open_fds())
    short = "the daemon is short of resources: Too many open files"
    with few_fds(), pytest.raises(VmError, match=short):
        life.vm.open_session(2, new_user())
    assert set(open_fds()) == before
    assert life.open()[0] == 1


def test_session_that_cannot_be_made_leaves_nothing(life: Life) -> None:
    life.start()
    user, before = new_user(Limits(sessions=1)), set(open_fds())
    with broken(sessions, "Session", MemoryError()), pytest.raises(MemoryError):
        life.vm.open_session(2, user)
    assert set(open_fds()) == before
    assert user.has["sessions"] == 0


def test_client_cannot_pass_fds_over_its_session(life: Life) -> None:
    life.start()
    _, stream = life.open()
    ours, theirs = session_pair()
    with ours, theirs:
        if may_hold_fds(ours):
            pytest.skip("needs Linux 6.16")
        assert may_hold_fds(theirs), "that end is the client's own business"
    with pytest.raises(PermissionError):
        socket.send_fds(stream, [b"x"], [0])


@needs_root
def test_session_whose_fd_could_not_be_passed_is_refused(life: Life, keeps_fd_limit: None) -> None:
    """The kernel counts what was passed and not received; who has CAP_SYS_RESOURCE may pass more."""
    life.start()
    user, (near, far) = new_user(), pair()
    with near, far:
        socket.send_fds(near, [b"x"], [0] * 250)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, FD_LIMIT[1]))
        before = set(open_fds())
        with pytest.raises(VmError, match="the daemon is short of resources: Too many references"):
            call_as(ALICE, lambda: life.vm.open_session(1, user))
        assert set(open_fds()) == before
    assert life.open()[0] == 1


def test_session_that_comes_too_late_is_refused_and_closed(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pump ends between the look at the state and the moment it would take the session over."""
    life.start()
    before = set(open_fds())
    monkeypatch.setattr(Pump, "add", lambda pump, session: False)
    with pytest.raises(VmError, match="VM gone: it was unregistered"):
        life.vm.open_session(2, new_user())
    assert set(open_fds()) == before


def test_stdin_is_paced_as_the_settings_say(tmp_sock_dir: Path, space: SpoolSpace) -> None:
    for window in (0, 64):
        directory = tmp_sock_dir / str(window)
        directory.mkdir()
        life = Life(directory, space, msgspec.structs.replace(SETTINGS, stdin=StdinSettings(window=window)))
        life.start()
        base, client = life.open()
        with in_background(life.take_command):
            life.vm.command(Code.EXEC_CMD, b'{"process":{"stdio":%d}}' % base)
        client.sendall(frame(base, bytes(100)))
        size = 0
        while size < (window - 12 if window else 100):
            size += len(life.agent.read_frame().payload)
        assert size == (window - 12 if window else 100), "a window holds the frame's header too"
        life.close()


def test_stop_before_it_is_up_ends_hello(life: Life) -> None:
    """Whether it waits for READY already, or is about to."""

    def stop() -> None:
        life.agent.accept()
        life.vm.stop()

    with in_background(stop), pytest.raises(VmError, match="the daemon stops"):
        life.vm.start(life.hello, DIALER, new_user())
    assert life.vm.life.state is State.GONE


def test_stop_just_before_its_pump_runs(life: Life) -> None:
    """The daemon stops while a hello is on its way: what it asks of the VM is no error at any moment."""
    outcomes: list[bool | RuntimeError] = []

    def stop(_: Pump) -> None:
        life.vm.stop()
        try:
            outcomes.append(life.vm.join(0))
        except RuntimeError as error:
            outcomes.append(error)

    with broken(Pump, "start", when=stop), suppress(VmError):
        life.start()
    assert outcomes == [False]
    life.wait_for(State.GONE)
    assert life.agent.is_hung_up()


def test_stop_and_abort(life: Life) -> None:
    life.start()
    base, client = life.open()
    life.agent.send_frame(base, b"the rest")
    life.vm.stop()
    assert life.vm.join(WAIT)
    assert client.recv(100) == frame(base, b"the rest")
    assert at_end(client)
    life.vm.abort()
    life.vm.stop()
    assert life.states == [State.UP, State.LOST, State.GONE]


def test_vm_of_which_nobody_knows_what_it_was_sent_has_no_part_of_a_command_yet(
    life: Life, space: SpoolSpace
) -> None:
    """Its agent is about to be asked. If this process is killed before that, the next one asks."""
    life.start()
    live, keeper = LiveSettings(SETTINGS), CellKeeper()
    life.vm.rest()
    life.vm.rest_pump()
    assert life.vm.join(WAIT)
    state = life.vm.hand_over()
    assert state.control
    unknown = msgspec.structs.replace(state.control.channel, is_up=False)
    control = msgspec.structs.replace(state.control, channel=unknown)
    after = Vm("pod", ROOT, live, space, lambda _vm, _state: None, keeper)
    after.restore(msgspec.structs.replace(state, control=control), Users(live))
    (cell,) = keeper.cells
    assert not cell[AT_SENT]
    after.go_on()
    assert life.agent.read_command()
    after.abort()
    assert after.join(WAIT)
    after.kept.release()


def test_hello_that_is_not_asked_for_again_is_handed_over_once_more(
    tmp_sock_dir: Path, space: SpoolSpace
) -> None:
    """The next process may be replaced before the client's thread gets to it."""
    limits = VmSettings(ready_timeout=60, ready_ping_after=0)
    settings = msgspec.structs.replace(SETTINGS, vm=limits)
    live = LiveSettings(settings)
    with closing(Life(tmp_sock_dir, space, settings)) as slow:

        def rest() -> None:
            slow.agent.accept()
            slow.agent.read_command()
            slow.vm.rest()

        with in_background(rest), pytest.raises(Resting):
            slow.vm.start(slow.hello, DIALER, new_user())
        for _ in range(3):
            state = slow.vm.hand_over()
            slow.vm = Vm("pod", ROOT, live, space, lambda _vm, state: slow.states.append(state))
            slow.vm.restore(state, Users(live))
        slow.agent.say(READY)
        slow.vm.start(slow.hello, DIALER, new_user())
        assert slow.states == [State.UP]
