"""`cc-proxy`, the command line: which of option, environment and file counts, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cc_proxy
from cc_proxy import settings
from cc_proxy.cli import daemon as cli
from cc_proxy.cli.daemon import build_parser, choose_settings, main
from cc_proxy.log.levels import LEVELS
from cc_proxy.settings import Settings
from cc_proxy.settingsfile import SettingsError
from tests.wire.support import WAIT, wait_until

CHECKOUT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings but those of a test. The test process keeps its own signals."""
    monkeypatch.delenv(cli.LOG_LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(settings, "DEFAULT_FILE", str(tmp_path / "default.toml"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def chosen(*arguments: str) -> Settings:
    return choose_settings(build_parser().parse_args(arguments))


def config(directory: Path, text: str) -> str:
    path = directory / "given.toml"
    path.write_text(text)
    return str(path)


# Which counts ---------------------------------------------------------------------------------------------


def test_without_anything_said_the_defaults_count() -> None:
    assert chosen() == Settings()


@pytest.mark.parametrize(
    ("option", "variable", "file", "level"),
    [
        ((), None, None, "info"),
        ((), None, "warning", "warning"),
        ((), "error", "warning", "error"),
        ((), "error", None, "error"),
        ((), "", "warning", "warning"),
        (("--log-level", "debug"), "error", "warning", "debug"),
        (("--log-level=console",), None, None, "console"),
        (("-v", "1"), "error", "warning", "debug"),
        (("-v2",), "error", None, "io"),
        (("-v", "3"), None, "warning", "console"),
        (("-v", "0"), "debug", "warning", "info"),
        ((), "0", "warning", "info"),
        ((), "1", "warning", "debug"),
        ((), "2", None, "io"),
        ((), "3", None, "console"),
    ],
)
def test_log_level(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: tuple[str, ...],
    variable: str | None,
    file: str | None,
    level: str,
) -> None:
    """The option, then the environment, then the file, then the default."""
    if variable is not None:
        monkeypatch.setenv("CC_PROXY_LOG_LEVEL", variable)
    arguments = list(option)
    if file is not None:
        arguments += ["--config", config(tmp_path, f'[log]\nlevel = "{file}"\nformat = "text"\n')]
    found = chosen(*arguments)
    assert found.log.level == level
    assert found.log.format == ("auto" if file is None else "text"), "the rest stays as the file says"


def test_socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, 'socket_path = "/from/file"\n[vm]\ncommand_timeout = 7\n')
    assert chosen("--config", given).socket_path == "/from/file"
    found = chosen("--config", given, "--socket-path", "/from/option")
    assert found.socket_path == "/from/option"
    assert found.vm.command_timeout == 7
    monkeypatch.chdir(tmp_path)
    assert chosen("--socket-path", "relative/sock").socket_path == str(tmp_path / "relative/sock")


def test_default_file_counts_if_it_is_there_and_no_other_is_given(tmp_path: Path) -> None:
    (tmp_path / "default.toml").write_text("[limits]\nvms = 5\n")
    assert chosen().limits.vms == 5
    assert (
        chosen("--config", config(tmp_path, "[limits]\nconnections = 6\n")).limits.vms
        == Settings().limits.vms
    )


def test_variable_that_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC_PROXY_LOG_LEVEL", "loud")
    with pytest.raises(
        SettingsError,
        match="LOG_LEVEL: expected one of error, warning, info, debug, io, console, 0, 1, 2, 3, got 'loud'",
    ):
        chosen()
    assert chosen("--log-level", "error").log.level == "error", "an option comes before it"


# How it fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[limits]\nvms = 0\n", "limits.vms"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("nonsense = 1\n", "nonsense"),
        ("[vm\n", "not valid TOML"),
        ("socket_path = 'relative'\n", "socket_path"),
    ],
)
def test_file_that_is_not_right_is_one_line_that_names_file_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, key: str
) -> None:
    path = config(tmp_path, text)
    for more in ([], ["--check-config"], ["--socket-path", "/never/made"]):
        assert main(["--config", path, *more]) == 78
        output, error = capsys.readouterr()
        assert output == ""
        assert error.startswith(f"cc-proxy: {path}: ")
        assert key in error
        assert error.count("\n") == 1


def test_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "missing"), "--check-config"]) == 78
    assert (
        capsys.readouterr().err
        == f"cc-proxy: {tmp_path}/missing: cannot be read: No such file or directory\n"
    )


