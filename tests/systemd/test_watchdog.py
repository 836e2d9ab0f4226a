"""A daemon that hangs under a real systemd is ended and started again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.systemd.service import SERVICE, Service, vm

# Short, and no core file of each daemon that is aborted.
QUICK = "[Service]\nWatchdogSec=1s\nLimitCORE=0\n"

# The pump of a VM hangs as soon as a client wants a session.
HANGS = """
import sys, threading
from cc_proxy.cli.daemon import main
from cc_proxy.proxy.streams.channel import Channel
Channel.add = lambda channel, session: threading.Event().wait()
sys.exit(main([]))
"""


def test_a_stopped_daemon_is_replaced(service: Service) -> None:
    service.drop_in(QUICK)
    service.start(SERVICE)
    service.wait_for_log('"ready"')  # which a thread writes that may not have come to it
    service.kill("STOP")
    service.wait_for_log("Watchdog timeout")
    service.wait_for_log('"ready"', times=2)
    assert service.show("NRestarts") == "1"


@contextmanager
def hanging(service: Service, restart: str = "") -> Iterator[None]:
    """A daemon with a pump that is stuck, once the service manager has noticed."""
    service.box.write("/usr/local/lib/hangs.py", HANGS)
    service.drop_in(f"{QUICK}{restart}ExecStart=\nExecStart={sys.executable} /usr/local/lib/hangs.py\n")
    service.start(SERVICE)
    with vm(service.box, "/run/vm", "games") as (ctl, io), service.client() as client:
        client.hello("vm", ctl, io)
        os.close(client.allocate_io().fd)
        service.wait_for_log("Watchdog timeout")
        yield


def test_a_daemon_with_a_stuck_thread_says_which_and_is_replaced(service: Service) -> None:
    with hanging(service):
        service.wait_for_log('"ready"', times=2)
    assert service.wait_for_log("stuck: the watchdog is not served")["PRIORITY"] == "3"
    assert service.wait_for_log("pump vm")


def test_a_daemon_with_a_stuck_thread_goes_on_saying_how_many_it_has(service: Service) -> None:
    with hanging(service, "Restart=no\n"):
        pass
    service.wait_for("Result", "watchdog")
    assert service.show("StatusText").startswith("1 VM, ")
