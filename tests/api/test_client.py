"""The client against a peer that plays the daemon byte by byte."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cc_proxy.api import (
    DEFAULT_SOCKET,
    Attach,
    Client,
    Deadline,
    Hyper,
    ProtocolError,
    Refused,
    TimedOut,
    deadline,
)
from tests.api.support import expect, expect_end, message, peer, say
from tests.clock import Clock

OK = message(b'{"success":true}')
VERSION = message(b'{"success":true,"data":{"version":1}}')
IO_BASE = message(b'{"success":true,"data":{"ioBase":7}}')
REFUSED = message(b'{"success":false,"error":"unknown containerID: c"}')

HELLO = message(b'{"id":"hello","data":{"containerId":"c","ctlSerial":"/ctl","ioSerial":"/io"}}')
ATTACH = message(b'{"id":"attach","data":{"containerId":"c"}}')
BYE = message(b'{"id":"bye","data":{"containerId":"c"}}')
ALLOCATE_1 = message(b'{"id":"allocateIO","data":{"nStreams":1}}')
ALLOCATE_2 = message(b'{"id":"allocateIO","data":{"nStreams":2}}')
PING = message(b'{"id":"hyper","data":{"hyperName":"ping"}}')

Action = Callable[[Client], object]

REQUESTS: list[tuple[Action, bytes]] = [
    (lambda client: client.hello("c", "/ctl", "/io"), HELLO),
    (lambda client: client.attach("c"), ATTACH),
    (lambda client: client.bye("c"), BYE),
    (lambda client: client.allocate_io(), ALLOCATE_1),
    (lambda client: client.allocate_io(2), ALLOCATE_2),
    (lambda client: client.hyper("ping"), PING),
    (lambda client: client.request(Attach("c")), ATTACH),
]
EACH_REQUEST = pytest.mark.parametrize(
    ("action", "wire"),
    REQUESTS,
    ids=["hello", "attach", "bye", "allocate_io", "allocate_io 2", "hyper", "request"],
)


def answers(*exchanges: tuple[bytes, bytes]) -> Callable[[socket.socket], None]:
    """A daemon that wants these requests, gives these responses, and is then left by its client."""

    def script(far: socket.socket) -> None:
        for request, response in exchanges:
            expect(far, request)
            say(far, response)
        expect_end(far)

    return script


def leaves_after(request: bytes, response: bytes) -> Callable[[socket.socket], None]:
    """A daemon that goes away behind so much of a response."""

    def script(far: socket.socket) -> None:
        expect(far, request)
        far.sendall(response)

    return script


def sends_fds(data: bytes, *fds: int) -> Callable[[socket.socket], None]:
    """A daemon that follows up on allocateIO with this."""

    def script(far: socket.socket) -> None:
        expect(far, ALLOCATE_1)
        far.sendall(IO_BASE)
        socket.send_fds(far, [data], fds)
        expect_end(far)

    return script


def is_broken(client: Client) -> bool:
    """Whether every request is refused."""
    for action, _ in REQUESTS:
        with pytest.raises(ProtocolError, match="earlier request failed"):
            action(client)
    return True


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its first end sees end of file as soon as nobody has the second any more: close that in the test."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)


# What it says and what it hears -----------------------------------------------------------------------------


def test_hello() -> None:
    with peer(answers((HELLO, VERSION))) as near, Client(near) as client:
        assert client.hello("c", "/ctl", "/io") == 1


def test_hello_with_a_console() -> None:
    wire = message(
        b'{"id":"hello","data":{"containerId":"c","ctlSerial":"/ctl","ioSerial":"/io","console":"/console"}}'
    )
    with peer(answers((wire, VERSION))) as near, Client(near) as client:
        assert client.hello("c", "/ctl", "/io", "/console") == 1


def test_attach_and_bye() -> None:
    other = message(b'{ "data" : { "more" : [] , "version" : 2 } , "success" : true , "x" : 1 }')
    with peer(answers((ATTACH, VERSION), (BYE, OK), (ATTACH, other))) as near, Client(near) as client:
        assert client.attach("c") == 1
        client.bye("c")
        assert client.attach("c") == 2


def test_text_is_utf_8_on_the_wire() -> None:
    wire = message('{"id":"attach","data":{"containerId":"é\\"\\n€😀"}}'.encode())
    with peer(answers((wire, VERSION))) as near, Client(near) as client:
        client.attach('é"\n€😀')


@pytest.mark.parametrize("n_streams", [1, 2])
def test_allocate_io(pipe: tuple[int, int], n_streams: int) -> None:
    reader, writer = pipe

    def script(far: socket.socket) -> None:
        expect(far, ALLOCATE_1 if n_streams == 1 else ALLOCATE_2)
        far.sendall(IO_BASE)
        socket.send_fds(far, [b"F"], [writer])
        expect(far, BYE)
        far.sendall(OK)
        expect_end(far)

    with peer(script) as near, Client(near) as client:
        io_base, fd = client.allocate_io(n_streams)
        client.bye("c")
    os.close(writer)
    with os.fdopen(fd, "wb") as file:
        assert io_base == 7
        assert not os.get_inheritable(fd)
        file.write(b"x")
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""


@pytest.mark.parametrize(
    ("data", "wire"),
    [
        (b"", b""),
        (msgspec.Raw(), b""),
        (msgspec.Raw(b""), b""),
        (b'{ "a" : 1.0, "a" : "\\u0041" }', b',"data":{ "a" : 1.0, "a" : "\\u0041" }'),
        (msgspec.Raw(b"[ ]"), b',"data":[ ]'),
        (b'""', b',"data":""'),
        (b"null", b',"data":null'),
        (None, b',"data":null'),
        ("", b',"data":""'),
        ({}, b',"data":{}'),
        ({"a": [1, 2.5, "é", None, True]}, ',"data":{"a":[1,2.5,"é",null,true]}'.encode()),
        (0, b',"data":0'),
        (False, b',"data":false'),
    ],
)
def test_hyper_with_data(data: object, wire: bytes) -> None:
    request = message(b'{"id":"hyper","data":{"hyperName":"ping"' + wire + b"}}")
    with peer(answers((request, OK))) as near, Client(near) as client:
        client.hyper("ping", data)


def test_hyper_without_data() -> None:
    with peer(answers((PING, OK))) as near, Client(near) as client:
        client.hyper("ping")


def test_a_request_of_any_payload() -> None:
    response = message(b'{"success":true,"data":{ "x":1 }}')
    with peer(answers((PING, response), (ATTACH, OK))) as near, Client(near) as client:
        assert bytes(client.request(Hyper("ping"))) == b'{ "x":1 }'
        assert bytes(client.request(Attach("c"))) == b""


@EACH_REQUEST
def test_a_refusal_carries_the_text_and_changes_nothing(action: Action, wire: bytes) -> None:
    with peer(answers((wire, REFUSED), (wire, REFUSED), (ATTACH, VERSION))) as near, Client(near) as client:
        for _ in range(2):
            with pytest.raises(Refused, match=r"^unknown containerID: c$") as caught:
                action(client)
            assert caught.value.text == "unknown containerID: c"
        assert client.attach("c") == 1


def test_a_refusal_without_a_text() -> None:
    with peer(answers((ATTACH, message(b'{"success":false}')))) as near, Client(near) as client:
        with pytest.raises(Refused) as caught:
            client.attach("c")
        assert caught.value.text == ""


@pytest.mark.parametrize("action", [action for action, _ in REQUESTS])
def test_what_the_daemon_says_before_it_stops_reading(action: Action) -> None:
    """As it does to who may not connect: the answer comes before the request, which then cannot be sent."""
    near, far = socket.socketpair()
    far.sendall(REFUSED)
    far.close()
    with Client(near) as client:
        with pytest.raises(Refused, match=r"^unknown containerID: c$"):
            action(client)
        assert is_broken(client)


def test_what_the_daemon_says_in_the_middle_of_a_request() -> None:
    def script(far: socket.socket) -> None:
        far.recv(1_000)
        far.sendall(REFUSED)

    with peer(script) as near, Client(near) as client:
        with pytest.raises(Refused, match=r"^unknown containerID: c$"):
            client.hyper("ping", b'"' + b"x" * 1_000_000 + b'"')
        assert is_broken(client)


@pytest.mark.parametrize("said", [b"", REFUSED[:-1], OK], ids=["nothing", "half", "yes"])
def test_a_write_that_fails_without_a_refusal(said: bytes) -> None:
    near, far = socket.socketpair()
    far.sendall(said)
    far.shutdown(socket.SHUT_RD)  # more might come, and is not waited for
    with far, Client(near) as client:
        with pytest.raises(BrokenPipeError):
            client.attach("c")
        assert is_broken(client)


# Peers that do not keep to the protocol ---------------------------------------------------------------------


@EACH_REQUEST
def test_a_daemon_that_goes_away_within_a_response(action: Action, wire: bytes) -> None:
    for held in (0, 1, 7, 8, 9, len(REFUSED) - 1):
        with peer(leaves_after(wire, REFUSED[:held])) as near, Client(near) as client:
            with pytest.raises(ProtocolError, match="closed"):
                action(client)
            assert is_broken(client)


@EACH_REQUEST
def test_a_daemon_that_goes_away_within_a_request(action: Action, wire: bytes) -> None:
    with peer(lambda far: expect(far, wire[:-1])) as near, Client(near) as client:
        with pytest.raises((ProtocolError, OSError), match=r"closed|reset|Broken pipe"):
            action(client)
        assert is_broken(client)


@EACH_REQUEST
def test_a_daemon_that_is_gone_already(action: Action, wire: bytes) -> None:
    near, far = socket.socketpair()
    far.close()
    with Client(near) as client:
        with pytest.raises(BrokenPipeError):
            action(client)
        assert is_broken(client)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(message(b"{}", length=2**32 - 1), id="4 GiB"),
        pytest.param(message(b"{}", length=1_048_577), id="1 MiB and a byte"),
        pytest.param(message(b'{"success":true}', reserved=1), id="reserved"),
        pytest.param(message(b""), id="nothing"),
        pytest.param(message(b"[]"), id="array"),
        pytest.param(message(b"{}"), id="empty object"),
        pytest.param(message(b'{"success":1}'), id="number for success"),
        pytest.param(message(b'{"success":false,"error":null}'), id="null for error"),
        pytest.param(message(b'{"success":false,"error":"\xff"}'), id="no UTF-8"),
        pytest.param(message(b'{"success":true,"data":' + b"[" * 20_000), id="20,000 brackets"),
    ],
)
def test_a_response_that_is_none(response: bytes) -> None:
    for action, wire in REQUESTS:
        with peer(answers((wire, response))) as near, Client(near) as client:
            with pytest.raises(ProtocolError):
                action(client)
            assert is_broken(client)


@pytest.mark.parametrize(
    "data", [b"", b',"data":null', b',"data":[]', b',"data":{"version":"1","ioBase":"7"}']
)
def test_a_result_that_is_none(data: bytes) -> None:
    for action, wire in (REQUESTS[0], REQUESTS[1], REQUESTS[3]):
        with peer(answers((wire, message(b'{"success":true' + data + b"}")))) as near, Client(near) as client:
            with pytest.raises(ProtocolError):
                action(client)
            assert is_broken(client)


@pytest.mark.parametrize(
    ("data", "count"), [(b"F", 0), (b"G", 0), (b"F", 2), (b"F", 3), (b"F", 200), (b"G", 1), (b"\0", 2)]
)
def test_the_wrong_fds_are_refused_and_closed(pipe: tuple[int, int], data: bytes, count: int) -> None:
    reader, writer = pipe
    with peer(sends_fds(data, *[writer] * count)) as near, Client(near) as client:
        with pytest.raises(ProtocolError):
            client.allocate_io()
        assert is_broken(client)
    os.close(writer)
    assert os.read(reader, 1) == b""


def test_a_daemon_that_goes_away_before_the_fd() -> None:
    with peer(leaves_after(ALLOCATE_1, IO_BASE)) as near, Client(near) as client:
        with pytest.raises(ProtocolError, match="closed"):
            client.allocate_io()
        assert is_broken(client)


def test_an_fd_that_comes_with_a_response_is_not_kept(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def script(far: socket.socket) -> None:
        expect(far, ATTACH)
        socket.send_fds(far, [VERSION], [writer])
        expect_end(far)

    with peer(script) as near, Client(near) as client:
        client.attach("c")
        os.close(writer)
        assert os.read(reader, 1) == b""


def test_a_request_over_1_mib_is_not_sent() -> None:
    with peer(expect_end) as near, Client(near) as client, pytest.raises(ProtocolError, match="limit"):
        client.hyper("ping", b'"' + b"x" * 1_048_576 + b'"')


# Deadlines --------------------------------------------------------------------------------------------------


@EACH_REQUEST
def test_a_timeout_of_0_is_a_timeout(action: Action, wire: bytes) -> None:
    with peer(answers((wire, b""))) as near, Client(near, timeout=0) as client:
        with pytest.raises(TimedOut):
            action(client)
        assert is_broken(client)


@pytest.mark.parametrize(("default", "timeout"), [(None, 0), (30, 0), (30, 0.02), (0.02, None), (0, None)])
def test_a_response_that_does_not_come_in_time(default: float | None, timeout: float | None) -> None:
    for held in (0, 1, 8, len(VERSION) - 1):
        with peer(answers((ATTACH, VERSION[:held]))) as near, Client(near, timeout=default) as client:
            with pytest.raises(TimedOut):
                client.attach("c", timeout=timeout)
            assert is_broken(client)


def test_the_timeout_of_a_request_takes_the_place_of_the_clients() -> None:
    with peer(answers((ATTACH, VERSION), (PING, OK), (BYE, OK))) as near, Client(near, timeout=0) as client:
        client.attach("c", timeout=10)
        client.hyper("ping", timeout=10)
        client.bye("c", timeout=10)


def test_every_method_has_a_timeout_of_its_own() -> None:
    actions: list[Action] = [
        lambda client: client.hello("c", "/ctl", "/io", timeout=0),
        lambda client: client.attach("c", timeout=0),
        lambda client: client.bye("c", timeout=0),
        lambda client: client.allocate_io(timeout=0),
        lambda client: client.hyper("ping", timeout=0),
        lambda client: client.request(Attach("c"), timeout=0),
    ]
    for action in actions:
        near, far = socket.socketpair()
        with far, Client(near, timeout=30) as client, pytest.raises(TimedOut):
            action(client)


def test_an_fd_that_does_not_come_in_time() -> None:
    with peer(answers((ALLOCATE_1, IO_BASE))) as near, Client(near, timeout=0.05) as client:
        with pytest.raises(TimedOut, match="fd"):
            client.allocate_io()
        assert is_broken(client)


def test_a_request_that_is_not_taken_in_time() -> None:
    near, far = socket.socketpair()
    with far, Client(near, timeout=0.02) as client:
        with pytest.raises(TimedOut):
            client.hyper("ping", b'"' + b"x" * 1_000_000 + b'"')
        assert is_broken(client)


def test_the_deadline_is_for_all_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the response has come, by the end of it, no time is left for the fd."""
    clock = Clock()
    clock.rule(monkeypatch, deadline)

    def script(far: socket.socket) -> None:
        expect(far, ALLOCATE_1)
        clock.now += 1.0
        far.sendall(IO_BASE)
        expect_end(far)

    with peer(script) as near, Client(near, timeout=1.0) as client:
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            client.allocate_io()
        assert time.monotonic() - begun < 0.5


