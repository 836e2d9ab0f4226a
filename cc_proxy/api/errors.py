"""The exceptions of the public API.

Errors of the operating system (no such socket, connection refused, out of file descriptors) are not wrapped:
they reach the caller as `OSError`.
"""


class ProxyError(Exception):
    """The base of all exceptions of this API's own."""


class Refused(ProxyError):
    """The daemon answered a request with `"success":false`.

    `text` is the daemon's error text (docs/protocol.md, 1). The connection stays usable, unless the daemon
    has closed it too.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class ProtocolError(ProxyError):
    """The peer sent something that the protocol does not allow, or closed the connection within a message.

    The connection is no longer usable: close it.
    """


class TimedOut(ProxyError, TimeoutError):
    """The deadline passed before the whole message was sent or received.

    A part of it may have been. The connection is no longer usable: close it.
    """
