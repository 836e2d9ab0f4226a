"""The VM's console is read line by line, whatever it sends, and harms nobody."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    READY,
    VERSIONED,
    WAIT,
    FakeVm,
    RawClient,
    error_of,
    hello_data,
    request,
    wait_until,
)


@contextmanager
def booting(wire: Wire) -> Iterator[tuple[socket.socket, FakeVm, RawClient]]:
    """The VM's end of the console of a VM that has yet to say READY, and the client that waits for it."""
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    path = str(wire.directory / f"{container}.console")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(WAIT)
        listener.bind(path)
        listener.listen()
        client.send(request("hello", hello_data(container, vm) | {"console": path}))
        vm.accept()
        sock, _ = listener.accept()
    with sock:
        sock.settimeout(WAIT)
        yield sock, vm, client


@contextmanager
def console(wire: Wire) -> Iterator[tuple[socket.socket, FakeVm]]:
    """The VM's end of the console of a VM that is registered with a daemon that logs consoles."""
    with booting(wire) as (sock, vm, client):
        vm.say(READY)
        assert client.receive() == VERSIONED
        yield sock, vm


def test_guest_that_panics_says_so_in_the_answer_to_hello(brief: Wire) -> None:
    """Whatever the level of the log. What cannot be printed is spelled out."""
    with booting(brief) as (sock, _, client):
        sock.sendall(b"noise\n" * 10_000 + b'\x1b[31mpanic: "\\"\n')
        error = error_of(client.receive())
    assert error.startswith("no READY from the VM in 0.4 s; the console's last lines: ")
    assert error.endswith(r'noise | noise | \x1b[31mpanic: "\"')
    assert error.isprintable()
    wait_until(lambda: json.dumps(error) in brief.daemon.log(), "the log says so too")


def test_lines_are_logged(hasty: Wire) -> None:
    with console(hasty) as (sock, _):
        sock.sendall(b"line-one-7351\r\nline-tw")
        sock.sendall(b"o-7352\n")
        for line in ("line-one-7351", "line-two-7352"):
            wait_until(lambda line=line: line in hasty.daemon.log(), line)  # type: ignore[misc]


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(b"\xff\xfe\0\1\x1b[2J\n" * 100, id="binary"),
        pytest.param(b"x" * 5_000_000, id="a line of 5 MB"),
        pytest.param(b"\n" * 10_000, id="empty lines"),
        pytest.param(b"no end of line", id="no end of line"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_whatever_it_sends_harms_nobody(hasty: Wire, output: bytes) -> None:
    pod = hasty.pod()
    with console(hasty) as (sock, vm):
        sock.sendall(output)
        assert pod.pings()
        sock.shutdown(socket.SHUT_WR)
        vm.hang_up()
    assert max(map(len, hasty.daemon.log().splitlines())) < 16_384


def test_vm_without_its_console_goes_on(hasty: Wire) -> None:
    with console(hasty) as (sock, vm):
        sock.close()
        vm.send_frame(1, b"nobody's")
        assert vm.ctl.fileno() > 0


def test_console_is_given_back_when_the_vm_is_gone(hasty: Wire) -> None:
    with console(hasty) as (sock, vm):
        vm.hang_up()
        assert sock.recv(1) == b""


@pytest.mark.parametrize("path", ["/nonexistent", "/dev/null", "x" * 300, "a\0b"])
def test_console_that_cannot_be_reached_does_not_stop_the_vm(hasty: Wire, path: str) -> None:
    client, vm = hasty.client(), hasty.vm()
    client.send(request("hello", hello_data(hasty.new_id(), vm) | {"console": path}))
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED


def test_everything_is_logged_and_nothing_changes(hasty: Wire) -> None:
    """At the level that dumps what goes through."""
    pod = hasty.pod()
    stream = pod.open()
    for payload in (b"", b"\xff\0\1", b"x" * 10_228):
        pod.vm.send_frame(1, payload)
        assert stream.read_frame() == (1, payload)
    pod.vm.send_frame(99, b"\xff" * 1_000)
    stream.send(b"\xff\0" * 1_000)
    assert pod.vm.take_stdin(1, 2_000) == b"\xff\0" * 1_000
    stream.send()
    assert pod.vm.next_frame() == (1, b"")
    pod.client.hyper("ping", r'"\u0000\ud83d\ude00\n"')
    pod.vm.acknowledge(b"\xff" * 1_000)
    assert pod.client.receive() == b'{"success":true}'
