"""A connection to the other node's data port as bytes in and out: plain TCP, or mutual TLS 1.3 over it.

Blocking, for processes that do nothing else than carry pages; one thread may send while another receives. Only the
standard library is imported, so that such a process starts quickly. The invariant: nothing is held back. What `send`
took is on its way when it returns, and `receive_into` returns as soon as there is one byte.

TLS is done in memory (MemoryBIO): two threads may then use one session under a lock that nobody holds while waiting
for the network; or by the kernel (`kernel_tls.py`), for which it is a plain connection afterwards. A peer is the node
that its certificate names, as in gRPC (`phauld/access.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, Protocol

from phaul_client.kernel_tls import Buffer, KernelHandshake
from phaul_client.kernel_tls import WireError as WireError

URI_PREFIX: Final = "phaul://node/"
HANDSHAKE_SECONDS: Final = 10.0
#: What is encrypted at once: while these bytes travel, the next are encrypted here and these decrypted there.
CHUNK_BYTES: Final = 1 << 18
_IOV_MAX: Final = 1024
_WELCOME: Final = b"\0"
_UNKNOWN: Final = b"\1"


class Wire(Protocol):
    """Bytes to the other node and back."""

    def send(self, pieces: Sequence[Buffer]) -> int:
        """Send all of them, in this order; how many bytes that took on the network. Raises `OSError`."""

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for at least one byte, and take at most what fits; 0: the other end has closed it. Raises `OSError`."""

    def close(self) -> None:
        """End it at once, also under a thread that waits in it; its methods raise `OSError` then. Repeatable."""


class PlainWire:
    """TCP as it is. The socket belongs to the wire, and is made blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        with contextlib.suppress(OSError):  # not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock

    def send(self, pieces: Sequence[Buffer]) -> int:
        left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        total = 0
        while left:
            sent = self._socket.sendmsg(left[:_IOV_MAX])
            total += sent
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]
        return total

    def receive_into(self, buffer: memoryview) -> int:
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        _shut_down(self._socket)


class TlsWire:
    """TLS over a connected socket, which belongs to the wire. Made by `make_tls`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        with contextlib.suppress(OSError):  # not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._state = threading.Lock()  # of the session; never held while waiting
        self._sending = threading.Lock()  # records leave in the order in which they were made; taken before _state
        self._encrypted = bytearray(CHUNK_BYTES)

    def handshake(self, timeout_seconds: float) -> None:
        """Raises `WireError`: who is there is not of our CA, or does not speak TLS."""
        self._socket.settimeout(timeout_seconds)
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    self._flush()
                    self._receive()
                else:
                    break
            self._flush()
        except ssl.SSLError as exc:
            with contextlib.suppress(OSError):
                self._flush()  # the alert, which tells the other end why
            raise WireError(f"TLS: {exc.reason or exc}") from exc
        except TimeoutError as exc:
            raise WireError("TLS: the other end does not go on with the handshake") from exc
        finally:
            self._socket.settimeout(None)

    @property
    def session(self) -> ssl.SSLObject:
        return self._tls

    def send(self, pieces: Sequence[Buffer]) -> int:
        total = 0
        with self._sending:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while len(view):
                    with self._state:
                        view = view[self._tls.write(view[:CHUNK_BYTES]) :]
                        encrypted = self._outgoing.read() if self._outgoing.pending >= CHUNK_BYTES else b""
                    if encrypted:
                        self._socket.sendall(encrypted)
                    total += len(encrypted)
            with self._state:
                encrypted = self._outgoing.read()
            self._socket.sendall(encrypted)
        return total + len(encrypted)

    def receive_into(self, buffer: memoryview) -> int:
        count = 0
        while True:
            try:
                with self._state:
                    while count < len(buffer):
                        got = self._tls.read(len(buffer) - count, buffer[count:])
                        if not got:
                            return count
                        count += int(got)  # one record at a time
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return count
            except ssl.SSLError as exc:
                raise WireError(f"TLS: {exc.reason or exc}") from exc
            if self._outgoing.pending:  # an answer of TLS's own, as to an update of keys
                self._flush()
            if count:
                return count
            self._receive()

    def close(self) -> None:
        _shut_down(self._socket)

    def _receive(self) -> None:
        got = self._socket.recv_into(self._encrypted)
        if not got:
            raise WireError("the connection ended without TLS's good-bye")
        with self._state:
            self._incoming.write(memoryview(self._encrypted)[:got])

    def _flush(self) -> None:
        with self._sending:
            with self._state:
                encrypted = self._outgoing.read()
            if encrypted:
                self._socket.sendall(encrypted)


