"""The yardstick: a plain relay between a client and a VM.

It knows nothing of frames, streams or limits: for each connection and direction, one thread reads up to
64 KiB and writes them. A proxy in Python, which must also find out whose bytes they are, cannot be expected
to be faster with the same reads and writes.
"""

import contextlib
import socket
import sys
import threading

_READ_SIZE = 64 * 1024
_PATH_SIZE = 128


def destination(path: str) -> bytes:
    """Return what a client sends first: the path of the socket to which the relay connects it."""
    return path.encode().ljust(_PATH_SIZE, b"\0")


def main(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            client, _ = listener.accept()
            wanted = client.recv(_PATH_SIZE, socket.MSG_WAITALL)
            if len(wanted) < _PATH_SIZE:
                client.close()
                continue
            vm = socket.socket(socket.AF_UNIX)
            vm.connect(wanted.rstrip(b"\0").decode())
            for source, sink in ((client, vm), (vm, client)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    buffer = bytearray(_READ_SIZE)
    view = memoryview(buffer)
    # If a peer hangs up while bytes are on their way to it, that is an end, too.
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            sink.sendall(view[:size])
    # The socket itself is closed when the thread of the other direction no longer refers to it either.
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main(sys.argv[1])
