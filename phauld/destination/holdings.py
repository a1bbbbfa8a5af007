"""What one session has here: images, page stream, a criu that waits, the tree, and what comes with that.

The invariant: what was prepared or made is gone after `clean_up`, but for a tree that runs, and what is that tree's.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2
from phaul_client.errors import PhaseError
from phaul_client.hook_calls import HookSettings
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.urgency import in_a_hurry
from phauld import session
from phauld.destination import unattended
from phauld.destination.course import Course
from phauld.destination.dataport import DataPort
from phauld.destination.filling import Filling
from phauld.destination.image_store import ImageStore
from phauld.destination.incoming_spec import Incoming
from phauld.destination.page_stream import PageStream
from phauld.destination.placement import Promise
from phauld.destination.restoring import Restoring
from phauld.destination.surroundings import Surroundings
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.session import Phase
from phauld.sync_records import SyncRecords
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 2.0  #: between two tries to remove the images


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this node gives to each of its sessions."""

    name: str
    criu: Criu
    workloads: Workloads
    data_port: DataPort
    hooks: HookSettings | None
    sync: SyncRecords


class Holdings:
    """Of one session."""

    def __init__(
        self, incoming: Incoming, host: Host, directory: Path, journal: IncomingRecord, course: Course
    ) -> None:
        self._incoming = incoming
        self._journal = journal
        self._course = course
        self._taking: asyncio.Task[int] | None = None  # files of a container
        self._is_in_a_hurry = False
        self._holds_images = course.phase not in session.FINAL
        self.directory = directory
        self.around: Final = Surroundings(
            incoming,
            node_name=host.name,
            hooks=host.hooks,
            sync=host.sync,
            pid=lambda: self.tree.pid,
            is_recovered=course.phase is not Phase.ABSENT,
        )
        self.filling: Final = Filling(incoming, host.criu, journal)
        self.tree: Final = Restoring(incoming, host.criu, host.workloads, journal, self.filling, self.around, course)
        self.images: Final = ImageStore(incoming, directory, host.criu)
        self.stream: Final = PageStream(host.data_port, incoming.pipe)

    def remember(self, entry: IncomingEntry) -> None:
        """It is an earlier phauld's: know again what that left."""
        self.tree.remember(entry)
        self.around.made = self._incoming.carried
        self.directory = Path(entry.detail.get("images", self.directory))
        self.filling.remember(entry, self.directory)

    @property
    def promise(self) -> Promise:
        """What is reserved for it now: nothing, once its pages are in the tree."""
        return self._incoming.promise if self._holds_images else Promise(bytes=0, in_memory=False)

    async def prepare(self) -> None:
        """What leaves nothing behind that the journal would have to know. Raises as `Session.open` does."""
        await self.stream.open()
        await asyncio.to_thread(self.around.sync.open)
        if not self._is_opened_first:
            await self.tree.make_slot()
        self._journal.note(
            images=str(self.directory),
            record=str(self.tree.slot.directory) if self.tree.slot is not None else "",
            workload=self._incoming.spec.name,
            **self.around.note(),
        )
        await self.filling.open(self.directory)

    async def make(self) -> None:
        """What the journal knows of by now. Raises as `Session.open` does."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.around.container is not None:
            await self.around.container.open()
        if self._is_opened_first:
            await self.tree.make_slot()
            assert self.tree.slot is not None
            self._journal.note(record=str(self.tree.slot.directory))
            await self._journal.record(self._course.phase)
        await self.around.hooks.prepare()

    @property
    def _is_opened_first(self) -> bool:
        container = self.around.container
        return container is not None and container.is_opened_first

    async def take_files(
        self, requests: AsyncIterator[remote_pb2.PutFilesRequest], first: remote_pb2.PutFilesRequest
    ) -> int:
        """Of a container; the bytes of them. Raises `PhaseError`, and what `ContainerPlace.take` does."""
        if self.around.container is None or self._taking is not None:
            raise PhaseError(self._course.phase, "PUT_FILES")
        self._taking = asyncio.create_task(self.around.container.take(requests, first), name="files")
        try:
            return await self._taking
        except asyncio.CancelledError:
            self._taking.cancel()  # by the caller; or it was, as the session is over
            raise
        finally:
            await asyncio.wait([self._taking])
            self._taking = None

    def hurry(self) -> None:
        """The tree stands still from now on: this session goes first."""
        if not self._is_in_a_hurry:
            self._is_in_a_hurry = True
            in_a_hurry.enter()

    def _calm(self) -> None:
        if self._is_in_a_hurry:
            self._is_in_a_hurry = False
            in_a_hurry.leave()

    async def kill_tree(self) -> None:
        """Nothing of it is left on return."""
        await self.around.mute()
        await self.around.sync.aclose()
        await self.tree.kill()

    async def settle(self) -> bool:
        """The tree runs, and what it was made of goes once its memory is complete; `False` if that never will be."""
        self._calm()
        await self.around.settle()
        await self.tree.settle()
        try:
            await self.filling.wait()
        except CriuError as exc:  # pages are missing: better no process than one with zeros in their place
            await unattended.kill(self.tree.root)
            logger.error("pages lost, the tree was killed migration_id=%s error=%s", self._incoming.migration_id, exc)
            self._course.note_failure(exc)
        if self.filling.fetches:
            self._course.failure = None  # of the restore; whatever it was, the tree runs
            try:
                await self.filling.wait_for_source(self.tree.root)
            except CriuError as exc:  # stays filling: the source must not give up its copy
                self._course.failure = exc
                logger.error("pages lost migration_id=%s error=%s", self._incoming.migration_id, exc)
                return False
        await self.around.hooks.commit_again()
        await self.clean_up()
        return True

    async def clean_up(self) -> None:
        """Aborted, or what a tree that runs was made of."""
        self._calm()
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        await self.around.sync.aclose()
        self.around.sync.release()
        await self.images.aclose()
        await self.stream.aclose()
        await self.tree.discard()
        await self.filling.aclose()
        if not await self._remove_images():
            self._course.start(self._remove_images_later())
        self._holds_images = False
        if self._course.phase is Phase.ABORTED:
            await self.around.take_back()

    async def _remove_images(self) -> bool:
        try:
            await asyncio.to_thread(shutil.rmtree, self.directory)
        except FileNotFoundError:
            pass
        except OSError as exc:  # read-only, or an I/O error: not for ever, one hopes
            logger.error("images not removed migration_id=%s error=%s", self._incoming.migration_id, exc)
            return False
        return True

    async def _remove_images_later(self) -> None:
        while not await self._remove_images():  # noqa: ASYNC110 - nothing tells when it is writable again
            await asyncio.sleep(AGAIN_SECONDS)
