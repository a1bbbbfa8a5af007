"""Files into pieces and pieces into messages, for `Remote.PutImages` (the cutting is pure).

Inside the freeze a message costs more than a small file, so many files share one message.
"""

import errno
import os
import zlib
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2

PIECE_BYTES: Final = 1 << 20
MESSAGE_BYTES: Final = 2 << 20
MESSAGE_PIECES: Final = 100  #: the other node writes these while the next ones are read
_IMAGE: Final = ".img"


def image_pieces(
    directory: Path, index: int, names: Collection[str] = (), *, but: Collection[str] = ()
) -> Iterator[remote_pb2.FilePiece]:
    """The images of one round, without its logs; of these `names`, if there are such, or all `but` these.

    Raises `OSError`.

    There is one for each TCP connection, and the tree stands still: paths are text here, and a file is opened once.
    """
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in sorted(names or os.listdir(place)):
            if not name.endswith(_IMAGE) or name in but or (descriptor := _open_file(name, place)) is None:
                continue
            try:
                for piece in _pieces_of(descriptor, 0):
                    piece.image_name, piece.index = name, index
                    yield piece
            finally:
                os.close(descriptor)
    finally:
        os.close(place)


def content_pieces(name: str, index: int, content: bytes) -> Iterator[remote_pb2.FilePiece]:
    """An image that is in no file."""
    for position in range(0, len(content), PIECE_BYTES):
        data = content[position : position + PIECE_BYTES]
        piece = _piece(len(content), position, data)
        piece.image_name, piece.index = name, index
        yield piece


def carried_pieces(path: Path, offset_bytes: int = 0) -> Iterator[remote_pb2.FilePiece]:
    """A carried file from `offset_bytes` on. Raises `OSError`."""
    mode = path.stat().st_mode & 0o7777
    for piece in file_pieces(path, offset_bytes):
        piece.carried_path, piece.mode = str(path), mode
        yield piece


def file_pieces(path: Path, offset_bytes: int = 0) -> Iterator[remote_pb2.FilePiece]:
    """Content, place and checksum of each piece; an empty file is one empty piece. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _pieces_of(descriptor, offset_bytes)
    finally:
        os.close(descriptor)


def _open_file(name: str, place: int) -> int | None:
    """`None` for a link, which leads to an image of another round."""
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except OSError as exc:
        if exc.errno != errno.ELOOP:
            raise
        return None


def _pieces_of(descriptor: int, offset_bytes: int) -> Iterator[remote_pb2.FilePiece]:
    size_bytes = os.fstat(descriptor).st_size
    position = min(offset_bytes, size_bytes)
    while True:
        data = os.pread(descriptor, min(PIECE_BYTES, size_bytes - position), position)
        yield _piece(size_bytes, position, data)
        position += len(data)
        if not data or position >= size_bytes:
            return


def _piece(size_bytes: int, position: int, data: bytes) -> remote_pb2.FilePiece:
    return remote_pb2.FilePiece(size_bytes=size_bytes, offset_bytes=position, crc32=zlib.crc32(data), data=data)


def messages(migration_id: str, pieces: Iterable[remote_pb2.FilePiece]) -> Iterator[remote_pb2.PutImagesRequest]:
    """As many pieces to a message as `MESSAGE_BYTES` and `MESSAGE_PIECES` allow."""
    message, size_bytes = remote_pb2.PutImagesRequest(migration_id=migration_id), 0
    for piece in pieces:
        piece_bytes = piece.ByteSize()  # an empty file costs its name
        if message.pieces and (size_bytes + piece_bytes > MESSAGE_BYTES or len(message.pieces) >= MESSAGE_PIECES):
            yield message
            message, size_bytes = remote_pb2.PutImagesRequest(), 0
        message.pieces.append(piece)
        size_bytes += piece_bytes
    if message.pieces:
        yield message


async def one_by_one(requests: Iterable[remote_pb2.PutImagesRequest]) -> AsyncIterator[remote_pb2.PutImagesRequest]:
    """What is at hand, for who waits for what is made."""
    for request in requests:
        yield request


class Told:
    """Requests for gRPC, which makes a cancellation of what its generator raises."""

    def __init__(self, requests: AsyncIterator[remote_pb2.PutImagesRequest]) -> None:
        self._requests = requests
        self.failure: Exception | None = None

    async def each(self) -> AsyncIterator[remote_pb2.PutImagesRequest]:
        """They."""
        try:
            async for request in self._requests:
                yield request
        except (OSError, ValueError) as exc:
            self.failure = exc
            raise
