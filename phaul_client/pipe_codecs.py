"""How a page pipe compresses. The libraries are loaded when they are first needed.

The invariant: what does not become smaller travels as it is, and a frame never becomes larger than its head says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from phaul_client.errors import ImageCorrupt
from phaul_client.page_frames import Codec

#: Below this the head is most of a frame; criu's answers are four bytes.
LEAST_BYTES: Final = 2048
ZSTD_LEVEL: Final = 1
#: More of the original than this is not worth the other end's time.
MOST_LEFT: Final = 0.97

Content = memoryview | bytes
Compress = Callable[[Content], tuple[Codec, Content]]


def compressor(compression: str) -> Compress:
    """By a word of `pipe_choice.Compression`."""
    return Compressor(Codec.NONE if compression == "off" else Codec[compression.upper()])


class Compressor:
    """Compresses with one codec what is worth it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._pack: Callable[[Content], bytes] | None = _packers(codec)

    def __call__(self, content: Content) -> tuple[Codec, Content]:
        if self._pack is None or len(content) < LEAST_BYTES:
            return Codec.NONE, content
        packed = self._pack(content)
        if len(packed) > len(content) * MOST_LEFT:
            return Codec.NONE, content
        return self._codec, packed


def _packers(codec: Codec) -> Callable[[Content], bytes] | None:
    match codec:
        case Codec.LZ4:
            import lz4.block

            return lambda content: bytes(lz4.block.compress(content, store_size=False))
        case Codec.ZSTD:
            import zstandard

            return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
        case Codec.NONE:
            return None


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
