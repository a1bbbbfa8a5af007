"""The process between criu's page stream and the network: one at each end of a migration, both the same.

Bytes from criu's socket leave in frames (`page_frames.py`) with checksums, perhaps compressed, perhaps under TLS
(`wire.py`); frames from the network are checked and given to criu. It lives in a process of its own, so that no page
passes through phauld, and is ready before the freeze. criu's page stream is half duplex with small answers: what criu
has written leaves at once, in as large a frame as there is.

The invariants. No byte of a frame reaches criu before its checksum was compared. And an end of file reaches it only if
the other end's criu, or its phauld, closed the stream, or with a failure on the board (`pipe_board.py`): either way
criu's own conversation is broken, its dump or its page server fails, and the tree runs on.

Where both kernels do TLS and nothing else was asked for, it only greets the other end and hands the connection over to
criu. Else it ends when the stream has ended in both directions, when it fails, and when phauld closes the control
socket, as by its death.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import xxhash

from phaul_client import wire as wires
from phaul_client.errors import PhaulError
from phaul_client.page_frames import (
    HEAD_BYTES,
    MAX_FRAME_BYTES,
    Codec,
    Head,
    Kind,
    Numbers,
    check_content,
    decode_failure,
    decode_head,
    encode_failure,
)
from phaul_client.pipe_board import Board
from phaul_client.pipe_codecs import compressor, decompress
from phaul_client.wire import Wire, receive_exactly

#: Taken from criu at once. Larger ones took no less processor time, smaller ones more.
FRAME_BYTES: Final = 1 << 19
#: How long the end that failed goes on reading, so that its FAIL is not overtaken by a reset.
LINGER_SECONDS: Final = 2.0
MESSAGE_BYTES: Final = 1 << 16


class Pipe:
    """The two directions between criu's socket and the wire."""

    def __init__(self, local: socket.socket, wire: Wire, board: Board, compression: str) -> None:
        self._local = local
        self._wire = wire
        self._board = board
        self._compress = compressor(compression)
        self._sending = threading.Lock()  # a frame leaves as a whole
        self._out, self._in = Numbers(), Numbers()

    def run(self) -> int:
        """Until both directions have ended, or one has failed; the exit status."""
        sender = threading.Thread(target=self._guarded, args=(self._carry_out,), daemon=True, name="out")
        receiver = threading.Thread(target=self._guarded, args=(self._carry_in,), daemon=True, name="in")
        sender.start()
        receiver.start()
        sender.join()
        receiver.join()
        return 1 if self._board.failure else 0

    def _guarded(self, carry: Any) -> None:
        try:
            carry()
        except PhaulError as exc:
            self._fail(exc.reason, exc.message)
        except wires.WireError as exc:
            self._fail("IMAGE_CORRUPT" if "DECRYPTION" in str(exc) else "PEER_UNREACHABLE", f"page stream: {exc}")
        except OSError as exc:
            reason = "IMAGE_CORRUPT" if exc.errno == errno.EBADMSG else "PEER_UNREACHABLE"  # the kernel's TLS says that
            self._fail(reason, f"page stream: {exc.strerror or exc}")
        except Exception as exc:
            self._fail("INTERNAL", f"page pipe: {exc!r}")

    # criu → network

    def _carry_out(self) -> None:
        buffer = memoryview(bytearray(FRAME_BYTES))
        ready = time.monotonic()
        while count := self._take(buffer):
            started = time.monotonic()
            self._send(Kind.DATA, buffer[:count])
            waited, ready = started - ready, time.monotonic()
            self._compress.sent(count, seconds=ready - started, waited_seconds=waited)
        self._send(Kind.END, b"")

    def _take(self, buffer: memoryview) -> int:
        """What criu has written; 0 at the end of its stream, and when nobody has it any more."""
        try:
            return self._local.recv_into(buffer)
        except ConnectionError:
            return 0

    def _send(self, kind: Kind, content: memoryview | bytes) -> None:
        raw_bytes = len(content)
        digest = xxhash.xxh3_64_intdigest(content)
        codec, packed = self._compress(content) if kind is Kind.DATA else (Codec.NONE, content)
        with self._sending:
            head = Head(
                kind=kind,
                codec=codec,
                wire_bytes=len(packed),
                raw_bytes=raw_bytes,
                sequence=self._out.next(),
                digest=digest,
            )
            self._board.sent(raw_bytes, self._wire.send([head.encode(), packed]))
        if kind is Kind.DATA:
            self._board.codec = codec

    # network → criu

    def _carry_in(self) -> None:
        head_buffer = memoryview(bytearray(HEAD_BYTES))
        buffer = memoryview(bytearray(MAX_FRAME_BYTES))
        while not self._in.ended:
            self._fill(head_buffer)
            head = decode_head(head_buffer)
            self._in.expect(head)
            packed = buffer[: head.wire_bytes]
            self._fill(packed)
            content = decompress(head.codec, packed, head.raw_bytes)
            check_content(head, len(content), xxhash.xxh3_64_intdigest(content))
            self._board.received(head.raw_bytes, HEAD_BYTES + head.wire_bytes)
            self._take_frame(head, content)

    def _fill(self, buffer: memoryview) -> None:
        if receive_exactly(self._wire, buffer) < len(buffer):
            raise PhaulError("page stream: the connection was cut", reason="PEER_UNREACHABLE")

    def _take_frame(self, head: Head, content: memoryview | bytes) -> None:
        match head.kind:
            case Kind.DATA:
                with contextlib.suppress(ConnectionError):  # nobody has it any more: `_take` sees that, too
                    self._local.sendall(content)
            case Kind.END:
                with contextlib.suppress(OSError):
                    self._local.shutdown(socket.SHUT_WR)
            case Kind.FAIL:
                reason, message = decode_failure(bytes(content))
                self._board.fail(reason, message)
                self._give_up()

    # the end

    def _fail(self, reason: str, message: str) -> None:
        if not self._board.fail(reason, message):
            return
        for work in (self._linger, self._end_soon):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()
        with contextlib.suppress(Exception):
            self._send(Kind.FAIL, encode_failure(reason, message))
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_RDWR)
        time.sleep(2 * LINGER_SECONDS)

    def _end_soon(self) -> None:
        time.sleep(LINGER_SECONDS)
        self._give_up()

    def _linger(self) -> None:
        buffer = memoryview(bytearray(FRAME_BYTES))
        with contextlib.suppress(OSError):
            while self._wire.receive_into(buffer):
                pass
        self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_RDWR)
        self._wire.close()
        os._exit(1)


