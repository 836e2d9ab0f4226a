"""What is wrong with an installation stops the start with an error that names it."""

from __future__ import annotations

import re

import pytest

from tests.asking import asking
from tests.systemd.box import CHECKOUT
from tests.systemd.service import SERVICE, SOCKET, Service

EX_CONFIG = "78"

WRONG_SOCKETS = {
    "ListenDatagram=/run/cc-oci-runtime/proxy.sock": "it is for datagrams or packets",
    "ListenSequentialPacket=/run/cc-oci-runtime/proxy.sock": "it is for datagrams or packets",
    "ListenStream=127.0.0.1:1024": "it is a network socket",
    "ListenFIFO=/run/cc-oci-runtime/proxy.sock": "is none",
    "ListenStream=/run/cc-oci-runtime/a\nListenStream=/run/cc-oci-runtime/b": "takes exactly one socket",
}


@pytest.mark.parametrize("listen", WRONG_SOCKETS)
def test_a_socket_unit_with_other_sockets_is_refused(service: Service, listen: str) -> None:
    service.drop_in(f"[Socket]\nListenStream=\n{listen}\n", SOCKET)
    service.start(SOCKET)
    assert service.fails_to_start(SERVICE)
    assert WRONG_SOCKETS[listen] in service.wait_for_log("cannot start")["MESSAGE"]
    assert service.show("ExecMainStatus") == EX_CONFIG


def test_broken_settings_stop_the_start_with_one_line_and_for_good(service: Service) -> None:
    service.configure("[vm]\nready_timeout = 'soon'\n")
    assert service.fails_to_start(SERVICE)
    (entry,) = service.logged()
    assert entry["PRIORITY"] == "3"
    assert "/etc/cc-proxy/cc-proxy.toml: vm.ready_timeout: expected a number" in entry["MESSAGE"]
    assert service.show("ExecMainStatus") == EX_CONFIG
    assert service.show("NRestarts") == "0"


def test_a_missing_spool_directory_stops_the_start(service: Service) -> None:
    service.configure('[spool]\ndirectory = "/var/tmp/spool"\n')
    assert service.fails_to_start(SERVICE)
    assert (
        "spool.directory: no file can be made in /var/tmp/spool"
        in service.wait_for_log("cannot start")["MESSAGE"]
    )
    assert service.show("ExecMainStatus") == EX_CONFIG
    assert service.show("NRestarts") == "0"


def test_clients_are_refused_rather_than_left_waiting_for_a_daemon_that_cannot_start(
    service: Service,
) -> None:
    service.configure("[nonsense]\n")
    service.start(SOCKET)
    with service.client() as client:
        service.wait_for_log("Failed with result 'service-start-limit-hit'")
        with pytest.raises(ConnectionError):
            client.attach("nobody")
    with pytest.raises(OSError, match=r"refused|No such file"):
        service.client()
    assert len(service.logged()) == 20


def test_what_the_readme_says_of_the_start_limit_helps_although_clients_never_stop_asking(
    service: Service,
) -> None:
    readme = (CHECKOUT / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| `start-limit-hit`"))
    remedy = "; ".join(re.findall(r"`(systemctl .+?)`", row))
    for _ in range(2):
        service.stop(SERVICE)
        service.configure("[nonsense]\n")
        service.start(SOCKET)
        with asking(service.socket_file):
            service.wait_for("Result", "service-start-limit-hit", SOCKET)
            service.configure("")
            service.box.run("sh", "-ec", remedy)
            assert service.is_whole()


def test_a_missing_user_is_named_and_what_the_readme_says_of_it_helps(service: Service) -> None:
    service.box.run("userdel", "cc-proxy")
    assert service.fails_to_start(SOCKET)
    assert service.wait_for_log("status=216/GROUP")
    assert service.fails_to_start(SERVICE)
    readme = (CHECKOUT / "README.md").read_text()
    advice = next(line for line in readme.splitlines() if "status=217/USER" in line)
    for command in re.findall(r"`(systemd-.+?)`", advice):
        service.box.run(*command.split())
    service.start(SERVICE)


def test_a_missing_group_is_named(service: Service) -> None:
    service.drop_in("[Socket]\nSocketGroup=no-such-group\n", SOCKET)
    assert service.fails_to_start(SOCKET)
    assert service.wait_for_log("no-such-group")
