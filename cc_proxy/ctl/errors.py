"""How a command fails: a line on stderr and an exit status."""

import sys
from contextlib import suppress

from cc_proxy.api import ProxyError, Refused
from cc_proxy.hyperstart.control import MAX_COMMAND

#: The proxy or the VM failed.
STATUS_FAILED = 125
#: The command line makes no sense.
STATUS_MISUSE = 2
#: The agent refused to start the command.
STATUS_NOT_STARTED = 127
#: Added to the number of the signal that ended a command, as shells do.
STATUS_SIGNALLED = 128

#: The daemon's mark of what the agent itself refused (docs/protocol.md, hyper).
_FROM_AGENT = "received from Hyperstart"


#: The daemon's names of a VM's sockets, and the options for them.
_OPTIONS = {"ctlSerial": "--ctl", "ioSerial": "--io"}

#: What to do about errors whose text does not say so, by the beginning of the daemon's text.
_NEXT_STEPS = {
    "unknown containerID": "`cc-proxyctl status` lists the VMs that you may use, and those that failed",
    "message too long": f"a command for the agent has {MAX_COMMAND} bytes at most: shorten its arguments, "
    "its environment, its id or its data",
}


class Failure(Exception):
    """Ends the command with a line of text and an exit status. `hint` says what to do about it."""

    def __init__(self, text: str, status: int = STATUS_FAILED, hint: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.hint = hint


class Misuse(Failure):
    """The command line makes no sense."""

    def __init__(self, text: str) -> None:
        super().__init__(text, STATUS_MISUSE)


class Interrupted(Exception):
    """A signal ends the command, without a message. SIGPIPE stands for an output that nobody reads."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.status = STATUS_SIGNALLED + signum


def says_why(refusal: Refused) -> bool:
    """Whether an agent that refused gave a reason. hyperstart never does."""
    return not refusal.text.endswith(_FROM_AGENT)


def is_from_agent(refusal: Refused) -> bool:
    """Whether the agent refused, and not the proxy."""
    return _FROM_AGENT in refusal.text


def explain(error: Exception) -> str:
    """Return in a few words what went wrong."""
    if isinstance(error, Failure):
        return with_hint(str(error), error.hint)
    if isinstance(error, Refused):
        member, _, rest = error.text.partition(": ")
        if member in _OPTIONS:
            return f"{_OPTIONS[member]} ({member}): {rest}"
        hints = (hint for beginning, hint in _NEXT_STEPS.items() if error.text.startswith(beginning))
        return with_hint(error.text, next(hints, ""))
    if isinstance(error, ConnectionError):
        return f"the connection to cc-proxy was lost: {reason(error)}"
    if isinstance(error, OSError) and not isinstance(error, ProxyError) and error.filename is not None:
        return f"{error.filename}: {reason(error)}"
    return reason(error)


def with_hint(text: str, hint: str) -> str:
    """Return a text followed by what to do, if anything."""
    return f"{text} ({hint})" if hint else text


def reason(error: Exception) -> str:
    """Return what the system or the proxy says about an error, without Python's own additions."""
    strerror = error.strerror if isinstance(error, OSError) else None
    # str() of an OSError with a file name but no number is full of None.
    return strerror or " ".join(map(str, error.args))


def say(text: str) -> None:
    """Print one line on stderr, whatever `text` contains: a VM may have chosen some of it."""
    if sys.stderr is None:
        return  # closed from the start; print() would write to stdout instead
    line = "".join(char if char.isprintable() else " " for char in text)
    with suppress(OSError):  # if nobody reads it, the exit status still tells
        print(f"cc-proxyctl: {line}", file=sys.stderr, flush=True)
