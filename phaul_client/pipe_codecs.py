"""How a page pipe compresses. The libraries are loaded when they are first needed.

The invariant: what does not become smaller travels as it is, and a frame never becomes larger than its head says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from phaul_client.compression_policy import CodecChooser
from phaul_client.errors import ImageCorrupt
from phaul_client.page_frames import Codec

#: Below this the head is most of a frame; criu's answers are four bytes.
LEAST_BYTES: Final = 2048
ZSTD_LEVEL: Final = 1
#: More of the original than this is not worth the other end's time.
MOST_LEFT: Final = 0.97

Content = memoryview | bytes


def compressor(compression: str) -> Compressor:
    """By a word of `pipe_choice.Compression`."""
    if compression == "auto":
        return Compressor(CodecChooser())
    return Compressor(CodecChooser((Codec.NONE if compression == "off" else Codec[compression.upper()],)))


class Compressor:
    """Compresses what is worth it, with the codec that the chooser names. One thread calls it."""

    def __init__(self, chooser: CodecChooser) -> None:
        self._chooser = chooser
        self._packers: dict[Codec, Callable[[Content], bytes]] = {}
        self._packing_seconds = 0.0

    def __call__(self, content: Content) -> tuple[Codec, Content]:
        codec = self._chooser.codec
        if codec is Codec.NONE or len(content) < LEAST_BYTES:
            self._packing_seconds = 0.0
            return Codec.NONE, content
        if codec not in self._packers:
            self._packers[codec] = _packer(codec)
        started = time.monotonic()
        packed = self._packers[codec](content)
        self._packing_seconds = time.monotonic() - started
        if len(packed) > len(content) * MOST_LEFT:
            return Codec.NONE, content
        return codec, packed

    def sent(self, raw_bytes: int, *, seconds: float, waited_seconds: float) -> None:
        """The last content has left; packing and sending took so long together."""
        self._chooser.sent(
            raw_bytes,
            packing_seconds=self._packing_seconds,
            sending_seconds=max(0.0, seconds - self._packing_seconds),
            waited_seconds=waited_seconds,
        )


def _packer(codec: Codec) -> Callable[[Content], bytes]:
    if codec is Codec.LZ4:
        import lz4.block

        return lambda content: bytes(lz4.block.compress(content, store_size=False))
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress


_unpackers: dict[Codec, Callable[[Content, int], bytes]] = {}


def decompress(codec: Codec, packed: memoryview, raw_bytes: int) -> Content:
    """At most `raw_bytes`. Raises `ImageCorrupt`."""
    if codec is Codec.NONE:
        return packed
    if codec not in _unpackers:
        _unpackers[codec] = _unpacker(codec)
    try:
        return _unpackers[codec](packed, raw_bytes)
    except Exception as exc:  # each library has errors of its own
        raise ImageCorrupt(f"page stream: a frame cannot be unpacked: {exc}") from exc


def _unpacker(codec: Codec) -> Callable[[Content, int], bytes]:
    if codec is Codec.LZ4:
        import lz4.block

        return lambda packed, size: bytes(lz4.block.decompress(packed, uncompressed_size=size))
    import zstandard

    unpacker: Any = zstandard.ZstdDecompressor()

    def unpack(packed: Content, size: int) -> bytes:
        parameters = zstandard.get_frame_parameters(packed)
        if parameters.content_size != size:
            raise ValueError(f"{parameters.content_size} bytes instead of {size}")
        return bytes(unpacker.decompress(packed, max_output_size=size))

    return unpack