def test_variable_that_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC_PROXY_LOG_LEVEL", "loud\n")
    assert main(["--check-config"]) == 78
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-v", "4"],
        ["-v"],
        ["-v", "x"],
        ["--log-level", "loud"],
        ["-v", "1", "--log-level", "debug"],
        ["--config"],
        ["--nonsense"],
        ["nonsense"],
    ],
)
def test_usage_that_is_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith("usage: cc-proxy")


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made or listened on."""
    path = tmp_path / "never" / "made"
    (file := tmp_path / "settings.toml").touch()
    assert main(["--check-config", "--config", str(file), "--socket-path", str(path)]) == 0
    assert capsys.readouterr() == (f"cc-proxy: {file}: the settings are right\n", "")
    assert not path.parent.exists()


def test_check_config_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check-config"]) == 0
    assert capsys.readouterr() == ("cc-proxy: no file: the defaults\n", "")


def test_check_config_looks_at_the_spool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "settings.toml").write_text('[spool]\ndirectory = "/nonexistent"\n')
    assert main(["--check-config", "--config", str(file)]) == 78
    assert "spool.directory: no file can be made in /nonexistent" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--version"])
    assert status.value.code == 0
    assert capsys.readouterr().out == f"cc-proxy {cc_proxy.__version__}\n"


def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    for name in ("--config", "--socket-path", "--log-level", "-v", "--check-config", "--version", *LEVELS):
        assert name in text
    assert "CC_PROXY_LOG_LEVEL" in text


# As a process ---------------------------------------------------------------------------------------------


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("CC_PROXY_", "LISTEN_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "cc_proxy", *arguments],
        cwd=CHECKOUT,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_closed_standard_streams_become_no_sockets(tmp_path: Path) -> None:
    """What the interpreter says at the worst goes to fd 2, whatever that is."""
    path = tmp_path / "sock"
    command = [sys.executable, "-m", "cc_proxy", "--config", config(tmp_path, ""), "--socket-path", str(path)]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with subprocess.Popen([*closed, *command], cwd=CHECKOUT) as process:
        wait_until(path.exists, "it listens")
        links = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)}
        process.terminate()
        assert process.wait(WAIT) == 0
    assert links == {os.devnull}


def test_bad_file_ends_the_process_with_78(tmp_path: Path) -> None:
    path = config(tmp_path, "[limits]\nvms = 'many'\n")
    ended = run("--config", path, "--socket-path", str(tmp_path / "sock"))
    assert ended.returncode == 78
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"cc-proxy: {path}: limits.vms: ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "sock").exists()


def test_place_that_is_taken_ends_the_process_with_1_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "sock").write_text("precious")
    ended = run(
        "--config", config(tmp_path, "[log]\nformat = 'text'\n"), "--socket-path", str(tmp_path / "sock")
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "there is something that is not a socket; it was left alone" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert (tmp_path / "sock").read_text() == "precious"


def test_path_from_the_command_line_does_not_break_the_log(tmp_path: Path) -> None:
    ended = run(
        "--config",
        config(tmp_path, "[log]\nformat = 'text'\n"),
        "--socket-path",
        f"{tmp_path}/a\n\x1b[31mb" + "c" * 200,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "\x1b" not in ended.stderr


def test_nonsense_from_the_service_manager_ends_the_process_with_78(tmp_path: Path) -> None:
    """A shell, so that the pid is known before the process is there."""
    ended = subprocess.run(
        ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"', "sh", sys.executable, "-m", "cc_proxy"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert ended.returncode == 78
    assert "LISTEN_FDS=2, but cc-proxy takes exactly one socket: leave one ListenStream=" in ended.stderr


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_spool_directory_that_cannot_be_used_ends_the_process_with_78(tmp_path: Path, what: str) -> None:
    spool = tmp_path / "spool"
    if what == "a file":
        spool.write_text("")
    text = f'[log]\nformat = "text"\n[spool]\ndirectory = "{spool}"\n'
    ended = run("--config", config(tmp_path, text), "--socket-path", str(tmp_path / "sock"))
    assert ended.returncode == 78
    assert f"spool.directory: no file can be made in {spool}: " in ended.stderr
    assert "or name another" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "sock").exists()


def test_bad_file_has_its_priority_in_the_journal(tmp_path: Path) -> None:
    """A pipe stands for the journal here; what is read is what it would be sent."""
    near, far = os.pipe()
    status = os.fstat(far)
    with os.fdopen(near) as journal:
        ended = subprocess.run(
            [sys.executable, "-m", "cc_proxy", "--config", config(tmp_path, "nonsense = 1\n")],
            cwd=CHECKOUT,
            env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            stderr=far,
            timeout=WAIT,
            check=False,
        )
        os.close(far)
        (line,) = journal.read().splitlines()
    assert ended.returncode == 78
    assert line.startswith("<3>")
    event = json.loads(line[3:])
    assert event["message"] == "cannot start"
    assert event["error"].endswith("given.toml: unknown setting `nonsense`")


def test_what_was_read_is_what_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has vanished: what it said does not count by chance."""
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "default.toml"
    default.write_text("[limits]\nvms = 5\n")
    options = build_parser().parse_args(["--socket-path", "sock"])
    before = choose_settings(options)
    cli.leave_directory(options)
    assert choose_settings(options) == before
    default.unlink()
    with pytest.raises(SettingsError, match=r"default.toml: cannot be read: No such file"):
        choose_settings(options)


def test_file_that_comes_later_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = build_parser().parse_args([])
    cli.leave_directory(options)
    assert cli.read_again(options) == Settings()
    default = tmp_path / "default.toml"
    default.write_text("[limits]\nvms = 5\n")
    assert cli.read_again(options).limits.vms == 5
    assert options.config == str(default)
    default.unlink()
    with pytest.raises(SettingsError, match=r"default.toml: cannot be read: No such file"):
        cli.read_again(options)


def test_check_config_names_users_and_groups_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The daemon starts, for they may be known later; whoever checks the file wants to hear of it."""
    given = config(tmp_path, '[access]\nusers = ["root", "nobody-has-this"]\ngroups = ["nor-this"]\n')
    assert cli.main(["--check-config", "--config", given]) == 78
    assert "[access]: nobody knows of 'nobody-has-this', 'nor-this'" in capsys.readouterr().err
