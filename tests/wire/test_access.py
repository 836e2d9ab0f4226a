"""Users of one daemon: who may connect, whose VMs are whose, and what the daemon does in whose name."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from cc_proxy.linux.credentials import Credentials
from tests.users import (
    ADMIN,
    ADMINS,
    ALICE,
    AS_ALICE,
    AS_SERVICE,
    BOB,
    MALLORY,
    ROOT,
    call_as,
    give,
    needs_root,
)
from tests.wire.daemon import PATIENT, Daemon, Wire, write_config
from tests.wire.support import (
    OK,
    READY,
    VERSIONED,
    FakeVm,
    RawClient,
    at_end,
    error_of,
    hello_data,
    refused,
    request,
    wait_until,
)

pytestmark = needs_root

ACCESS = f"""
[access]
users = [{ALICE.uid}, {BOB.uid}]
admins = [{ADMINS}]
{PATIENT}
"""

#: Threads of a daemon that has no clients: main, accept, idle, log.
_AT_REST = 4


@dataclass
class Town:
    """A daemon, its users, and their VMs."""

    wire: Wire
    stack: ExitStack

    def client(self, user: Credentials) -> RawClient:
        client = call_as(user, lambda: RawClient(self.wire.daemon.socket_path))
        self.stack.callback(client.close_all)
        return client

    def vm(self, owner: Credentials, mode: int = 0o700) -> FakeVm:
        """A VM that its owner alone can connect to."""
        vm = self.wire.vm()
        for path in (vm.ctl_path, vm.io_path):
            give(path, owner, mode)
        return vm

    def pod(self, owner: Credentials, container: str, client: RawClient | None = None) -> RawClient:
        """The client that said hello for a VM of its own."""
        client, vm = client or self.client(owner), self.vm(owner)
        client.hello(container, vm)
        vm.accept()
        vm.say(READY)
        assert client.receive() == VERSIONED
        return client

    def status(self, user: Credentials) -> dict[str, object]:
        with closing(self.client(user)) as client:
            response = json.loads(client.ask("status"))
        assert response["success"] is True
        found: dict[str, object] = response["data"]
        return found

    def ids_seen_by(self, user: Credentials) -> list[str]:
        return [vm["id"] for vm in self.status(user)["vms"]]  # type: ignore[attr-defined]


def town_of(directory: Path, tables: str, prefix: Sequence[str] = ()) -> Iterator[Town]:
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon.configured(directory, tables, prefix=prefix))
        wire = Wire(daemon, directory)
        stack.callback(wire.close)
        yield Town(wire, stack)
        daemon.check_log()


@pytest.fixture
def town(open_dir: Path) -> Iterator[Town]:
    """One of root's: Alice and Bob may connect, and so may admins."""
    yield from town_of(open_dir, ACCESS)


# Who may connect ------------------------------------------------------------------------------------------


def test_who_may_not_connect_is_told_and_logged_and_nothing_else(town: Town) -> None:
    daemon = town.wire.daemon
    # A thread that served a client waits a little while for another one, and would hide one too many.
    wait_until(lambda: daemon.count_threads() == _AT_REST, "the thread that served the first client has gone")
    with ExitStack() as stack:
        for _ in range(20):
            client = town.client(MALLORY)
            stack.callback(client.close)
            assert error_of(client.receive()).startswith(f"user {MALLORY.uid} may not connect: ")
            assert at_end(client.sock)
        assert daemon.count_threads() == _AT_REST
    event = json.loads(next(line for line in daemon.log().splitlines() if "connection refused" in line))
    assert event["uid"] == MALLORY.uid


@pytest.mark.parametrize("user", [ROOT, ALICE, BOB, ADMIN], ids=["root", "Alice", "Bob", "an admin"])
def test_who_may_connect(town: Town, user: Credentials) -> None:
    assert town.client(user).ask("x") == refused("no payload named 'x'")


def test_who_may_connect_changes_with_the_settings_and_so_do_the_sockets_permissions(open_dir: Path) -> None:
    for town in town_of(open_dir, PATIENT):
        daemon = town.wire.daemon
        with pytest.raises(PermissionError):
            town.client(ALICE)
        for tables, mode in ((ACCESS, 0o666), (PATIENT, 0o660)):
            write_config(open_dir, daemon.socket_path, tables)
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: daemon.socket_path.stat().st_mode & 0o777 == mode, "it has changed")  # noqa: B023
            if mode == 0o666:
                assert town.client(ALICE).ask("x") == refused("no payload named 'x'")


