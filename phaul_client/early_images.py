"""Images of pages that leave while criu still dumps: in post-copy, those that cannot be left behind (I/O).

Written pages of private file mappings, what is locked, and the top of each stack (criu/mem.c, `generate_iovs`) are in
an image of each process: 1.5 MiB for a Python program. criu writes one of these images after the other, and numbers
them from 1 on; so each is complete once the next one is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2
from phaul_client.own_pages import OwnPages
from phaul_client.pieces import content_pieces, image_pieces, messages
from phaul_client.remote import GrpcRemote
from phaul_client.same_pages import PAGE_BYTES, PageWriter

LOOK_SECONDS: Final = 0.004


class EarlyImages:
    """Of one dump. The invariant: after `finish` or `aclose` nothing is on its way."""

    def __init__(self, remote: GrpcRemote) -> None:
        self._remote = remote
        self._sending: asyncio.Task[None] | None = None
        self._has_ended = asyncio.Event()
        self.names: set[str] = set()  #: those that have been sent
        self.bytes = 0  #: of them, on their way

    def begin(self, root: int, directory: Path, *, brings_own_pages: bool) -> None:
        """criu holds this tree, and is about to dump it into this directory."""
        if self._remote.takes_same_pages:
            self._sending = asyncio.create_task(self._send(root, directory, brings_own_pages), name="early-images")

    async def finish(self) -> None:
        """criu has dumped all: the rest of them goes. Raises `PhaulError`, `OSError`, `ValueError`."""
        self._has_ended.set()
        if self._sending is not None:
            await self._sending

    async def aclose(self) -> None:
        """However it ended."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    async def _send(self, root: int, directory: Path, brings_own_pages: bool) -> None:
        if not await self._is_complete(directory, 1):
            return  # there are none
        own = OwnPages(root, directory) if brings_own_pages else None
        await self._remote.put_images_as_made(self._requests(directory, own))

    async def _requests(self, directory: Path, own: OwnPages | None) -> AsyncIterator[remote_pb2.PutImagesRequest]:
        """Raises `OSError`, `ValueError`."""
        writer, index, number = PageWriter(), self._remote.image_index, 1
        while await self._is_complete(directory, number):
            name = _name(number)
            content = own.take(name) if own is not None else b""
            pieces = content_pieces(name, index, content) if content else image_pieces(directory, index, {name})
            for message in messages(self._remote.migration_id, _without_the_same(pieces, writer)):
                self.bytes += sum(len(piece.data) for piece in message.pieces)
                yield message
            self.names.add(name)
            number += 1

    async def _is_complete(self, directory: Path, number: int) -> bool:
        """Wait until criu adds nothing more to this image; whether there is such."""
        while not (directory / _name(number + 1)).exists():
            if self._has_ended.is_set():
                return (directory / _name(number)).exists()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._has_ended.wait()
        return True


def _name(number: int) -> str:
    return f"pages-{number}.img"


def _without_the_same(pieces: Iterable[remote_pb2.FilePiece], writer: PageWriter) -> Iterator[remote_pb2.FilePiece]:
    for piece in pieces:
        if piece.data and len(piece.data) % PAGE_BYTES == 0:
            numbers, new = writer.encode(piece.data)
            piece.pages.extend(numbers)
            piece.data, piece.crc32 = new, zlib.crc32(new)
        yield piece