def test_a_deadline_of_the_client_is_for_everything_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.rule(monkeypatch, deadline)
    with (
        peer(answers((ATTACH, VERSION), (ATTACH, b""))) as near,
        Client(near, timeout=Deadline(5.0)) as client,
    ):
        client.attach("c")
        clock.now += 5.0
        with pytest.raises(TimedOut):
            client.attach("c")


# Connections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [True, False])
def test_it_connects_to_a_path(tmp_sock_dir: Path, as_path: bool) -> None:
    path = tmp_sock_dir / "proxy.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        failures: list[BaseException] = []

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                try:
                    answers((ATTACH, VERSION))(sock)
                except BaseException as error:  # also what a failing assertion raises
                    failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(path if as_path else str(path), timeout=10) as client:
            assert client.attach("c") == 1
            assert not os.get_inheritable(client.fileno())
        thread.join()
        assert not failures


def test_where_it_connects_by_itself() -> None:
    assert DEFAULT_SOCKET == "/run/cc-oci-runtime/proxy.sock"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none.sock", FileNotFoundError),
        ("file", ConnectionRefusedError),
        ("none/proxy.sock", FileNotFoundError),
    ],
)
def test_a_path_where_nobody_listens_is_named(tmp_sock_dir: Path, name: str, error: type[OSError]) -> None:
    (tmp_sock_dir / "file").touch()
    path = str(tmp_sock_dir / name)
    with pytest.raises(error) as caught:
        Client(path)
    assert caught.value.filename == path
    assert path in str(caught.value)


