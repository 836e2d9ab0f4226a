"""Commands that make only one or two requests: `hello`, `attach`, `hyper` and `bye`."""

import os
import sys
import time

import msgspec

from cc_proxy.api import Hyper, Refused
from cc_proxy.ctl import options
from cc_proxy.ctl.agentlog import AgentLog
from cc_proxy.ctl.connection import connect
from cc_proxy.ctl.errors import Failure, Misuse, says_why
from cc_proxy.ctl.stdio import show

_STDIN = "-"


def hello(asked: options.HelloOptions) -> int:
    """Register a VM."""
    with connect(asked.proxy) as client:
        client.hello(asked.container_id, asked.vm.ctl, asked.vm.io, asked.vm.console)
    return 0


def attach(asked: options.RegisteredOptions) -> int:
    """Check that a VM is registered and answers."""
    with connect(asked.proxy) as client:
        client.attach(asked.container_id)
        before = time.perf_counter()
        client.request(Hyper("ping"))
        elapsed = time.perf_counter() - before
    show(f"{asked.container_id}: the VM answered in {elapsed * 1000:.1f} ms\n")
    return 0


def hyper(asked: options.HyperOptions) -> int:
    """Send a command to an agent, and wait for its acknowledgement."""
    data = None if asked.data is None else _json(asked.data)
    with connect(asked.proxy) as client:
        client.attach(asked.container_id)
        log = AgentLog(asked.container_id)
        try:
            client.request(Hyper(asked.name) if data is None else Hyper(asked.name, msgspec.Raw(data)))
        except Refused as refusal:
            if says_why(refusal) or not (why := log.reason(asked.name)):
                raise
            raise Failure(str(refusal), hint=why) from None
    return 0


def bye(asked: options.RegisteredOptions) -> int:
    """Unregister a VM."""
    with connect(asked.proxy) as client:
        client.bye(asked.container_id)
    return 0


def _json(given: str) -> bytes:
    """Return the JSON text from the command line or stdin, unchanged. Raises `Misuse` if it is not JSON."""
    data = _read_stdin() if given == _STDIN else os.fsencode(given)
    try:
        msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise Misuse(f"this is not JSON: {error}") from None
    return data


def _read_stdin() -> bytes:
    return sys.stdin.buffer.read() if sys.stdin is not None else b""
