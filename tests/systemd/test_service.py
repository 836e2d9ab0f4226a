"""The daemon under a real systemd: started, used, reloaded, killed and stopped."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cc_proxy.api import Refused
from tests.systemd.box import Box
from tests.systemd.service import SERVICE, SETTINGS, SOCKET, Service, vm

#: Where VMs have their sockets: the sandbox must leave the way to all of these.
PLACES = ("/run/vm", "/var/lib/vm", "/var/tmp/vm", "/tmp/vm", "/home/vm")


def answers(service: Service) -> bool:
    """Whether a new client gets an answer."""
    with service.client() as client, pytest.raises(Refused, match="unknown containerID"):
        client.attach("nobody")
    return True


@contextmanager
def hello_in_flight(service: Service) -> Iterator[None]:
    """A client that waits for its VM, and a VM that never says READY."""
    ctl, io = "/run/silent-ctl", "/run/silent-io"
    hello = {"id": "hello", "data": {"containerId": "silent", "ctlSerial": ctl, "ioSerial": io}}
    text = json.dumps(hello).encode()
    with (
        listening(service.box, ctl) as vm,
        listening(service.box, io),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(service.socket_file))
        client.sendall(struct.pack(">II", len(text), 0) + text)
        with vm.accept()[0]:
            yield


@contextmanager
def listening(box: Box, path: str) -> Iterator[socket.socket]:
    """A socket in the box that listens."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(box.path(path)))
        sock.listen()
        yield sock
    box.path(path).unlink()


def open_files(service: Service, pid: int) -> int:
    """How many files a process may open at the most."""
    limits = service.box.output("cat", f"/proc/{pid}/limits")
    return next(int(line.split()[-2]) for line in limits.splitlines() if line.startswith("Max open files"))


def test_the_first_client_starts_the_daemon(activated: Service) -> None:
    assert activated.show("ActiveState") == "inactive"
    assert answers(activated)
    assert activated.show("ActiveState") == "active"
    assert activated.show("StatusText") == "0 VMs, 0 sessions"


@pytest.mark.parametrize("user", ["games", "root"])
def test_root_reaches_vms_of_any_user_wherever_their_sockets_are(daemon: Service, user: str) -> None:
    for directory in PLACES:
        with vm(daemon.box, directory, user) as (ctl, io), daemon.client() as client:
            client.hello("vm", ctl, io)
            client.hyper("ping")
            client.bye("vm")


def test_systemctl_status_says_how_many_vms_and_sessions_there_are(daemon: Service) -> None:
    with vm(daemon.box, "/run/vm", "games") as (ctl, io), daemon.client() as client:
        client.hello("vm", ctl, io)
        with open(client.allocate_io().fd, "rb"):
            daemon.wait_for("StatusText", "1 VM, 1 session")
        client.bye("vm")
    daemon.wait_for("StatusText", "0 VMs, 0 sessions")


def test_members_of_the_group_may_connect_and_others_may_not(activated: Service) -> None:
    ping = ("cc-proxyctl", "ping", "nobody")
    other = activated.box.run(*ping, user="games", check=False)
    member = activated.box.run(*ping, user="games", group="cc-proxy", check=False)
    assert "Permission denied" in other.stdout
    assert "unknown containerID" in member.stdout


@pytest.mark.parametrize(("owner", "said"), [("games", ""), ("root", "Permission denied")])
def test_a_member_reaches_its_own_vms_and_no_others(daemon: Service, owner: str, said: str) -> None:
    with vm(daemon.box, "/run/vm", owner) as (ctl, io):
        hello = ("cc-proxyctl", "hello", "vm", "--ctl", ctl, "--io", io)
        result = daemon.box.run(*hello, user="games", group="cc-proxy", check=False)
    assert (result.returncode == 0) is (owner == "games")
    assert said in result.stdout


def test_starting_the_daemon_starts_the_socket(service: Service) -> None:
    service.start(SERVICE)
    assert service.is_whole()
    service.stop(SERVICE)
    assert service.socket_file.exists()


def test_the_socket_unit_makes_the_socket_for_the_group_and_removes_it(activated: Service) -> None:
    made = activated.socket_file.lstat()
    assert stat.S_IMODE(made.st_mode) == 0o660
    assert made.st_gid == int(activated.box.output("id", "-g", "cc-proxy"))
    activated.stop(SOCKET)
    assert not activated.socket_file.exists()


def test_a_stopped_daemon_is_started_again_by_the_next_client(daemon: Service) -> None:
    daemon.stop(SERVICE)
    assert daemon.show("Result") == "success"
    assert answers(daemon)


