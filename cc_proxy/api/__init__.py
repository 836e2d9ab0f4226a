"""The public API: a program imports this to be a client of cc-proxy.

    from cc_proxy.api import Client

    with Client(timeout=30) as client:
        client.attach("my-container")
        io_base, fd = client.allocate_io(2)

Most programs need only `Client`, and `encode_frame` and `FrameParser` for the fd that `allocate_io` returns,
which carries frames. A program with a socket of its own can send and receive single messages and fds with
`read_message`, `write_message`, `read_fd` and `write_fd`; the payload classes are what messages contain.
"""

from cc_proxy.api.client import AllocatedIo, Client
from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import ProtocolError, ProxyError, Refused, TimedOut
from cc_proxy.api.fdpassing import read_fd, write_fd
from cc_proxy.api.frames import Frame, FrameParser, encode_frame
from cc_proxy.api.payloads import (
    AllocateIo,
    AllocateIoResult,
    Attach,
    Bye,
    GetStatus,
    Hello,
    Hyper,
    LogLevelChange,
    Payload,
    Request,
    Response,
    SetLogLevel,
    Version,
)
from cc_proxy.api.status import (
    EndedVm,
    LastError,
    Replaced,
    Status,
    Streams,
    Traffic,
    UserStatus,
    VmStatus,
    WaitingCommand,
    WaitingStream,
)
from cc_proxy.api.transport import DEFAULT_SOCKET, read_message, write_message

__all__ = [
    "DEFAULT_SOCKET",
    "AllocateIo",
    "AllocateIoResult",
    "AllocatedIo",
    "Attach",
    "Bye",
    "Client",
    "Deadline",
    "EndedVm",
    "Frame",
    "FrameParser",
    "GetStatus",
    "Hello",
    "Hyper",
    "LastError",
    "LogLevelChange",
    "Payload",
    "ProtocolError",
    "ProxyError",
    "Refused",
    "Replaced",
    "Request",
    "Response",
    "SetLogLevel",
    "Status",
    "Streams",
    "TimedOut",
    "Traffic",
    "UserStatus",
    "Version",
    "VmStatus",
    "WaitingCommand",
    "WaitingStream",
    "encode_frame",
    "read_fd",
    "read_message",
    "write_fd",
    "write_message",
]
