"""hello when the VM cannot be reached, hangs up or talks nonsense (docs/protocol.md, 1 and 2)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    NOT_ATTACHED,
    READY,
    VERSIONED,
    FakeVm,
    RawClient,
    at_end,
    command,
    error_of,
    frame,
    hello_data,
    is_silent,
    request,
)


def missing(directory: Path) -> str:
    return str(directory / "missing")


def regular_file(directory: Path) -> str:
    path = directory / "regular"
    path.write_text("not a socket")
    return str(path)


def a_directory(directory: Path) -> str:
    return str(directory)


def path_too_long(directory: Path) -> str:
    return str(directory / ("x" * 200))


def path_of_108_bytes(directory: Path) -> str:
    return str(directory) + "/" + "x" * (107 - len(str(directory)))


def path_of_a_mib(directory: Path) -> str:
    return "/" + "x" * 1_000_000


def path_with_nul(directory: Path) -> str:
    return str(directory / "a\0b")


def path_with_leading_nul(directory: Path) -> str:
    return "\0" + str(directory)


def path_that_is_not_utf8(directory: Path) -> str:
    return str(directory / "\u20ac\U0001f600")


def nobody_listens(directory: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "stale"))
    return str(directory / "stale")


def link_to_itself(directory: Path) -> str:
    (directory / "loop").symlink_to("loop")
    return str(directory / "loop")


def below_a_file(directory: Path) -> str:
    return regular_file(directory) + "/below"


def device(directory: Path) -> str:
    return "/dev/null"


UNREACHABLE = [
    missing,
    regular_file,
    a_directory,
    path_too_long,
    path_of_108_bytes,
    path_of_a_mib,
    path_with_nul,
    path_with_leading_nul,
    path_that_is_not_utf8,
    nobody_listens,
    link_to_itself,
    below_a_file,
    device,
]


def assert_refused_and_free(wire: Wire, client: RawClient, container: str) -> None:
    """The client gets an error, is not attached, and the id can be used at once."""
    error_of(client.receive())
    assert client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED
    assert not wire.is_registered(container)
    assert wire.pod(client, container).pings()


@pytest.mark.parametrize("field", ["ctlSerial", "ioSerial"])
@pytest.mark.parametrize("path", UNREACHABLE)
def test_socket_that_cannot_be_reached_is_refused_and_the_id_free_again(
    brief: Wire, path: Callable[[Path], str], field: str
) -> None:
    client, container = brief.client(), brief.new_id()
    data = hello_data(container, brief.vm()) | {field: path(brief.directory)}
    client.send(request("hello", data))
    assert_refused_and_free(brief, client, container)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_socket_of_another_type_is_refused(wire: Wire, kind: socket.SocketKind) -> None:
    client, container = wire.client(), wire.new_id()
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(wire.directory / "other"))
        if kind == socket.SOCK_SEQPACKET:
            sock.listen()
        data = hello_data(container, wire.vm()) | {"ctlSerial": str(wire.directory / "other")}
        client.send(request("hello", data))
        assert_refused_and_free(wire, client, container)


def connected_by(wire: Wire, vm: FakeVm, how: str) -> dict[str, object]:
    """Names for a VM's sockets, other than those that they were bound to."""
    names = {"ctlSerial": vm.ctl_path, "ioSerial": vm.io_path}
    for member, path in names.items():
        other = wire.directory / f"other-{member}"
        if how == "symbolic link":
            other.symlink_to(path)
        elif how == "hard link":
            other.hardlink_to(path)
        elif how == "..":
            other = wire.directory / ".." / wire.directory.name / path.name
        else:
            other = path
        names[member] = other
    return {member: str(path) for member, path in names.items()}


@pytest.mark.parametrize("how", ["the same", "symbolic link", "hard link", ".."])
@pytest.mark.parametrize("shared", [["ctlSerial"], ["ioSerial"], ["ctlSerial", "ioSerial"]])
def test_sockets_that_a_vm_has_are_refused_at_once_and_the_answer_names_it(
    wire: Wire, shared: list[str], how: str
) -> None:
    """A hypervisor answers one connection at a time: there is nothing to wait for."""
    pod, client, container = wire.pod(), wire.client(), wire.new_id()
    paths = connected_by(wire, pod.vm, how)
    data = hello_data(container, wire.vm()) | {member: paths[member] for member in shared}
    error = error_of(client.ask("hello", data))
    (member, *_) = shared
    has_it = f"the VM '{pod.container}' has it already"
    assert error == f"{member}: cannot connect to {paths[member]}: {has_it}"
    assert not wire.is_registered(container)
    assert pod.pings()
    assert pod.client.allocate().base == 1


def test_one_socket_for_both_channels_is_refused_at_once(wire: Wire) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    error = error_of(client.ask("hello", hello_data(container, vm) | {"ioSerial": str(vm.ctl_path)}))
    assert error == f"ioSerial: cannot connect to {vm.ctl_path}: it is the VM's other channel too"
    assert not wire.is_registered(container)


def test_sockets_are_taken_while_a_hello_waits_for_ready(wire: Wire) -> None:
    first, second, vm, container = wire.client(), wire.client(), wire.vm(), wire.new_id()
    first.hello(container, vm)
    vm.accept()
    assert error_of(second.ask("hello", hello_data(wire.new_id(), vm))).endswith(
        f": the VM '{container}' has it already"
    )
    vm.say(READY)
    assert first.receive() == VERSIONED