def test_by_default_it_is_root_and_the_daemons_group(open_dir: Path) -> None:
    for town in town_of(open_dir, PATIENT):
        path = town.wire.daemon.socket_path
        assert path.stat().st_mode & 0o777 == 0o660
        path.chmod(0o666)
        member = Credentials(0, MALLORY.uid, MALLORY.gid, (os.getegid(),))
        assert town.client(member).ask("x") == refused("no payload named 'x'")
        assert "may not connect" in error_of(town.client(ALICE).receive())


def test_reload_counts_for_connections_from_then_on(town: Town) -> None:
    before = town.client(BOB)
    assert before.ask("x") == refused("no payload named 'x'")
    daemon = town.wire.daemon
    write_config(daemon.log_path.parent, daemon.socket_path, ACCESS.replace(str(BOB.uid), str(MALLORY.uid)))
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "settings reloaded" in daemon.log(), "they are read again")
    assert town.client(MALLORY).ask("x") == refused("no payload named 'x'")
    assert "may not connect" in error_of(town.client(BOB).receive())
    assert before.ask("x") == refused("no payload named 'x'")


# Whose VMs are whose --------------------------------------------------------------------------------------


def test_vm_of_another_user_is_answered_for_as_if_there_were_none(town: Town) -> None:
    town.pod(ALICE, "alices")
    bob = town.client(BOB)
    for name in ("attach", "bye"):
        for container in ("alices", "nobodys"):
            assert bob.ask(name, {"containerId": container}) == refused(f"unknown containerID: {container}")
    assert error_of(bob.ask("allocateIO", {"nStreams": 1})) == "client not attached to a vm"
    bob.hyper()
    assert error_of(bob.receive()) == "client not attached to a vm"
    assert town.client(ALICE).attach("alices") == VERSIONED


@pytest.mark.parametrize("user", [ALICE, ROOT, ADMIN], ids=["its owner", "root", "an admin"])
def test_vm_is_its_owners_roots_and_the_admins(town: Town, user: Credentials) -> None:
    town.pod(ALICE, "alices")
    client = town.client(user)
    assert client.attach("alices") == VERSIONED
    assert client.allocate().base == 1
    assert client.bye("alices") == OK


def test_root_has_its_own_vms_to_itself_but_for_admins(town: Town) -> None:
    town.pod(ROOT, "roots")
    assert error_of(town.client(ALICE).attach("roots")) == "unknown containerID: roots"
    assert town.client(ADMIN).attach("roots") == VERSIONED


def test_id_is_taken_whoever_has_it(town: Town) -> None:
    town.pod(ALICE, "alices")
    vm = town.vm(BOB)
    answer = town.client(BOB).ask("hello", hello_data("alices", vm))
    assert answer == refused("alices: container already registered")
    assert vm.was_not_dialled()


def test_status_shows_what_one_may_use(town: Town) -> None:
    kept = [town.pod(ALICE, "a1"), town.pod(ALICE, "a2"), town.pod(BOB, "b")]
    answer = kept[2].ask("hello", hello_data("gone", town.vm(ALICE)))
    assert "Permission denied" in error_of(answer)
    assert town.ids_seen_by(ALICE) == ["a1", "a2"]
    assert town.ids_seen_by(BOB) == ["b"]
    assert town.ids_seen_by(ADMIN) == town.ids_seen_by(ROOT) == ["a1", "a2", "b"]
    alices, bobs = town.status(ALICE), town.status(BOB)
    assert (alices["vmCount"], bobs["vmCount"]) == (2, 1)
    assert alices["ended"] == []
    assert [vm["id"] for vm in bobs["ended"]] == ["gone"]  # type: ignore[attr-defined]
    for client in kept:
        client.close()
    wait_until(lambda: town.status(BOB)["connections"] == 1, "others' connections are not counted")


def test_log_level_is_for_root_and_admins(town: Town) -> None:
    refusal = error_of(town.client(ALICE).ask("logLevel", {"level": "debug"}))
    assert refusal == f"user {ALICE.uid} may not set the log level: access.admins names who may"
    for user, old, new in ((ADMIN, "info", "debug"), (ROOT, "debug", "info")):
        answer = json.loads(town.client(user).ask("logLevel", {"level": new}))
        assert answer == {"success": True, "data": {"old": old, "new": new}}


# In whose name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["ctlSerial", "ioSerial"])
def test_hello_for_what_the_client_cannot_open_is_refused(town: Town, member: str) -> None:
    secret, own = town.vm(ALICE), town.vm(BOB)
    data = hello_data("pod", own) | {member: hello_data("pod", secret)[member]}
    answer = error_of(town.client(BOB).ask("hello", data))
    assert answer == f"{member}: cannot connect to {data[member]}: Permission denied"
    assert secret.was_not_dialled()
    assert not town.wire.is_registered("pod")