def test_a_server_that_is_not_the_daemon_is_named(tmp_sock_dir: Path) -> None:
    path = str(tmp_sock_dir / "http.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with Client(path, timeout=10) as client:
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")
                with pytest.raises(
                    ProtocolError, match=rf"^{path} is not cc-proxy, or it failed: .*1213486160"
                ):
                    client.attach("c")


def test_a_signal_while_it_waits_to_be_connected(tmp_sock_dir: Path) -> None:
    """connect(2) waits while the backlog is full."""
    path = str(tmp_sock_dir / "proxy.sock")
    accepted: list[socket.socket] = []
    signals: list[int] = []

    def on_signal(signum: int, _frame: object) -> None:
        signals.append(signum)
        if len(signals) == 3:
            accepted.append(server.accept()[0])

    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        before = signal.signal(signal.SIGALRM, on_signal)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            client = Client(path, timeout=10)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        sock, _ = server.accept()
        with client, accepted[0], sock:
            sock.sendall(VERSION)
            assert client.attach("c") == 1


def test_a_signal_leaves_the_deadline_of_connecting(tmp_sock_dir: Path) -> None:
    path = str(tmp_sock_dir / "proxy.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            with pytest.raises(TimedOut, match="connecting"):
                Client(path, timeout=0.1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_a_path_that_is_too_long_is_an_os_error(tmp_sock_dir: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        Client(tmp_sock_dir / ("x" * 200))


def test_the_connection_is_closed_with_the_client() -> None:
    with peer(expect_end) as near:
        client = Client(near)
        assert client.fileno() == near.fileno() >= 0
        with client as same:
            assert same is client
        assert near.fileno() == -1
        client.close()


def test_the_connection_is_closed_on_an_exception_too() -> None:
    with peer(expect_end) as near:
        with pytest.raises(ZeroDivisionError), Client(near):
            _ = 1 / 0
        assert near.fileno() == -1
