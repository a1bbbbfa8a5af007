"""The connection between the two relays of a post-copy migration: plain TCP, or mutual TLS 1.3 over it.

TLS that the kernel does is as plain as TCP here.

A relay moves bytes between criu's socket and a connection in two steps, so that a failure of either end is known as
such: `take` from criu and `pass_on` to the other node, or `receive` from there and `deliver` to criu. One thread does
each pair. What a connection holds in between goes with it when it is given up. Plain bytes go by splice and are never
copied here.

Run by `relay.py` with the standard library and `phaul_client` alone.
"""

import contextlib
import fcntl
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Protocol

from phaul_client.pacing import set_pace

if TYPE_CHECKING:
    from phaul_client.wire import Wire

CHUNK_BYTES = 1 << 20
PIPE_BYTES = 1 << 20
#: A peer that is silent for so long is taken for lost, and a new connection is asked for.
LINK_TIMEOUT_SECONDS = 8
TCP_USER_TIMEOUT = 18  # linux/tcp.h


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Raises EOFError at an end of file, also in the middle."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


class Connection(Protocol):
    """Raises OSError or EOFError: it is lost, but for `take` and `deliver`, where criu is."""

    sock: socket.socket

    def send(self, data: bytes, *, more: bool = False) -> int:
        """Bytes to the other relay, followed by `more`; how many they were on the network."""

    def receive_exactly(self, size: int) -> bytes:
        """Bytes of the other relay."""

    def take(self, criu: socket.socket, size: int) -> int:
        """Take at most `size` bytes from criu."""

    def pass_on(self, count: int) -> int:
        """Send what was taken; how many bytes that were on the network."""

    def receive(self, size: int) -> int:
        """Take at most `size` bytes from the other relay."""

    def deliver(self, criu: socket.socket, count: int) -> None:
        """Give criu what was received."""


class PlainConnection:
    """TCP as it is."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        read, write = os.pipe()
        self._read, self._write = open(read, "rb", buffering=0), open(write, "wb", buffering=0)  # noqa: SIM115
        with contextlib.suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, data: bytes, *, more: bool = False) -> int:
        self.sock.sendall(data, socket.MSG_MORE if more else 0)
        return len(data)

    def receive_exactly(self, size: int) -> bytes:
        return receive_exactly(self.sock, size)

    def take(self, criu: socket.socket, size: int) -> int:
        return self._fill(criu, size)

    def pass_on(self, count: int) -> int:
        self._empty(self.sock, count)
        return count

    def receive(self, size: int) -> int:
        return self._fill(self.sock, size)

    def deliver(self, criu: socket.socket, count: int) -> None:
        self._empty(criu, count)

    def _fill(self, source: socket.socket, size: int) -> int:
        count = os.splice(source.fileno(), self._write.fileno(), min(size, CHUNK_BYTES))
        if not count:
            raise EOFError
        return count

    def _empty(self, target: socket.socket, size: int) -> None:
        while size:
            size -= os.splice(self._read.fileno(), target.fileno(), size)


class WireConnection:
    """TLS over TCP, or frames with checksums over either."""

    def __init__(self, sock: socket.socket, wire: "Wire") -> None:
        self.sock = sock
        self._wire = wire
        self._buffer = memoryview(bytearray(CHUNK_BYTES))

    def send(self, data: bytes, *, more: bool = False) -> int:
        return self._wire.send([data])

    def receive_exactly(self, size: int) -> bytes:
        data = memoryview(bytearray(size))
        count = 0
        while count < size:
            got = self._wire.receive_into(data[count:])
            if not got:
                raise EOFError
            count += got
        return bytes(data)

    def take(self, criu: socket.socket, size: int) -> int:
        count = criu.recv_into(self._buffer[: min(size, CHUNK_BYTES)])
        if not count:
            raise EOFError
        return count

    def pass_on(self, count: int) -> int:
        return self._wire.send([self._buffer[:count]])

    def receive(self, size: int) -> int:
        count = self._wire.receive_into(self._buffer[: min(size, CHUNK_BYTES)])
        if not count:
            raise EOFError
        return count

    def deliver(self, criu: socket.socket, count: int) -> None:
        criu.sendall(self._buffer[:count])


def connect(
    sock: socket.socket,
    secured: dict[str, object] | None,
    packing: dict[str, object] | None = None,
    *,
    server_side: bool,
) -> Connection:
    """Make a connection of a socket that the other relay has, too; it closes with it.

    `secured` is None, or says `directory` (of our certificates), `name` (the other node's), `revoked` and `kernel`.
    `packing` is None, or says `compression`, and the `paths` of the libraries for it. Raises OSError, and closes the
    socket, if the other end is not that node.
    """
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, TCP_USER_TIMEOUT, LINK_TIMEOUT_SECONDS * 1000),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ):
        with contextlib.suppress(OSError):  # not TCP
            sock.setsockopt(level, option, value)
    sock.setblocking(True)
    if secured is None and packing is None:
        return PlainConnection(sock)
    from pathlib import Path

    from phaul_client.wire import PlainWire, make_tls  # not before it is needed: a relay starts in the freeze

    wire: Wire = PlainWire(sock)
    if secured is not None:
        revoked, kernel = secured["revoked"], bool(secured["kernel"])
        assert isinstance(revoked, list)
        directory, name = Path(str(secured["directory"])), str(secured["name"])
        wire = make_tls(sock, directory, name, revoked, server_side=server_side, kernel=kernel)
    if packing is not None:
        return WireConnection(sock, _packed(wire, packing))
    return PlainConnection(sock) if isinstance(wire, PlainWire) else WireConnection(sock, wire)


def _packed(wire: "Wire", packing: dict[str, object]) -> "Wire":
    paths = packing["paths"]
    assert isinstance(paths, list)
    sys.path += [path for path in paths if path not in sys.path]
    from phaul_client.packed_wire import PackedWire

    return PackedWire(wire, str(packing["compression"]))


class Link:
    """The connection to the other node, replaced whenever phauld brings a new one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connection: Connection | None = None

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    def replace(self, connection: Connection) -> None:
        with self._changed:
            self._shut_down()
            self._connection = connection
            self._changed.notify_all()

    def wait(self) -> Connection:
        with self._changed:
            while self._connection is None:
                self._changed.wait()
            return self._connection

    def limit(self, bytes_per_second: int) -> None:
        """Of this connection; phauld limits the next ones before it hands them over."""
        with self._changed:
            if self._connection is not None:
                set_pace(self._connection.sock, bytes_per_second)

    def is_current(self, connection: Connection) -> bool:
        return self._connection is connection

    def lose(self, connection: Connection | None = None) -> None:
        """This connection failed; with no argument: give up whichever there is."""
        with self._changed:
            if connection is None or self._connection is connection:
                self._shut_down()

    def _shut_down(self) -> None:
        # Not closed here: other threads may be in a system call on it. The last reference closes it.
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
            self._connection = None
