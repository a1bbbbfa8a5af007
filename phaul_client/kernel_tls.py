"""TLS whose records the kernel makes and reads (kTLS): after the handshake the socket itself carries clear bytes.

So criu's own page stream can travel under TLS with nothing between criu and the network, and a relay can splice. It
takes a kernel with CONFIG_TLS (the module `tls`, Linux 5.1 for TLS 1.3) and an OpenSSL that hands over both directions
(3.2, built with enable-ktls). Whether this machine can is tried, not read somewhere: `works`.

Only the standard library is imported, as in `wire.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PROBE_SECONDS: Final = 5.0
_OP_ENABLE_KTLS: Final = 1 << 3  # openssl/ssl.h, SSL_OP_ENABLE_KTLS; Python names it since 3.12
_TCP_ULP: Final = 31  # linux/tcp.h
_SOL_TLS: Final = 282  # linux/socket.h
_DIRECTIONS: Final = (1, 2)  # linux/tls.h, TLS_TX and TLS_RX
_CRYPTO_INFO_BYTES: Final = 4  # linux/tls.h, struct tls_crypto_info

Buffer = bytes | bytearray | memoryview


class WireError(OSError):
    """The other end cannot be talked to: who it is, or what it sends, is not what it should be."""


class KernelHandshake:
    """A handshake over a connected socket, which stays the caller's; `with` it. Afterwards the kernel has the keys."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        context.options |= _OP_ENABLE_KTLS
        with contextlib.suppress(OSError):  # not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.session = context.wrap_socket(sock.dup(), server_side=server_side, do_handshake_on_connect=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.session.close()  # of a copy: nothing is sent

    def handshake(self, timeout_seconds: float) -> None:
        """Raises `WireError`: who is there is not of our CA, or does not speak TLS."""
        self.session.settimeout(timeout_seconds)
        try:
            self.session.do_handshake()
        except ssl.SSLError as exc:
            raise WireError(f"TLS: {exc.reason or exc}") from exc
        except TimeoutError as exc:
            raise WireError("TLS: the other end does not go on with the handshake") from exc

    def send(self, pieces: Sequence[Buffer]) -> int:
        """All of them. Raises `OSError`."""
        for piece in pieces:
            self.session.sendall(piece)
        return sum(len(piece) for piece in pieces)

    def receive_into(self, buffer: memoryview) -> int:
        """At least one byte; 0 at the end. Raises `OSError`."""
        return self.session.recv_into(buffer)

    def check_taken(self) -> None:
        """Raises `WireError`: the kernel has not both directions, and the socket is of no use."""
        if not is_in_kernel(self._socket):
            raise WireError("TLS: the kernel did not take it over, though it could when phauld started")


def is_in_kernel(sock: socket.socket) -> bool:
    """Whether the kernel makes and reads the records of both directions."""
    try:
        for direction in _DIRECTIONS:
            sock.getsockopt(_SOL_TLS, direction, _CRYPTO_INFO_BYTES)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What the trial found."""

    works: bool
    why: str = ""  #: it does not, in a few words
    is_certain: bool = True  #: another trial would find the same


NOT_TRIED: Final = Taken(works=False, why="it was not tried")


def works(directory: Path) -> bool:
    """Whether this kernel and this OpenSSL do it."""
    return try_it(directory).works


def try_it(directory: Path, seconds: float = PROBE_SECONDS) -> Taken:
    """Whether this kernel and this OpenSSL do it, by a connection of this process to itself with `node.crt`."""
    try:
        return _try(directory, seconds)
    except TimeoutError:
        return Taken(works=False, why=f"it did not answer within {seconds:g} s", is_certain=False)
    except WireError as exc:
        return Taken(works=False, why=str(exc), is_certain=not isinstance(exc.__cause__, TimeoutError))
    except OSError as exc:  # ssl's errors, too
        return Taken(works=False, why=str(exc))


def _try(directory: Path, seconds: float) -> Taken:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE  # nobody else is there
    server.num_tickets = 0
    with contextlib.ExitStack() as stack:
        server.load_cert_chain(directory / "node.crt", directory / "node.key")
        server.minimum_version = client.minimum_version = ssl.TLSVersion.TLSv1_3
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname(), seconds))
        far = stack.enter_context(listener.accept()[0])
        if not _kernel_has_tls():
            return Taken(works=False, why="this kernel has no TLS (no module `tls`)")
        there = stack.enter_context(KernelHandshake(far, server, server_side=True))
        here = stack.enter_context(KernelHandshake(near, client, server_side=False))
        thread = threading.Thread(target=_shake, args=(there, seconds), daemon=True)
        thread.start()
        here.handshake(seconds)
        thread.join()
        for sock in (near, far):
            sock.settimeout(seconds)
        sent = os.urandom(1000)
        near.sendall(sent)
        if not (is_in_kernel(near) and is_in_kernel(far)):
            return Taken(works=False, why=f"{ssl.OPENSSL_VERSION} does not hand it to the kernel")
        if far.recv(len(sent), socket.MSG_WAITALL) != sent:
            return Taken(works=False, why="bytes did not come through as they were sent")
        return Taken(works=True)


def _kernel_has_tls() -> bool:
    """Asked of a connection of its own, which then has it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except OSError:
            return False
        return True


def _shake(handshake: KernelHandshake, seconds: float) -> None:
    with contextlib.suppress(OSError):
        handshake.handshake(seconds)
