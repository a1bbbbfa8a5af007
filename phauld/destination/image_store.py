"""What arrives at the destination before the tree is built: the page server's rounds and the small images.

Post-copy has one round without pages, whose directory is made by its first image, and made again when it comes again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from phaul_client.config import Config
from phaul_client.errors import ImageCorrupt
from phaul_client.images import relative_parent
from phaul_criu.criu import Criu
from phauld.destination.images import ImageWriter
from phauld.destination.incoming_spec import Incoming
from phauld.destination.receiver import Server


class ImageStore:
    """The images of one session."""

    def __init__(self, incoming: Incoming, directory: Path, criu: Criu) -> None:
        self._incoming = incoming
        self._directory = directory
        self._criu = criu
        self._server: Server | None = None
        self._names: set[str] = set()
        self._fetched_round: Path | None = None
        self.rounds = 0
        self.bytes_received = 0

    @property
    def last(self) -> Path | None:
        """The newest round's directory; None before the first."""
        return self._server.last_images_dir if self._server is not None else None

    @property
    def is_without_pages(self) -> bool:
        """Whether the newest round's pages are still at the source."""
        return self._fetched_round is not None

    async def start_round(self, memfd: int, *, in_a_hurry: bool) -> None:
        """Receive pages from a connected socket. Raises `CriuError`."""
        if self._server is None:
            self._server = Server(Config(pid=0, memfd=memfd, wdir=self._directory), self._criu)
        await self._server.start_iter(in_a_hurry=in_a_hurry or self.rounds > 0)

    async def end_round(self) -> None:
        """Wait for the last page of it. Raises `CriuError`."""
        if self._server is None:
            return
        await self._server.stop_iter()
        self.rounds += 1
        self.bytes_received += _bytes_of(self._server.last_images_dir)

    def writer(self, *, without_pages: bool, on_first: Callable[[], None]) -> ImageWriter:
        """Takes images into the newest round, or, `without_pages`, into one of their own: before that, `on_first`."""
        if without_pages:

            def make() -> Path:
                on_first()
                return self._make_fetched_round()

            return ImageWriter(None, self._incoming.carried, make)
        return ImageWriter(self.last, self._incoming.carried)

    def _make_fetched_round(self) -> Path:
        if self._fetched_round is None:
            if self._server is None:
                self._server = Server(Config(pid=0, memfd=-1, wdir=self._directory), self._criu)
            parent = self._server.last_images_dir
            self._fetched_round = self._server.next_images_dir()
            if parent is not None:
                (self._fetched_round / "parent").symlink_to(relative_parent(self._fetched_round, parent) or "")
        return self._fetched_round

    def accept(self, writer: ImageWriter) -> None:
        """The files of `writer` are complete."""
        self._names |= writer.image_names
        self.bytes_received += writer.bytes

    def check_complete(self, image_files: int) -> None:
        """Raises `ImageCorrupt`; 0: the source did not say how many there are."""
        if image_files and image_files != len(self._names):
            raise ImageCorrupt(f"{len(self._names)} images have arrived, {image_files} were sent")

    async def aclose(self) -> None:
        if self._server is not None:
            await self._server.aclose()


def _bytes_of(images: Path | None) -> int:
    """Bytes of memory that the page server wrote in a round."""
    return sum(path.stat().st_size for path in images.glob("pages-*.img")) if images is not None else 0
