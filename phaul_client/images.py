"""The chain of image directories of one migration: 0, 1, 2, … each the parent of the next."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class ImageChain:
    """Numbered directories below `wdir`, used by the client and the server alike."""

    def __init__(self, wdir: Path) -> None:
        self._wdir = wdir
        self._count = 0

    @property
    def last(self) -> Path | None:
        """The newest directory, absolute; `None` before the first round."""
        return (self._wdir / str(self._count - 1)).absolute() if self._count else None

    def open_next(self) -> Path:
        """Make the next directory (mode 0700) and return it, absolute. Raises `FileExistsError` if it was there."""
        path = (self._wdir / str(self._count)).absolute()
        path.mkdir(mode=0o700)
        self._count += 1
        return path


def relative_parent(directory: Path, parent: Path | None) -> str | None:
    """The parent's path as criu wants it: relative to the directory that names it, so that a chain can be moved."""
    return os.path.relpath(parent, directory) if parent else None


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory, for criu."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
