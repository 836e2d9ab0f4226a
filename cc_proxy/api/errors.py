"""What can go wrong between a client and the proxy, as one small family of exceptions.

Errors of the operating system (no such socket, connection refused, out of file descriptors) are not
wrapped: they reach the caller as the `OSError` they are.
"""


class ProxyError(Exception):
    """Anything this API raises by itself."""


class Refused(ProxyError):
    """The daemon answered a request with `"success":false`.

    `text` is the daemon's own error text (docs/protocol.md, 1). The connection stays usable.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class ProtocolError(ProxyError):
    """The peer sent what the protocol does not allow, or closed the connection in the middle of it.

    Nothing more can be read from the connection: close it.
    """


class TimedOut(ProxyError, TimeoutError):
    """The deadline passed before the message was through.

    Part of it may have been: close the connection.
    """
