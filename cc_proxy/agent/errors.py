"""What can go wrong in the agent."""


class CommandRefused(Exception):
    """A command that is answered with ERROR. The text is for the log: on the wire ERROR is empty."""


class MissingBinary(CommandRefused):
    """There is no such program."""


class Panic(Exception):
    """What would end the real agent, and its VM with it: both sockets see end of file, all processes die."""


class CannotListen(Exception):
    """A socket cannot be put where it was asked for; the text names the path and the reason."""
