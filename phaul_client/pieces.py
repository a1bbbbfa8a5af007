"""Files into pieces and pieces into messages, for `Remote.PutImages` (the cutting is pure).

Inside the freeze a message costs more than a small file, so many files share one message.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2

PIECE_BYTES: Final = 1 << 20
MESSAGE_BYTES: Final = 2 << 20
#: What criu leaves in a dump's directory and a restore does not need.
_NOT_NEEDED: Final = frozenset({"stats-dump"})


def image_pieces(directory: Path, index: int) -> Iterator[remote_pb2.FilePiece]:
    """The images of one round, without its logs. Raises `OSError`."""
    for path in sorted(directory.iterdir()):
        if path.suffix == ".img" and path.name not in _NOT_NEEDED and not path.is_symlink():
            for piece in file_pieces(path):
                piece.image_name, piece.index = path.name, index
                yield piece


def carried_pieces(path: Path, offset_bytes: int = 0) -> Iterator[remote_pb2.FilePiece]:
    """A carried file from `offset_bytes` on. Raises `OSError`."""
    mode = path.stat().st_mode & 0o7777
    for piece in file_pieces(path, offset_bytes):
        piece.carried_path, piece.mode = str(path), mode
        yield piece


def file_pieces(path: Path, offset_bytes: int = 0) -> Iterator[remote_pb2.FilePiece]:
    """Content, place and checksum of each piece; an empty file is one empty piece. Raises `OSError`."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        position = min(file.seek(min(offset_bytes, size_bytes)), size_bytes)
        while True:
            data = file.read(min(PIECE_BYTES, size_bytes - position))
            yield remote_pb2.FilePiece(size_bytes=size_bytes, offset_bytes=position, crc32=zlib.crc32(data), data=data)
            position += len(data)
            if not data or position >= size_bytes:
                return


def messages(migration_id: str, pieces: Iterable[remote_pb2.FilePiece]) -> Iterator[remote_pb2.PutImagesRequest]:
    """As many pieces to a message as `MESSAGE_BYTES` allow."""
    message, size_bytes = remote_pb2.PutImagesRequest(migration_id=migration_id), 0
    for piece in pieces:
        piece_bytes = piece.ByteSize()  # an empty file costs its name
        if message.pieces and size_bytes + piece_bytes > MESSAGE_BYTES:
            yield message
            message, size_bytes = remote_pb2.PutImagesRequest(), 0
        message.pieces.append(piece)
        size_bytes += piece_bytes
    if message.pieces:
        yield message
