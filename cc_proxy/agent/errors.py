"""The agent's errors."""


class CommandRefused(Exception):
    """A command is answered with ERROR. The text is for the log: on the wire, ERROR is empty."""


class MissingBinary(CommandRefused):
    """There is no such program."""


class Panic(Exception):
    """The real agent would end here, and its VM with it: the host sees end of file, all processes die."""


class CannotListen(Exception):
    """The agent cannot have a socket or port; the text names it and the reason."""