def test_a_client_that_comes_during_a_restart_waits_and_is_served(daemon: Service) -> None:
    before = daemon.pid
    daemon.box.run("systemctl", "restart", "--no-block", SERVICE)
    assert answers(daemon)
    daemon.wait_for_log('"ready"', times=2)
    assert daemon.pid not in {0, before}


def test_many_restarts_in_a_row_do_not_reach_the_start_limit(daemon: Service) -> None:
    for _ in range(7):  # systemd's own limit is 5 in 10 s
        daemon.box.run("systemctl", "restart", SERVICE)
    assert answers(daemon)


def test_a_killed_daemon_is_restarted(service: Service) -> None:
    service.start(SERVICE)
    service.kill("KILL")
    service.wait_for_log('"ready"', times=2)
    assert answers(service)
    assert service.show("NRestarts") == "1"


def test_reload_changes_what_is_logged(daemon: Service) -> None:
    daemon.configure('[log]\nlevel = "debug"\n')
    daemon.box.run("systemctl", "reload", SERVICE)
    assert daemon.wait_for_log("settings reloaded")["PRIORITY"] == "6"
    assert answers(daemon)
    assert daemon.wait_for_log("unknown containerID")["PRIORITY"] == "7"


def test_a_pipe_for_a_settings_file_is_refused_and_holds_nobody_up(daemon: Service) -> None:
    settings = daemon.box.path(SETTINGS)
    settings.unlink()
    os.mkfifo(settings)
    daemon.box.run("systemctl", "reload", SERVICE)
    assert "not a regular file" in daemon.wait_for_log("settings not reloaded")["MESSAGE"]
    settings.unlink()
    assert answers(daemon)
    daemon.wait_for("StatusText", "0 VMs, 0 sessions")


def test_a_group_that_nobody_knows_yet_stops_no_start(service: Service) -> None:
    service.configure('[access]\ngroups = ["@daemon", "of-the-network"]\n')
    service.start(SERVICE)
    assert "of-the-network" in service.wait_for_log("that nobody knows so far")["MESSAGE"]
    assert answers(service)


def test_reload_names_what_waits_for_a_restart(daemon: Service) -> None:
    daemon.configure('[log]\nformat = "text"\n')
    daemon.box.run("systemctl", "reload", SERVICE)
    entry = daemon.wait_for_log("settings that take effect after a restart")
    assert entry["PRIORITY"] == "4"
    assert "log.format" in entry["MESSAGE"]


def test_reload_of_a_broken_file_keeps_the_old_settings(daemon: Service) -> None:
    pid = daemon.pid
    daemon.configure('[log]\nlevel = "loud"\n')
    daemon.box.run("systemctl", "reload", SERVICE)
    entry = daemon.wait_for_log("settings not reloaded")
    assert entry["PRIORITY"] == "3"
    assert "log.level: expected one of" in entry["MESSAGE"]
    assert answers(daemon)
    assert daemon.pid == pid


def test_a_daemon_that_ends_by_itself_is_stopping_until_all_is_done(daemon: Service) -> None:
    with hello_in_flight(daemon):
        daemon.kill("TERM")
        daemon.wait_for("ActiveState", "deactivating")
        assert daemon.show("StatusText") == "Stopping"
    daemon.wait_for("ActiveState", "inactive")
    assert daemon.show("Result") == "success"


def test_a_daemon_that_fails_again_and_again_is_given_up(service: Service) -> None:
    service.drop_in("[Service]\nExecStart=\nExecStart=/bin/false\n")
    service.box.run("systemctl", "start", "--no-block", SERVICE)
    service.wait_for_log("Start request repeated too quickly")
    assert service.show("Result") == "exit-code"
    assert service.show("NRestarts") == "20"


def test_the_limit_of_open_files_is_what_the_unit_says(daemon: Service) -> None:
    # On a machine whose root may raise no limits, systemd goes as high as it can itself.
    assert open_files(daemon, daemon.pid) in {524_288, open_files(daemon, 1)}


def test_an_upgrade_of_systemd_itself_disturbs_nobody(daemon: Service) -> None:
    with daemon.client() as client:
        daemon.box.run("systemctl", "daemon-reexec")
        with pytest.raises(Refused):
            client.attach("nobody")


def test_whatever_the_tests_left_is_gone(box: Box) -> None:
    assert box.output("ls", "-A", "/run/cc-oci-runtime", "/var/tmp") == "/run/cc-oci-runtime:\n\n/var/tmp:"