def make_wire(sock: socket.socket, message: dict[str, Any]) -> Wire:
    """As phauld said. Raises `OSError`."""
    tls = message["tls"]
    if tls is None:
        return wires.PlainWire(sock)
    directory = Path(tls["directory"])
    return wires.make_tls(
        sock, directory, tls["name"], tls["revoked"], server_side=message["server"], kernel=tls["kernel"]
    )


def watch(control: socket.socket) -> None:
    """phauld closed it, or died: so do we."""
    while control.recv(1):
        pass
    os._exit(1)


def main() -> None:
    """pipe_process CONTROL_FD LOCAL_FD BOARD_FD, after what `pipe.py` puts before them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    control_fd, local_fd, board_fd = (int(each) for each in sys.argv[-3:])
    control, local, board = socket.socket(fileno=control_fd), socket.socket(fileno=local_fd), Board(board_fd)
    data, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
    if not descriptors:
        os._exit(1)
    threading.Thread(target=watch, args=(control,), daemon=True, name="control").start()
    try:
        message = json.loads(data)
        wire = make_wire(socket.socket(fileno=descriptors[0]), message)
    except OSError as exc:
        board.fail("UNAUTHORIZED" if isinstance(exc, wires.WireError) else "PEER_UNREACHABLE", f"page stream: {exc}")
        os._exit(1)
    control.send(b"ready")
    os._exit(0 if message["hands_over"] else Pipe(local, wire, board, message["compression"]).run())
