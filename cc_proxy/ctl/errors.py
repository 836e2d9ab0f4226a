"""How a command fails: with a line on stderr and an exit status."""

import sys
from contextlib import suppress

from cc_proxy.api import ProxyError, Refused, TimedOut
from cc_proxy.hyperstart.control import MAX_COMMAND

#: The proxy or the VM failed.
STATUS_FAILED = 125
#: The command line makes no sense.
STATUS_MISUSE = 2
#: The agent refused to start the command.
STATUS_NOT_STARTED = 127
#: Added to the number of the signal that ended a command, as in shells.
STATUS_SIGNALLED = 128

#: The daemon's text contains this if the agent itself refused (docs/protocol.md, hyper).
_FROM_AGENT = "received from Hyperstart"

#: The names of a VM's sockets in the daemon's texts, and the options that give them.
_OPTIONS = {"ctlSerial": "--ctl", "ioSerial": "--io"}

#: What to do about errors whose text does not say it. The keys are parts of the daemon's texts.
_NEXT_STEPS = {
    "unknown containerID": "`cc-proxyctl status` lists the VMs that you may use, and those that failed",
    "container already registered": "choose another id, or free this one: `cc-proxyctl bye ID`",
    "message too long": f"a command for the agent has {MAX_COMMAND} bytes at most: shorten its arguments, "
    "its environment, its id or its data",
    "unknown command": "`cc-proxyctl hyper --help` lists the commands",
    "VM gone": "`cc-proxyctl bye ID` frees the id",
}
_NOT_SAID = "the agent does not say why; the VM's console may"
_TAKES_LONG = "--timeout gives it longer; `cc-proxyctl status` shows what it waits for"


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
    """A signal ends the command, without a message. SIGPIPE means that nobody reads the output."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.status = STATUS_SIGNALLED + signum


def says_why(refusal: Refused) -> bool:
    """Whether a refusal gives a reason. One by an agent may not: hyperstart never gives any."""
    return not refusal.text.endswith(_FROM_AGENT)


def is_from_agent(refusal: Refused) -> bool:
    """Whether it was the agent that refused, rather than the proxy."""
    return _FROM_AGENT in refusal.text


def explain(error: Exception) -> str:
    """Return what went wrong in a few words, and what to do about it if that is known."""
    return with_hint(_text(error), _hint(error))


def _text(error: Exception) -> str:
    if isinstance(error, Refused):
        member, _, rest = error.text.partition(": ")
        return f"{_OPTIONS[member]} ({member}): {rest}" if member in _OPTIONS else error.text
    if isinstance(error, ConnectionError):
        return f"the connection to cc-proxy was lost: {reason(error)}"
    if isinstance(error, OSError) and not isinstance(error, ProxyError) and error.filename is not None:
        return f"{error.filename}: {reason(error)}"
    return reason(error)


def _hint(error: Exception) -> str:
    if isinstance(error, Failure):
        return error.hint
    if isinstance(error, Refused):
        return _next_step(error)
    return _TAKES_LONG if isinstance(error, TimedOut) else ""


def _next_step(refusal: Refused) -> str:
    """Return what to do about a refusal; empty if the daemon's text says enough."""
    if not says_why(refusal):
        return _NOT_SAID
    return next((step for part, step in _NEXT_STEPS.items() if part in refusal.text), "")


def with_hint(text: str, hint: str) -> str:
    """Return `text`, followed by `hint` if there is one."""
    return f"{text} ({hint})" if hint else text


def reason(error: Exception) -> str:
    """Return what the system or the proxy says about an error, without what Python adds to it."""
    strerror = error.strerror if isinstance(error, OSError) else None
    # str() is no use: if an OSError has a file name but no number, it shows both as None.
    return strerror or " ".join(map(str, error.args))


def say(text: str) -> None:
    """Print `text` on stderr as one printable line, whatever it contains: a VM may have chosen some of it."""
    if sys.stderr is None:
        return  # closed from the start; print() would write to stdout instead
    line = "".join(char if char.isprintable() else " " for char in text)
    with suppress(OSError):  # if nobody reads it, the exit status still reports the failure
        print(f"cc-proxyctl: {line}", file=sys.stderr, flush=True)