def test_sockets_of_a_hello_that_failed_are_free_again(brief: Wire) -> None:
    client, vm = brief.client(), brief.vm()
    for _ in range(2):
        client.hello(brief.new_id(), vm)
        vm.accept()
        assert error_of(client.receive()) == "no READY from the VM in 0.4 s"
        vm.hang_up()


def test_sockets_of_a_vm_that_lingers_after_bye_are_waited_for(hasty: Wire) -> None:
    """It has them for a little while only."""
    pod, client = hasty.pod(), hasty.client()
    pod.client.bye(pod.container)
    client.hello(pod.container, pod.vm)
    assert pod.vm.is_hung_up()
    pod.vm.hang_up()
    pod.vm.accept()
    pod.vm.say(READY)
    assert client.receive() == VERSIONED


def test_sockets_of_a_vm_that_was_lost_are_free_again(wire: Wire) -> None:
    pod, client = wire.pod(), wire.client()
    pod.vm.hang_up()
    wire.wait_unregistered(pod.container)
    client.hello(wire.new_id(), pod.vm)
    pod.vm.accept()
    pod.vm.say(READY)
    assert client.receive() == VERSIONED


@pytest.mark.parametrize("field", ["ctlSerial", "ioSerial"])
def test_path_is_not_cut_at_a_nul(wire: Wire, field: str) -> None:
    client, vm = wire.client(), wire.vm()
    data = hello_data(wire.new_id(), vm)
    error_of(client.ask("hello", data | {field: f"{data[field]}\0junk"}))
    index = ["ctlSerial", "ioSerial"].index(field)
    assert is_silent(vm.listeners[index])


def test_socket_whose_backlog_is_full_is_refused_in_time_and_others_are_served(hasty: Wire) -> None:
    pod = hasty.pod()
    client, container = hasty.client(), hasty.new_id()
    path = str(hasty.directory / "full")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(path)  # and nobody accepts it
        data = hello_data(container, hasty.vm()) | {"ctlSerial": path}
        start = time.monotonic()
        client.send(request("hello", data))
        assert pod.pings()
        error_of(client.receive())
        assert time.monotonic() - start < 4
    assert not hasty.is_registered(container)


def gone_before_accept(vm: FakeVm) -> None:
    for listener in vm.listeners:
        listener.close()


def both_closed(vm: FakeVm) -> None:
    vm.accept()
    vm.hang_up()


def ctl_closed(vm: FakeVm) -> None:
    vm.accept()
    vm.ctl.close()


def io_closed(vm: FakeVm) -> None:
    vm.accept()
    vm.io.close()


def ctl_shut_down(vm: FakeVm) -> None:
    vm.accept()
    vm.ctl.shutdown(socket.SHUT_WR)


def one_byte_of_ready(vm: FakeVm) -> None:
    vm.accept()
    vm.ctl.sendall(command(READY)[:1])
    vm.hang_up()


def all_but_one_byte_of_ready(vm: FakeVm) -> None:
    vm.accept()
    vm.ctl.sendall(command(READY)[:-1])
    vm.hang_up()


def ready_without_its_payload(vm: FakeVm) -> None:
    vm.accept()
    vm.ctl.sendall(command(READY, length=12))
    vm.hang_up()


@pytest.mark.parametrize(
    "step",
    [
        gone_before_accept,
        both_closed,
        ctl_closed,
        io_closed,
        ctl_shut_down,
        one_byte_of_ready,
        all_but_one_byte_of_ready,
        ready_without_its_payload,
    ],
)
def test_vm_that_hangs_up_during_hello_is_refused_and_the_id_free_again(
    hasty: Wire, step: Callable[[FakeVm], None]
) -> None:
    client, vm, container = hasty.client(), hasty.vm(), hasty.new_id()
    client.hello(container, vm)
    step(vm)
    assert_refused_and_free(hasty, client, container)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**32 - 1])
def test_vm_that_announces_a_malformed_length_in_ready_is_refused(wire: Wire, length: int) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    vm.ctl.sendall(command(READY, length=length))
    assert_refused_and_free(wire, client, container)
    assert vm.is_hung_up()


def test_vm_that_hangs_up_after_it_was_asked_is_refused(hasty: Wire) -> None:
    client, vm, container = hasty.client(), hasty.vm(), hasty.new_id()
    client.hello(container, vm)
    vm.accept()
    vm.read_command()
    vm.hang_up()
    assert_refused_and_free(hasty, client, container)


def test_vm_that_hangs_up_right_after_ready_leaves_its_id_free(wire: Wire) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    vm.say(READY)
    vm.hang_up()
    client.receive()
    wire.wait_unregistered(container)
    assert wire.pod(container=container).pings()


def test_vm_that_loses_its_framing_before_ready_is_lost_by_then(wire: Wire) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    vm.io.sendall(frame(1, length=11))
    vm.say(READY)
    client.receive()
    wire.wait_unregistered(container)
    assert vm.is_hung_up()


def test_output_from_before_hello_is_nobodys(wire: Wire) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    vm.send_frame(1, b"before anybody owned it")
    vm.say(READY)
    client.receive()
    assert wire.is_registered(container)


def test_failed_hello_closes_the_sockets_it_opened(brief: Wire) -> None:
    client, vm = brief.client(), brief.vm()
    os.unlink(vm.io_path)
    client.hello(brief.new_id(), vm)
    error_of(client.receive())
    if not is_silent(vm.listeners[0]):
        ctl, _ = vm.listeners[0].accept()
        with ctl:
            assert at_end(ctl)
