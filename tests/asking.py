"""Clients that never stop asking, while things are done to the daemon that serves them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cc_proxy.api import Client, ProxyError

_CLIENTS = 4


@contextmanager
def asking(socket_path: Path) -> Iterator[None]:
    """Have clients connect, ask and come again, whatever they are told, until the block ends."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with suppress(OSError, ProxyError), Client(socket_path, timeout=1) as client:
                client.attach("nobody")

    with ThreadPoolExecutor(_CLIENTS) as pool:
        for _ in range(_CLIENTS):
            pool.submit(ask)
        try:
            yield
        finally:
            over.set()
