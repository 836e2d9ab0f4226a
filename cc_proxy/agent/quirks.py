"""Ways in which an embedded agent can be made to misbehave."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Quirks:
    """What a VM may do to its host, to test how the host handles it. Each is off by default."""

    #: The guest never comes up: no READY, and nothing that it is sent is ever read.
    never_ready: bool = False
    #: No READY, but commands work, as for a host that connects to a VM that is up already.
    skip_ready: bool = False
    #: Seconds from the start until the guest is up.
    ready_delay: float = 0.0
    #: Frames on a seq that no process owns are not answered.
    no_echo: bool = False
    #: This many of the first such answers are left out.
    drop_echoes: int = 0
    #: An asynchronous event (23) goes before each answer, and FINISHPOD (13) when the last container is gone.
    async_events: bool = False
    #: A `newcontainer` whose binary is missing ends the agent, as it does the real one.
    panic_on_missing_binary: bool = False


NO_QUIRKS = Quirks()
