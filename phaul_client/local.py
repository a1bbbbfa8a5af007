"""The source's side of the last step over a page stream: the seed's `Local`, and `CriuLocal`, which keeps the protocol.

All the time from `post-dump` on, the tree is frozen in criu's hands.
"""

import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from phaul_client.commit import Event
from phaul_client.config import Config
from phaul_client.errors import PhaulError
from phaul_client.last_step import LastStep
from phaul_client.timeline import Step
from phaul_client.tree import identity, stopped_pids
from phaul_criu.criu import Criu
from phaul_criu.requests import DumpOptions
from phaul_criu.urgency import hurry, in_a_hurry


class Local(Protocol):
    """The seed's interface to the source: the last dump, the copy of its images, and the restore."""

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Dump the tree over `config.memfd`, with `last_client_images_path` as the parent; copy; restore.

        The tree is frozen all the while. Returning kills it; raising lets it run on.
        """


@runtime_checkable
class LetsGo(Local, Protocol):
    """A `Local` that knows when a tree that has been held back must run freely: after all that can be done before."""

    let_go: Callable[[], Awaitable[None]]


@runtime_checkable
class ServesPages(Local, Protocol):
    """A `Local` that can also do post-copy."""

    async def dump_copy_serve(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Dump the tree without its pages; copy; restore; serve the pages to the tree that runs there.

        Returning kills it; raising lets it run on, unless the error is `OutcomeUnknown`.
        """


class CriuLocal(LastStep):
    """Moves the tree from its last dump to its commit. Good for one migration."""

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """See `Local`. Raises `RolledBack` or `MigrationCancelled` (the tree runs on here)."""
        self._page_stream = config.memfd
        async with self._under_way(config) as descriptor:
            try:
                options = await self._options(descriptor, last_client_images_path)
                await self._dump(criu, dataclasses.replace(options, page_server_fd=config.memfd))
            finally:
                self._stop_watchdog()
                await self._guarded.settled()

    async def _dump(self, criu: Criu, options: DumpOptions) -> None:
        swrk = await criu.prestart(options.passed_fds)
        hurry(swrk.pid or 0)
        started = time.monotonic()
        try:
            self._check_root(options.pid)
            self._stopped_before = stopped_pids(options.pid)
            self._journal.note(
                root=identity(options.pid), stopped_before=sorted(self._stopped_before), criu=identity(swrk.pid or 0)
            )
            await self.fire(Event.LAST_ROUND)
            await self._guarded.watch(swrk.pid or 0, options)
            with in_a_hurry():
                await self.let_go()
        except (FileNotFoundError, ProcessLookupError) as exc:
            await swrk.aclose()
            raise PhaulError(f"process {options.pid} has ended", reason="PID_NOT_FOUND") from exc
        except BaseException:
            await swrk.aclose()
            raise
        with in_a_hurry():
            stats = await criu.dump(options, on_notify=self._notified, swrk=swrk)
        ended = time.monotonic()
        self.dump_stats = stats
        frozen_at = max(started, ended - (stats.freezing_microseconds + stats.frozen_microseconds) / 1e6)
        self.steps.insert(0, Step("freeze and dump", frozen_at, max(frozen_at, self._dumped_at)))
        commits = [step for step in self.steps if step.name == "commit"]
        self.pause_seconds = (commits[-1].end if commits else ended) - frozen_at
