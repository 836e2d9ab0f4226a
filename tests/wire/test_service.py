"""The daemon as a service: what its manager hears of it, and what signals make it do."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.hanging import HangingMount
from tests.users import needs_root
from tests.wire.daemon import PATIENT, Daemon, Wire, own_daemon, write_config
from tests.wire.support import VERSIONED, WAIT, error_of, frame, read_exact, wait_until

# The pump of a VM hangs as soon as a client wants a session.
HANGS = """
import sys, threading
from cc_proxy.cli.daemon import main
from cc_proxy.proxy.streams.channel import Channel
Channel.add = lambda channel, session: threading.Event().wait()
sys.exit(main(sys.argv[4:]))
"""


_OF_FDS = ("FDSTORE=1", "FDSTOREREMOVE=1", "BARRIER=1")


class Manager:
    """A service manager's end of sd_notify."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address.replace("@", "\0"))
        self._sock.settimeout(WAIT)

    def next(self) -> list[str]:
        """What is said next, but for what only concerns fds, of which this manager keeps none."""
        while (said := self._sock.recv(4096).decode().split("\n"))[0] in _OF_FDS:
            pass
        return said

    def read_all(self) -> None:
        """What has been sent by now."""
        self._sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.next()
        self._sock.settimeout(WAIT)

    def hears_no_watchdog_for(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        heard = []
        while (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            try:
                heard.append(self.next())
            except TimeoutError:
                break
        self._sock.settimeout(WAIT)
        return ["WATCHDOG=1"] not in heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(tmp_sock_dir: Path) -> Iterator[Manager]:
    manager = Manager(f"@{tmp_sock_dir}/notify")
    yield manager
    manager.close()


@contextmanager
def managed(
    directory: Path, manager: Manager, *, watchdog: float | None = None, prefix: Sequence[str] = ()
) -> Iterator[Wire]:
    variables = [f"NOTIFY_SOCKET={manager.address}"]
    if watchdog:
        variables.append(f"WATCHDOG_USEC={int(watchdog * 1_000_000)}")
    with own_daemon(directory, prefix=["env", *variables, *prefix]) as wire:
        yield wire


def events(daemon: Daemon, text: str) -> list[dict[str, object]]:
    lines = daemon.log().splitlines()
    return [event for event in map(json.loads, lines) if event["message"] == text]


def logs(daemon: Daemon, text: str, times: int = 1) -> dict[str, object]:
    wait_until(lambda: len(events(daemon, text)) >= times, f"the log says: {text}")
    return events(daemon, text)[-1]


def configure(daemon: Daemon, tables: str) -> None:
    """Other settings, which count after a reload."""
    write_config(daemon.socket_path.parent, daemon.socket_path, tables)
    daemon.process.send_signal(signal.SIGHUP)


def test_what_the_manager_hears(tmp_sock_dir: Path, manager: Manager) -> None:
    """From the beginning to the end, in order; and how much there is to do."""
    with managed(tmp_sock_dir, manager) as wire:
        assert manager.next() == ["READY=1", "STATUS=0 VMs, 0 sessions"]
        pod = wire.pod()
        pod.open()
        pod.open()
        wait_until(lambda: manager.next() == ["STATUS=1 VM, 2 sessions"], "the status")
        wire.daemon.process.send_signal(signal.SIGHUP)
        first, second, _ = manager.next()
        assert first == "RELOADING=1"
        name, _, microseconds = second.partition("=")
        assert name == "MONOTONIC_USEC"
        assert 0 <= time.monotonic() - int(microseconds) / 1_000_000 < WAIT
        assert manager.next() == ["READY=1", "STATUS=1 VM, 2 sessions"]
        assert wire.daemon.stop() == 0
        assert manager.next() == ["STOPPING=1", "STATUS=Stopping"]
        wire.daemon.check_log()


def test_watchdog_is_served_while_all_goes_well(tmp_sock_dir: Path, manager: Manager) -> None:
    """A VM whose client reads nothing included."""
    with managed(tmp_sock_dir, manager, watchdog=1.0) as wire:
        pod = wire.pod()
        stream = pod.open(1)
        for _ in range(100):
            pod.vm.send_frame(stream.base, bytes(10_000))
        wait_until(lambda: manager.next() == ["STATUS=1 VM, 1 session"], "the status")
        for _ in range(3):
            assert manager.next() == ["WATCHDOG=1"]
        wire.daemon.check_log()


@needs_root
def test_disk_that_never_answers_keeps_its_vms_waiting_and_is_no_reason_to_end_all(
    tmp_sock_dir: Path, manager: Manager
) -> None:
    """Of all users' as of one's; and nothing is lost once it answers again."""
    spool = tmp_sock_dir / "spool"
    spool.mkdir()
    tables = f'{PATIENT}\n[spool]\ndirectory = "{spool}"\n'
    prefix = ["env", f"NOTIFY_SOCKET={manager.address}", "WATCHDOG_USEC=500000"]
    with own_daemon(tmp_sock_dir, tables, prefix=prefix) as wire:
        pod, other = wire.pod(), wire.pod()
        slow, quick = pod.open(), other.open()
        sent = frame(slow.base, bytes(10_000)) * 60
        with HangingMount(spool):
            pod.vm.io.sendall(sent)
            logs(wire.daemon, "the spool's disk does not answer", times=3)
            manager.read_all()
            for _ in range(3):
                wait_until(lambda: manager.next() == ["WATCHDOG=1"], "the watchdog is served")
            for number in range(20):
                other.vm.send_frame(quick.base, b"%d" % number)
                assert quick.read_frame().payload == b"%d" % number
            assert other.pings()
            assert pod.pings(), "its own commands too"
        assert read_exact(slow.sock, len(sent)) == sent
        assert not events(wire.daemon, "stuck: the watchdog is not served")
        assert wire.daemon.stop() == 0


def test_pump_that_hangs_trips_the_watchdog_and_is_named(tmp_sock_dir: Path, manager: Manager) -> None:
    with managed(tmp_sock_dir, manager, watchdog=1.0, prefix=[sys.executable, "-c", HANGS]) as wire:
        pod = wire.pod(container="ill")
        wire.pod()
        assert pod.client.ask("allocateIO", {"nStreams": 1})
        event = logs(wire.daemon, "stuck: the watchdog is not served")
        assert event["level"] == "ERROR"
        assert event["stuck"] == ["the pump of VM ill"]
        manager.read_all()
        assert manager.hears_no_watchdog_for(1.0)
        assert any("pump ill" in str(stack["threads"]) for stack in events(wire.daemon, "stack"))
        assert wire.pod().pings(), "the other VMs are served"


def test_reload_changes_what_can_change_and_names_the_rest(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        daemon = wire.daemon
        pod = wire.pod()
        configure(
            daemon, f'[log]\nlevel = "debug"\n[limits]\nvms = 1\n[spool]\ndirectory = "{tmp_sock_dir}/x"\n'
        )
        waiting = logs(daemon, "settings that take effect after a restart")
        assert waiting["level"] == "WARNING"
        assert waiting["waiting"] == {"spool.directory": [str(tmp_sock_dir), f"{tmp_sock_dir}/x"]}
        changed = logs(daemon, "settings reloaded")["changed"]
        assert isinstance(changed, dict)
        assert changed["limits.vms"] == [1024, 1]
        assert changed["log.level"] == ["info", "debug"]
        assert "spool.directory" not in changed
        client, vm = wire.client(), wire.vm()
        client.hello("one more", vm)
        assert error_of(client.receive()) == "the limit of 1 VMs is reached"
        assert pod.pings(), "the VMs that there are stay"
        logs(daemon, "request refused")
        wire.close()
        daemon.check()
        assert daemon.stop() == 0


def test_deadlines_change_for_vms_that_are_up(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        daemon = wire.daemon
        pod = wire.pod()
        configure(daemon, "[vm]\ncommand_timeout = 0.05\n")
        logs(daemon, "settings reloaded")
        pod.client.hyper("ping")
        assert error_of(pod.client.receive()) == "no answer from the VM in 0.05 s"
        wire.close()


def test_connections_limit_changes(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        daemon = wire.daemon
        pod = wire.pod()
        configure(daemon, "[limits]\nconnections = 1\n")
        logs(daemon, "settings reloaded")
        assert error_of(wire.client().receive()) == "the limit of 1 connections is reached"
        configure(daemon, PATIENT)
        logs(daemon, "settings reloaded", 2)
        assert wire.client().attach(pod.container) == VERSIONED
        wire.close()


def test_broken_file_keeps_the_old_settings_and_says_why(tmp_sock_dir: Path, manager: Manager) -> None:
    with managed(tmp_sock_dir, manager) as wire:
        assert manager.next()[0] == "READY=1"
        configure(wire.daemon, "[limits]\nvms = 1\nconnections = 'many'\n")
        assert manager.next()[0] == "RELOADING=1"
        assert manager.next()[0] == "READY=1"
        event = logs(wire.daemon, "settings not reloaded: the old ones stay")
        assert event["level"] == "ERROR"
        assert str(event["error"]).endswith("limits.connections: expected an integer, got a string")
        assert events(wire.daemon, "settings reloaded") == []
        assert wire.pod().pings()
        assert wire.pod().pings()
        wire.close()
        wire.daemon.check()


def test_file_that_is_gone_keeps_the_old_settings(tmp_sock_dir: Path) -> None:
    with Daemon.configured(tmp_sock_dir) as daemon:
        (tmp_sock_dir / "cc-proxy.toml").unlink()
        daemon.process.send_signal(signal.SIGHUP)
        event = logs(daemon, "settings not reloaded: the old ones stay")
        assert str(event["error"]).endswith("cannot be read: No such file or directory")
        daemon.check()


def test_sigusr1_says_what_every_thread_does(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir, PATIENT + '[log]\nlevel = "error"\n') as wire:
        daemon = wire.daemon
        pod = wire.pod(container="pod")
        for _ in range(20):
            client = wire.attached(pod)
            client.hyper("ping")
        asker = wire.client()
        wait_until(lambda: b'"waitingCommands":20' in asker.ask("status"), "all of them wait")
        daemon.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "MainThread" in str(events(daemon, "stack")), "the stack of the last thread")
        stacks = events(daemon, "stack")
        clients = [stack for stack in stacks if "client " in str(stack["threads"])]
        assert clients[0]["count"] == 19, "those behind the one whose command is being carried out"
        assert "transact" in str(clients[0]["stack"])
        names = str([stack["threads"] for stack in stacks])
        assert all(name in names for name in ("pump pod", "accept", "parking", "log"))
        wire.close()
        daemon.check()
        assert daemon.stop() == 0


def test_daemon_that_was_stopped_goes_on(tmp_sock_dir: Path, manager: Manager) -> None:
    """For longer than it was to wait for signals."""
    with managed(tmp_sock_dir, manager, watchdog=1.0) as wire:
        process = wire.daemon.process
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.4)  # the fault itself
            manager.read_all()
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: manager.next() == ["WATCHDOG=1"], "it goes on")
        assert wire.pod().pings()
        wire.daemon.check_log()


def test_daemon_whose_log_has_gone_still_ends_with_0(tmp_sock_dir: Path) -> None:
    """As when the journal has been restarted: its end of stderr is closed."""
    prefix = ["bash", "-c", 'exec "$@" 2> >(exec true)', "bash"]
    with own_daemon(tmp_sock_dir, prefix=prefix) as wire:
        daemon = wire.daemon
        assert wire.pod().pings()
        wire.close()
        assert daemon.stop() == 0


def test_manager_that_takes_nothing_does_not_keep_it_from_ending(
    tmp_sock_dir: Path, manager: Manager
) -> None:
    """However full its queue is and however often it is to be told something."""
    with managed(tmp_sock_dir, manager, watchdog=0.02) as wire:
        manager.next()
        logs(wire.daemon, "the service manager cannot be told")
        assert wire.daemon.stop() == 0


def test_settings_that_no_file_has_cost_nothing(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        with (tmp_sock_dir / "cc-proxy.toml").open("r+") as file:
            file.truncate(10**10)
        wire.daemon.process.send_signal(signal.SIGHUP)
        error = logs(wire.daemon, "settings not reloaded: the old ones stay")["error"]
        assert str(error).endswith("cc-proxy.toml: longer than 1048576 characters")
        assert pod.pings()
