"""What the two ends of a page pipe say to each other (pure).

criu's page stream has no checksum: whatever arrives is written into the images. A pipe carries it in frames. On the
wire: a head (`HEAD_BYTES`, big-endian), then `wire_bytes` of content.

  kind 1, codec 1, zero 2, wire_bytes 4, raw_bytes 4, sequence 8, digest 8 (xxh3 of the raw content), check 4

`check` is the CRC-32 of the head before it: a length that was damaged is never waited for. Frames are numbered from 1
in each direction: one that is missing, doubled or out of place is noticed. END says that the stream was closed at its
source; a connection that ends without it was cut. FAIL says why the sender gives up: a reason of phaul's, a space, and
words for people.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from phaul_client.errors import ImageCorrupt, RemoteProtocolError

#: Of content, before it is compressed; and never more than that on the wire.
MAX_FRAME_BYTES: Final = 1 << 20
MAX_FAIL_BYTES: Final = 1000
_HEAD: Final = struct.Struct(">BBHIIQQI")
_CHECKED: Final = _HEAD.size - 4
HEAD_BYTES: Final = _HEAD.size
_PEER: Final = "page stream"


class Kind(enum.IntEnum):
    """What a frame is."""

    DATA = 1
    END = 2
    FAIL = 3


class Codec(enum.IntEnum):
    """How the content of a frame is compressed."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of a frame."""

    kind: Kind
    codec: Codec = Codec.NONE
    wire_bytes: int
    raw_bytes: int
    sequence: int
    digest: int

    def encode(self) -> bytes:
        head = _HEAD.pack(self.kind, self.codec, 0, self.wire_bytes, self.raw_bytes, self.sequence, self.digest, 0)
        return head[:_CHECKED] + zlib.crc32(head[:_CHECKED]).to_bytes(4, "big")


def decode_head(data: bytes | bytearray | memoryview) -> Head:
    """Exactly `HEAD_BYTES` bytes. Raises `ImageCorrupt` if they were damaged, `RemoteProtocolError` if they lie."""
    if len(data) != HEAD_BYTES:
        raise RemoteProtocolError(_PEER, f"a head has {HEAD_BYTES} bytes, not {len(data)}")
    kind, codec, zero, wire_bytes, raw_bytes, sequence, digest, check = _HEAD.unpack(data)
    if zlib.crc32(data[:_CHECKED]) != check:
        raise ImageCorrupt("page stream: the head of a frame was damaged on its way")
    try:
        head = Head(
            kind=Kind(kind),
            codec=Codec(codec),
            wire_bytes=wire_bytes,
            raw_bytes=raw_bytes,
            sequence=sequence,
            digest=digest,
        )
    except ValueError:
        raise RemoteProtocolError(_PEER, f"a frame of kind {kind}, codec {codec}") from None
    fits = wire_bytes < raw_bytes if head.codec else wire_bytes == raw_bytes
    limit = {Kind.DATA: MAX_FRAME_BYTES, Kind.END: 0, Kind.FAIL: MAX_FAIL_BYTES}[head.kind]
    if zero or not fits or raw_bytes > limit or (head.kind is Kind.DATA and not raw_bytes):
        raise RemoteProtocolError(_PEER, f"a {head.kind.name} frame of {wire_bytes} bytes for {raw_bytes}")
    return head


class Numbers:
    """The sequence of one direction, at its sender or at its receiver."""

    def __init__(self) -> None:
        self.last = 0
        self.ended = False

    def next(self) -> int:
        """For the frame that is sent next."""
        self.last += 1
        return self.last

    def expect(self, head: Head) -> None:
        """This frame arrived. Raises `ImageCorrupt` unless it is the next one."""
        if head.sequence != self.last + 1 or self.ended:
            raise ImageCorrupt(f"page stream: frame {head.sequence} arrived after {self.last}")
        self.last = head.sequence
        self.ended = head.kind is Kind.END


def check_content(head: Head, raw_bytes: int, digest: int) -> None:
    """What arrived, uncompressed, is what was sent. Raises `ImageCorrupt`."""
    if raw_bytes != head.raw_bytes or digest != head.digest:
        raise ImageCorrupt(f"page stream: the checksum of frame {head.sequence} does not match")


def encode_failure(reason: str, message: str) -> bytes:
    """The content of a FAIL frame."""
    return f"{reason} {message}".encode()[:MAX_FAIL_BYTES]


def decode_failure(content: bytes) -> tuple[str, str]:
    """Reason and message."""
    reason, _, message = content.decode(errors="replace").partition(" ")
    return (reason, message) if reason.isupper() else ("INTERNAL", content.decode(errors="replace"))
