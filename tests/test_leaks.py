"""The leak check catches what it is there for, and nothing else."""

from __future__ import annotations

import socket
import textwrap
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CHECKOUT = Path(__file__).parent.parent


def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, body: str) -> pytest.RunResult:
    """Runs one test with that body in a process of its own, with the leak check and nothing else of ours."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    pytester.makepyfile(
        "import os, socket, subprocess, threading, time\nkept = []\ndef test_it(capfd):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return pytester.runpytest_subprocess("-p", "tests.leaks")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param("kept.append(socket.socket())", r"*leaked fd * -> socket:[[]*", id="socket"),
        pytest.param("os.open('/etc/passwd', os.O_RDONLY)", "*leaked fd * -> /etc/passwd", id="file"),
        pytest.param("os.pipe()", "*leaked fd * -> pipe:*, fd * -> pipe:*", id="pipe"),
        pytest.param("os.dup(2)", "*leaked fd *", id="dup"),
        pytest.param(
            "threading.Thread(target=threading.Event().wait, name='forgotten', daemon=True).start()",
            "*leaked thread forgotten",
            id="thread",
        ),
        pytest.param(
            # It ends when the run does: that closes the pipe.
            "kept.append(subprocess.Popen(['cat', '-'], stdin=subprocess.PIPE))",
            "*leaked fd * -> pipe:*, child process *: cat -",
            id="running child",
        ),
        pytest.param(
            """
            pid = os.posix_spawn('/bin/true', ['true'], {})
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            """,
            "*leaked child process *: (true), ended and never waited for",
            id="zombie",
        ),
    ],
)
def test_a_leak_fails_the_test_and_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    pytester.makeconftest("import tests.leaks\ntests.leaks.GRACE = 0.1")
    result = run(pytester, monkeypatch, body)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(message)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("kept.append(open('/dev/urandom', 'rb'))", id="kept open by libraries"),
        pytest.param("threading.Timer(0.2, lambda: None).start()", id="thread about to end"),
        pytest.param(
            """
            fd = os.open('/etc/passwd', os.O_RDONLY)
            threading.Timer(0.2, os.close, [fd]).start()
            """,
            id="fd about to be closed",
        ),
        pytest.param("subprocess.run(['true'], check=True, capture_output=True)", id="all given back"),
    ],
)
def test_what_is_given_back_passes(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    run(pytester, monkeypatch, body).assert_outcomes(passed=1)


def test_fixtures_of_a_wider_scope_may_hold_things(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest(
        """
        import socket, pytest

        @pytest.fixture(scope="module", autouse=True)
        def server():
            with socket.socket() as server:
                yield server
        """
    )
    run(pytester, monkeypatch, "pass").assert_outcomes(passed=1)


def test_every_test_is_checked(request: pytest.FixtureRequest) -> None:
    assert "no_leaks" in request.fixturenames


def test_a_socket_path_fits(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / ("x" * 60)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    assert path.is_socket()
