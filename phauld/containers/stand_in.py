"""The process that podman's monitor takes for a container while phaul holds its place: phauld's end of it.

See `podman_runtime.py` for what that does. It ends if phauld does before it was told whom to wait for.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

CONNECT_SECONDS: Final = 10.0
_STANDARD_DESCRIPTORS: Final = 3


@contextlib.contextmanager
def listen(directory: Path) -> Iterator[socket.socket]:
    """At DIRECTORY/socket, however long that path is. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.bind(f"/proc/self/fd/{descriptor}/socket")
            (directory / "socket").chmod(0o600)
            server.listen(1)
            yield server
    finally:
        os.close(descriptor)


class StandIn:
    """One that has connected."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self.pid: Final = pid

    @classmethod
    def receive(cls, server: socket.socket) -> tuple[Self, list[int]]:
        """Also its standard descriptors. Raises `OSError`, `TimeoutError`."""
        server.settimeout(CONNECT_SECONDS)
        connection, _ = server.accept()
        try:
            connection.settimeout(CONNECT_SECONDS)
            said, descriptors, _, _ = socket.recv_fds(connection, 4096, _STANDARD_DESCRIPTORS)
        except BaseException:
            connection.close()
            raise
        return cls(connection, int(said)), list(descriptors)

    def attend(self, record: Path) -> None:
        """It waits for the shim of that directory from now on. Raises `OSError`."""
        with self._connection as connection:
            connection.sendall(os.fsencode(record))
            if not connection.recv(1):
                raise ConnectionError("what stands for the container has ended")

    def close(self) -> None:
        """It ends, if it does not attend to a shim."""
        self._connection.close()
