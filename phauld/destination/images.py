"""Writes the files that a source sends: images by plain name into one directory, carried files to paths agreed before.

The invariant: nothing outside of these two is ever written, and no image has its name before it is complete.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from phaul.v1 import remote_pb2
from phaul_client.errors import ImageCorrupt, InvalidRequest
from phaul_client.same_pages import PageReader

_IMAGE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.img")
#: These come over the page stream, from criu to criu.
_PAGE_STREAM: Final = re.compile(r"page(s|map)-.*")
_DEFAULT_MODE: Final = 0o600
_MAX_FILE_BYTES: Final = (1 << 63) - 1  #: off_t
_PERMISSIONS: Final = 0o777


class ImageWriter:
    """Takes the pieces of one PutImages call. As a context manager it closes, and drops, what stayed incomplete."""

    def __init__(
        self, images: Path | None, carried: tuple[Path, ...], make_images: Callable[[], Path] | None = None
    ) -> None:
        """`make_images` makes the directory for the first image of post-copy, whose pagemaps come this way, too."""
        self._images = images
        self._make_images = make_images
        self._carried = {str(path) for path in carried}
        self._path: str | None = None  # the file that is being written; text, since there may be thousands in a freeze
        self._descriptor = -1
        self._position = 0
        self._size = 0
        self._same = PageReader()
        self.image_names: set[str] = set()
        self.files = 0
        self.bytes = 0

    def write(self, piece: remote_pb2.FilePiece) -> None:
        """Write one piece. Raises `ImageCorrupt`, `InvalidRequest`, `OSError`."""
        path, carried = self._target(piece)
        data, size_bytes, offset_bytes = piece.data, piece.size_bytes, piece.offset_bytes
        if zlib.crc32(data) != piece.crc32:
            raise ImageCorrupt(f"{_name(path)}: the checksum of the piece at {offset_bytes} does not match")
        if piece.pages:
            data = self._same.decode(piece.pages, data)
        if size_bytes > _MAX_FILE_BYTES:
            raise InvalidRequest(f"{_name(path)}: no file has {size_bytes} bytes")
        if offset_bytes + len(data) > size_bytes:
            raise ImageCorrupt(f"{_name(path)}: a piece reaches beyond the end of the file")
        if path != self._path:
            self._open(path, carried, piece)
        if size_bytes != self._size:
            raise ImageCorrupt(f"{_name(path)}: its size was {self._size}, and is {size_bytes} now")
        if offset_bytes != self._position:
            raise ImageCorrupt(f"{_name(path)}: expected the piece at {self._position}, got {offset_bytes}")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, self._position)
            self._position += written
            view = view[written:]
        self.bytes += len(data)
        if self._position == size_bytes:
            self._finish(path, carried, size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is not None:
            path, self._path = self._path, None
            os.close(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_unfinished(path))
            if kind is None:
                raise ImageCorrupt(f"{_name(path)}: the stream ended inside it")

    def _target(self, piece: remote_pb2.FilePiece) -> tuple[str, bool]:
        match piece.WhichOneof("target"):
            case "image_name":
                name = piece.image_name
                from_page_stream = _PAGE_STREAM.match(name) and self._make_images is None
                if not _IMAGE_NAME.fullmatch(name) or from_page_stream:
                    raise InvalidRequest(f"{name!r} is not the name of a small image")
                if self._images is None and self._make_images is not None:
                    self._images = self._make_images()
                if self._images is None:
                    raise InvalidRequest("images have no place before the first round")
                return f"{self._images}/{name}", False
            case "carried_path":
                if piece.carried_path not in self._carried:
                    raise InvalidRequest(f"{piece.carried_path!r} was not announced by OpenSession")
                return piece.carried_path, True
            case _:
                raise InvalidRequest("a piece without a target")

    def _open(self, path: str, carried: bool, piece: remote_pb2.FilePiece) -> None:
        if self._path is not None:
            raise ImageCorrupt(f"{_name(self._path)}: the next file began inside it")
        mode = piece.mode & _PERMISSIONS or _DEFAULT_MODE
        if carried:
            Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._descriptor = _open_carried(path, mode)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            self._descriptor = os.open(_unfinished(path), flags, mode)
        self._path, self._size = path, piece.size_bytes
        self._position = piece.offset_bytes if carried else 0

    def _finish(self, path: str, carried: bool, size_bytes: int) -> None:
        if carried and self._images is not None:  # before the first round the tree still writes, perhaps to this file
            os.ftruncate(self._descriptor, size_bytes)
        os.close(self._descriptor)
        self._path = None
        self.files += 1
        if not carried:
            os.rename(_unfinished(path), path)
            self.image_names.add(_name(path))


def _open_carried(path: str, mode: int) -> int:
    """With exactly this mode, whatever the umask: criu compares it. Raises `OSError` for anything but a file.

    What is there is overwritten in place: on a shared file system, and between two daemons of one machine, it is the
    very file that is sent.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, mode)  # no waiting for a pipe
    try:
        os.fchmod(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unfinished(path: str) -> str:
    directory, _, name = path.rpartition("/")
    return f"{directory}/.{name}.part"


def _name(path: str) -> str:
    return path.rpartition("/")[2]