def make_tls(
    sock: socket.socket,
    directory: Path,
    name: str,
    revoked: Collection[str] = (),
    *,
    server_side: bool,
    kernel: bool = False,
) -> Wire:
    """Mutual TLS over a connected socket, with the certificates in `directory`, with the node `name` and nobody else.

    `kernel`: its records are made and read by the kernel, which must be able to (`kernel_tls.works`); the socket then
    carries what it is given under TLS, and a `PlainWire` of it comes back. The two ends may differ in this.

    The server says a byte when it knows the client: in TLS 1.3 a handshake may end well for a client that is refused.
    Raises `WireError`, `OSError`; the socket is closed then.
    """
    try:
        context = tls_context(directory, server_side=server_side)
        if kernel:
            with KernelHandshake(sock, context, server_side=server_side) as shaking:
                _meet(shaking, sock, name, revoked, server_side=server_side)
                shaking.check_taken()
            return PlainWire(sock)
        wire = TlsWire(sock, context, server_side=server_side)
        _meet(wire, sock, name, revoked, server_side=server_side)
    except BaseException:
        sock.close()
        raise
    return wire


def _meet(
    wire: TlsWire | KernelHandshake, sock: socket.socket, name: str, revoked: Collection[str], *, server_side: bool
) -> None:
    """Each learns who the other is, and the client that it is welcome. Raises `WireError`, `OSError`."""
    try:
        wire.handshake(HANDSHAKE_SECONDS)
        sock.settimeout(HANDSHAKE_SECONDS)
        if server_side:
            _greet(wire, name, revoked)
        else:
            check_peer(wire.session, name, revoked)
            answer = bytearray(1)
            if not wire.receive_into(memoryview(answer)) or bytes(answer) != _WELCOME:
                raise WireError("TLS: the other end does not take this node for the one that it expects")
    except ssl.SSLError as exc:
        raise WireError(f"TLS: {exc.reason or exc}") from exc
    sock.settimeout(None)


def _greet(wire: TlsWire | KernelHandshake, name: str, revoked: Collection[str]) -> None:
    try:
        check_peer(wire.session, name, revoked)
    except WireError:
        with contextlib.suppress(OSError):
            wire.send([_UNKNOWN])
        raise
    wire.send([_WELCOME])


def check_peer(session: ssl.SSLObject | ssl.SSLSocket, name: str, revoked: Collection[str] = ()) -> None:
    """Raises `WireError` unless the other end is this node, by a certificate that is not revoked."""
    certificate = session.getpeercert(binary_form=True)
    facts = session.getpeercert()
    if certificate is None or not facts:
        raise WireError("TLS: the other end has no certificate")
    if hashlib.sha256(certificate).hexdigest() in revoked:
        raise WireError("TLS: the certificate of the other end is revoked")
    uris = [str(each[1]) for each in facts.get("subjectAltName", ()) if each[0] == "URI"]
    names = [uri.removeprefix(URI_PREFIX) for uri in uris if uri.startswith(URI_PREFIX)]
    if names != [name]:
        raise WireError(f"TLS: the other end is {', '.join(names) or 'no node'}, expected is {name}")


def tls_context(directory: Path, *, server_side: bool) -> ssl.SSLContext:
    """Mutual TLS 1.3 with what `phaul_client/tls.py` names, read now. Raises `WireError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the name is in a URI: `check_peer`
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        context.num_tickets = 0  # nobody comes back
    try:
        context.load_verify_locations(directory / "ca.crt")
        context.load_cert_chain(directory / "node.crt", directory / "node.key")
    except OSError as exc:  # ssl's errors, too
        raise WireError(f"TLS: {directory}: {exc.strerror or exc}") from exc
    return context


def receive_exactly(wire: Wire, buffer: memoryview) -> int:
    """Fill it; fewer bytes only at the end of the stream. Raises `OSError`."""
    count = 0
    while count < len(buffer):
        got = wire.receive_into(buffer[count:])
        if not got:
            break
        count += got
    return count


def _shut_down(sock: socket.socket) -> None:
    # Not closed: another thread may be in a system call on it. The last reference closes it.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
