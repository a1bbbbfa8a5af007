"""Frames over another wire, with checksums and perhaps compressed: what comes out at one end is what went in.

For connections that live for long and carry both small messages and pages, as that of a post-copy's relays. The frames
are those of the page pipe (`page_frames.py`), data alone. A frame that was damaged, or is not the next one, is an error
of the connection: whoever has another, or makes one, asks again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import xxhash

from phaul_client.errors import PhaulError
from phaul_client.kernel_tls import Buffer, WireError
from phaul_client.page_frames import HEAD_BYTES, MAX_FRAME_BYTES, Head, Kind, Numbers, check_content, decode_head
from phaul_client.pipe_codecs import compressor, decompress
from phaul_client.wire import Wire, receive_exactly


class PackedWire:
    """A `Wire` over one; one thread may send while another receives."""

    def __init__(self, wire: Wire, compression: str) -> None:
        self._wire = wire
        self._compress = compressor(compression)
        self._sending = threading.Lock()
        self._out, self._in = Numbers(), Numbers()
        self._ready_at = time.monotonic()
        self._head = memoryview(bytearray(HEAD_BYTES))
        self._packed = memoryview(bytearray(MAX_FRAME_BYTES))
        self._content: Buffer = b""  # of the frame that came last, and what is left of it
        self._left = memoryview(b"")

    def send(self, pieces: Sequence[Buffer]) -> int:
        whole = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces)).cast("B")
        with self._sending:
            return sum(
                self._send_frame(whole[start : start + MAX_FRAME_BYTES])
                for start in range(0, len(whole), MAX_FRAME_BYTES)
            )

    def receive_into(self, buffer: memoryview) -> int:
        if not self._left and not self._receive_frame():
            return 0
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._wire.close()

    def _send_frame(self, content: memoryview) -> int:
        started = time.monotonic()
        codec, packed = self._compress(content)
        head = Head(
            kind=Kind.DATA,
            codec=codec,
            wire_bytes=len(packed),
            raw_bytes=len(content),
            sequence=self._out.next(),
            digest=xxhash.xxh3_64_intdigest(content),
        )
        count = self._wire.send([head.encode(), packed])
        waited, self._ready_at = started - self._ready_at, time.monotonic()
        self._compress.sent(len(content), seconds=self._ready_at - started, waited_seconds=waited)
        return count

    def _receive_frame(self) -> bool:
        """Whether there was one: False at the end of the stream. Raises `OSError`."""
        got = receive_exactly(self._wire, self._head)
        if not got:
            return False
        try:
            if got < HEAD_BYTES:
                raise WireError("the connection ended inside a frame")
            head = decode_head(self._head)
            self._in.expect(head)
            packed = self._packed[: head.wire_bytes]
            if head.kind is not Kind.DATA or receive_exactly(self._wire, packed) < len(packed):
                raise WireError("the connection ended inside a frame")
            self._content = decompress(head.codec, packed, head.raw_bytes)
            check_content(head, len(self._content), xxhash.xxh3_64_intdigest(self._content))
        except PhaulError as exc:
            raise WireError(exc.message) from exc
        self._left = memoryview(self._content)
        return True