@pytest.mark.parametrize(
    ("user", "cause"),
    [
        (ALICE, "the VM 'pod' has it already"),
        (ADMIN, "the VM 'pod' has it already"),
        (ROOT, "the VM 'pod' has it already"),
        (BOB, "it is in use already"),
    ],
)
def test_whose_a_socket_is_is_said_to_who_may_use_the_vm(town: Town, user: Credentials, cause: str) -> None:
    client, vm = town.client(ALICE), town.vm(ALICE, 0o777)
    client.hello("pod", vm)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    error = error_of(town.client(user).ask("hello", hello_data("other", vm)))
    assert error == f"ctlSerial: cannot connect to {vm.ctl_path}: {cause}"


def test_console_that_the_client_cannot_open_is_not_read(town: Town, open_dir: Path) -> None:
    assert json.loads(town.client(ROOT).ask("logLevel", {"level": "console"}))["success"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(open_dir / "console"))
        listener.listen()
        listener.setblocking(False)
        give(open_dir / "console", ALICE)
        client, vm = town.client(BOB), town.vm(BOB)
        client.send(request("hello", hello_data("pod", vm) | {"console": str(open_dir / "console")}))
        vm.accept()
        vm.say(READY)
        assert client.receive() == VERSIONED
        with pytest.raises(BlockingIOError):
            listener.accept()
    wait_until(lambda: "console cannot be read" in town.wire.daemon.log(), "the log says so")


def test_the_vm_sees_the_client(town: Town) -> None:
    client, vm = town.client(BOB), town.vm(BOB)
    client.hello("pod", vm)
    vm.accept()
    for sock in (vm.ctl, vm.io):
        peer = Credentials.of_peer(sock)
        assert (peer.uid, peer.gid, peer.groups) == (BOB.uid, BOB.gid, BOB.groups)
    vm.say(READY)
    assert client.receive() == VERSIONED


@pytest.mark.parametrize("user", [ROOT, BOB], ids=["root", "Bob"])
def test_the_daemon_never_talks_to_itself(town: Town, open_dir: Path, user: Credentials) -> None:
    own, vm, client = town.wire.daemon.socket_path, town.vm(user), town.client(user)
    os.link(own, open_dir / "hard")
    (open_dir / "soft").symlink_to(own)
    for path in (own, open_dir / "hard", open_dir / "soft", f"/proc/self/root{own}"):
        for member in ("ctlSerial", "ioSerial"):
            data = hello_data("pod", vm) | {member: str(path)}
            answer = error_of(client.ask("hello", data))
            assert answer == f"{member}: cannot connect to {path}: that is the daemon itself"
    client.close()
    town.wire.daemon.fds += user is not ROOT  # on which its silent connections are waited for
    town.wire.daemon.check()


def test_where_the_daemon_was_started_is_no_way_in(town: Town) -> None:
    """`/proc/self/cwd` would pass the directories above it."""
    assert os.readlink(f"/proc/{town.wire.daemon.pid}/cwd") == "/"


# Daemons of other users -----------------------------------------------------------------------------------


def test_daemon_without_rights_serves_its_own_user(open_dir: Path) -> None:
    """It may be asked by others, if its settings say so; but it cannot act for them."""
    os.chown(open_dir, ALICE.uid, ALICE.gid)
    for town in town_of(open_dir, ACCESS, prefix=AS_ALICE):
        town.pod(ALICE, "alices")
        with ExitStack() as stack:
            for user in (BOB, ROOT):
                client = town.client(user)
                stack.callback(client.close)
                vm = town.vm(user, 0o777)
                answer = error_of(client.ask("hello", hello_data("pod", vm)))
                uid = user.uid
                assert answer == f"ctlSerial: the daemon cannot act as user {uid}: Operation not permitted"
                assert vm.was_not_dialled()
        assert json.loads(town.client(ALICE).ask("logLevel", {"level": "info"}))["success"]


def test_daemon_with_the_rights_that_its_unit_gives_it(open_dir: Path) -> None:
    """Its own user gets no more of them than any other."""
    os.chown(open_dir, ALICE.uid, ALICE.gid)
    for town in town_of(open_dir, ACCESS, prefix=AS_SERVICE):
        for user, container in ((ALICE, "alices"), (BOB, "bobs"), (ROOT, "roots")):
            town.pod(user, container)
        for user in (ALICE, BOB):
            vm = town.vm(ROOT)
            answer = error_of(town.client(user).ask("hello", hello_data("pod", vm)))
            assert answer == f"ctlSerial: cannot connect to {vm.ctl_path}: Permission denied"
            assert vm.was_not_dialled()
        vm, client = town.vm(BOB), town.client(ROOT)
        client.hello("root passes", vm)
        vm.accept()
        vm.say(READY)
        assert client.receive() == VERSIONED
