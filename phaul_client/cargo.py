"""Files that go with a tree: sent while it runs, so that little is left for the freeze.

There are three kinds: carried files, such as a log, of which only the tails are left; a container's baggage, of which
only changes are; and the directories of `--sync`, whose last pass goes on beside the dump.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from phaul.v1 import migrations_pb2, remote_pb2
from phaul_client.pieces import carried_pieces
from phaul_client.remote import GrpcRemote
from phaul_client.syncing import FileSync
from phaul_client.timeline import Step


class Baggage(Protocol):
    """Files that travel with the tree and are more than a few."""

    async def first(self) -> None:
        """Send them while the tree runs. Raises `PhaulError`, `OSError`."""

    async def rest(self) -> None:
        """Send what has changed since; the tree stands still. Raises `PhaulError`, `OSError`."""


class Cargo:
    """Of one migration, at its source. Its methods are called in this order; they raise `PhaulError`, `OSError`."""

    def __init__(
        self,
        remote: GrpcRemote,
        carried: Sequence[Path] = (),
        *,
        baggage: Baggage | None = None,
        sync: FileSync | None = None,
    ) -> None:
        self._remote = remote
        self._sent_bytes = dict.fromkeys(carried, 0)
        self._baggage = baggage
        self._sync = sync

    async def send(self) -> None:
        """Carried files and baggage, while the tree runs."""
        for path in self._sent_bytes:
            self._sent_bytes[path] = (await self._remote.put_images(carried_pieces(path))).bytes
        if self._baggage is not None:
            await self._baggage.first()

    async def copy(self) -> None:
        """Make the directories the same there, while the tree runs."""
        if self._sync is not None:
            await self._sync.copy()

    async def prepare(self) -> None:
        """The same for what changed since; the last pass is ready then."""
        if self._sync is not None:
            await self._sync.prepare()

    def freeze(self) -> None:
        """The tree stands still: the last pass goes on beside the dump."""
        if self._sync is not None:
            self._sync.freeze()

    def tails(self) -> list[remote_pb2.FilePiece]:
        """What is left of carried files."""
        return [piece for path, sent_bytes in self._sent_bytes.items() for piece in carried_pieces(path, sent_bytes)]

    async def send_rest(self) -> None:
        """What has changed of the baggage."""
        if self._baggage is not None:
            await self._baggage.rest()

    async def finish(self) -> list[Step]:
        """See the last pass to its end; what it took."""
        if self._sync is None:
            return []
        await self._sync.finish()
        return [self._sync.step] if self._sync.step is not None else []

    async def aclose(self) -> None:
        """However it ended: nothing more is sent."""
        if self._sync is not None:
            await self._sync.aclose()

    def report(self) -> list[migrations_pb2.SyncedDirectory]:
        """What was copied of directories until now."""
        return self._sync.report() if self._sync is not None else []
