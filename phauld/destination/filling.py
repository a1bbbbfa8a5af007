"""Where a tree's memory comes from that is filled while it is built and runs: images here, or its source.

The invariant: before the tree runs, pages that are lost are noticed (`check`); from the moment that it is watched
(`watch`) it ends with who fills it, so that it never reads a zero in place of a page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phaul_client.tree import identity
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError, LazyPagesFailed
from phaul_criu.lazy import LazyPages, LazyPagesOptions
from phaul_criu.urgency import calm
from phauld.destination.fetching import Fetching
from phauld.destination.incoming_spec import Incoming
from phauld.destination.page_stream import STREAM_SECONDS
from phauld.guarding.lazy_hold import Guard, Left
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.lazy_pages.lazy_chain import PageSource, has_parent, make_lazy
from phauld.proc import is_dead

logger = logging.getLogger(__name__)

GUARD_SECONDS: Final = 5.0


class Filling:
    """Of one session; nothing at all for a tree that is restored with all of its memory."""

    def __init__(self, incoming: Incoming, criu: Criu, journal: IncomingRecord) -> None:
        self._incoming = incoming
        self._criu = criu
        self._journal = journal
        self.fetching: Fetching | None = None  #: from the source
        self._lazy: LazyPages | None = None
        self._left: Left | None = None  # the lazy-pages child of an earlier phauld
        self._guard: Guard | None = None
        self._page_source: PageSource | None = None  # serves earlier rounds to the lazy-pages child

    @property
    def fetches(self) -> bool:
        """Whether pages are missing at the source's end of a post-copy."""
        return self.fetching is not None and self.fetching.is_filling

    @property
    def pages_missing(self) -> int:
        """Pages of a post-copy that have not arrived; 0 if that is not known."""
        return self.fetching.pages_missing if self.fetching is not None else 0

    def remember(self, entry: IncomingEntry, directory: Path) -> None:
        """It is an earlier phauld's: know again what that left."""
        if "lazy" in entry.detail and not entry.cleaned:
            with contextlib.suppress(OSError):  # it has ended
                self._left = Left(entry.detail["lazy"])
        if "relay" in entry.detail:
            filling = "fetching" in entry.detail and not entry.cleaned
            self.fetching = Fetching.found(directory / "relay", entry.detail["relay"], is_filling=filling)

    async def open(self, directory: Path) -> None:
        """Have ready what takes time to start. Raises `OSError`."""
        lazy, postcopy = self._incoming.restore.lazy_pages, self._incoming.postcopy
        if postcopy or lazy:
            self._guard = await Guard.start()
        if lazy and not (postcopy or self._incoming.stands_still):
            self._page_source = await PageSource.start()
        if postcopy:
            await asyncio.to_thread(directory.mkdir, parents=True, mode=0o700)
            self.fetching = await Fetching.open(directory / "relay", await self._criu.version())
            self._journal.note(relay=self.fetching.relay.process)

    async def start(self, images_fd: int, images: Path, *, from_source: bool) -> bool:
        """Start who fills the tree that is to be restored from `images`; whether there is such. Raises `CriuError`."""
        if self.fetching is not None and from_source:
            self._journal.note(fetching=True)
            await self.fetching.start(self._criu.binary, images)
            return True
        if self._incoming.restore.lazy_pages:
            self._lazy = await self._start_lazy_pages(images_fd, images)
            self._journal.note(lazy=identity(self._lazy.pid))
            return True
        return False

    async def _start_lazy_pages(self, images_fd: int, images: Path) -> LazyPages:
        """Fill memory from the images; those of earlier rounds need somebody who serves them."""
        if not has_parent(images):
            return await LazyPages.start(self._criu.binary, LazyPagesOptions(images_dir_fd=images_fd))
        await asyncio.to_thread(make_lazy, images)
        if self._page_source is None:
            self._page_source = await PageSource.start()
        with self._page_source.serve(images) as source:
            options = LazyPagesOptions(images_dir_fd=images_fd, page_server_fd=source.fileno())
            return await LazyPages.start(self._criu.binary, options)

    async def watch(self, root_pid: int) -> None:
        """From now on the tree ends with who fills it. Raises `LazyPagesFailed` if that has ended already."""
        if self._guard is None:
            return
        try:
            if self.fetches and self.fetching is not None:
                await self._guard.watch(await self.fetching.criu_pid(), root_pid)
            elif self._lazy is not None:
                await self._guard.watch(self._lazy.pid, root_pid)
        except OSError as exc:
            if self._lazy is not None:
                await _check_lives(self._lazy)
            raise LazyPagesFailed("lazy-pages", f"who fills the tree cannot be watched: {exc}") from exc

    async def check(self) -> None:
        """Raises `LazyPagesFailed` if who fills the tree has failed."""
        if self.fetching is not None:
            self.fetching.check()
        elif self._lazy is not None:
            await _check_lives(self._lazy)

    async def hold_if_lost(self) -> None:
        """Not to be let go: its guard kills it, and the criu that waits here, so that it never ran and resumes."""
        try:
            await self.check()
        except CriuError as exc:
            logger.warning("pages lost before it ran migration_id=%s error=%s", self._incoming.migration_id, exc)
            await asyncio.sleep(GUARD_SECONDS)

    def make_way(self) -> None:
        """The tree is about to run; else, on a node of few processors, it would wait for its own pages."""
        if self._page_source is not None:
            self._page_source.calm()
        if self._lazy is not None:
            calm(self._lazy.pid)
        if self.fetching is not None:
            self.fetching.make_way()

    async def wait(self) -> None:
        """Until every page of the images here is in. Raises `CriuError`: pages are missing in the tree."""
        try:
            if self._left is not None:
                await self._wait_for_left(self._left)
            if self._lazy is not None:
                await self._lazy.wait()
        except CriuError:
            await self._end_page_source()
            raise
        finally:
            self._lazy = None
        await self._end_page_source(STREAM_SECONDS)

    async def _wait_for_left(self, left: Left) -> None:
        try:
            status = await left.wait()
        finally:
            self._left = None
            left.close()
        if status:
            raise LazyPagesFailed("lazy-pages", f"ended with {status}")
        if status is None:
            logger.warning("not known whether every page came migration_id=%s", self._incoming.migration_id)

    async def wait_for_source(self, root: Mapping[str, Any]) -> None:
        """Until every page of the source is in. Raises `CriuError`: it stays filling, and the tree was killed."""
        if self.fetches and self.fetching is not None:
            await self.fetching.wait(root)

    async def kill(self) -> None:
        """With a tree that shall not run."""
        if self._lazy is not None:
            await self._lazy.aclose()
            self._lazy = None
        await self._end_page_source()
        if self.fetching is not None:
            await self.fetching.aclose()

    def leave(self) -> None:
        """phauld stops: the next one sees to the end of it."""
        if self.fetching is not None:
            self.fetching.leave()

    async def aclose(self) -> None:
        """It is over, whatever became of it."""
        if self._guard is not None:
            await self._guard.aclose()
        await self._end_page_source()
        if self.fetching is not None:
            await self.fetching.aclose()

    async def _end_page_source(self, patience_seconds: float = 0) -> None:
        if self._page_source is not None:
            page_source, self._page_source = self._page_source, None
            await page_source.aclose(patience_seconds=patience_seconds)


async def _check_lives(lazy: LazyPages) -> None:
    """Raises `LazyPagesFailed` if it has failed already, or is about to: the event loop may not know yet."""
    if lazy.has_ended or is_dead(lazy.pid):
        await lazy.wait()
