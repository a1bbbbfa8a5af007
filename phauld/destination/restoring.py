"""The tree of one session: built by a criu below its shim, held, let go or killed, and looked at when criu died.

It tells the session's table what happens (`TREE_HELD`, `TREE_RUNS`, `TREE_LOST`, `TREE_NEVER_RAN`) and does what that
says. The invariant: criu is answered at `post-restore` by `release` alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from phaul_client.errors import ImageCorrupt
from phaul_client.tree import identity
from phaul_criu.child import finish
from phaul_criu.connection_lock import ConnectionLock
from phaul_criu.connections import Connection
from phaul_criu.criu import Criu
from phaul_criu.inner_connections import inner_connections
from phaul_criu.swrk import Notification, Swrk
from phaul_criu.timers import rearm
from phauld.destination import stuck_criu, unattended
from phauld.destination.course import Course
from phauld.destination.filling import Filling
from phauld.destination.incoming_spec import Incoming
from phauld.destination.surroundings import Surroundings
from phauld.journal import IncomingEntry, IncomingRecord
from phauld.session import Event, Phase
from phauld.trees.restore_slot import RestoreSlot
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)


class Restoring:
    """The tree of one session."""

    def __init__(
        self,
        incoming: Incoming,
        criu: Criu,
        workloads: Workloads,
        journal: IncomingRecord,
        filling: Filling,
        around: Surroundings,
        course: Course,
    ) -> None:
        self._incoming = incoming
        self._criu = criu
        self._workloads = workloads
        self._journal = journal
        self._filling = filling
        self._around = around
        self._course = course
        self.slot: RestoreSlot | None = None
        self.pid = 0
        self.root: dict[str, Any] = {}  #: identity of the tree's root
        self._holder: dict[str, Any] = {}  # and of the criu that holds it
        self._running: asyncio.Task[None] | None = None
        self._released: asyncio.Future[None] | None = None
        self._quiet: ConnectionLock | None = None
        self._watching: asyncio.Task[None] | None = None  # a criu that may be stuck

    def remember(self, entry: IncomingEntry) -> None:
        """It is an earlier phauld's: know again what that left."""
        if entry.detail.get("record") and entry.phase is not Phase.RUNNING:
            self.slot = self._workloads.found_slot(Path(entry.detail["record"]))
        self.pid = entry.detail.get("pid", 0)
        self.root = entry.detail.get("root", {})
        self._holder = entry.detail.get("holder", {})

    async def make_slot(self) -> None:
        """Have a criu ready. Raises `OSError`, `CriuError`, `WorkloadExists`."""
        spec, criu, container = self._incoming.spec, self._criu.binary, self._around.container
        if container is None:
            self.slot = await self._workloads.restore_under_shim(
                spec, criu, attempts=self._incoming.attempts, migration_id=self._incoming.migration_id
            )
            return
        with container.log(self._incoming.carried) as log:
            own_cgroups = container.has_cgroup_namespace
            slot = await self._workloads.restore_under_shim(
                spec,
                criu,
                new_cgroup_namespace=own_cgroups,
                inherited=log,
                migration_id=self._incoming.migration_id,
            )
        try:
            await container.attend(slot.directory)
        except BaseException:
            await finish(slot.discard())
            raise
        self.slot = slot

    def start(self, images: Path, *, fetches: bool) -> None:
        """Build the tree from these images, beside the calls; `fetches`: with memory that is still at its source."""
        self._released = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(images, fetches=fetches), name="restore")

    async def _run(self, images: Path, *, fetches: bool) -> None:
        """From the request to criu's last word."""
        assert self.slot is not None
        images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            options = dataclasses.replace(self._incoming.restore, images_dir_fd=images_fd)
            _rearm_timers(images)
            self._hold_resets(images)
            await self._around.hold()
            if (container := self._around.container) is not None:
                options = container.restore_options(options)
                await container.enter(await self.slot.criu_pid())
                self.slot.go()
            if await self._filling.start(images_fd, images, from_source=fetches):
                self._course.mark("lazy-pages starts")
            swrk = Swrk.attach(self.slot.take_swrk())
            self.pid = await self._criu.restore(options, on_notify=self._notified, swrk=swrk)
            self._course.tell(Event.TREE_RUNS)
        except Exception as exc:
            logger.warning("restore failed migration_id=%s error=%s", self._incoming.migration_id, exc)
            self._course.tell(Event.TREE_LOST, exc)
        finally:
            os.close(images_fd)
            self._let_resets()
            await self._around.leave_container()

    def _hold_resets(self, images: Path) -> None:
        """While criu makes one end of a connection after the other, no end is told that there is no other."""
        if not self._incoming.restore.tcp_established or self._around.container is not None:
            return
        if connections := _inner_connections(images):
            try:
                self._quiet = ConnectionLock.open("phaul_restore_" + self._incoming.migration_id.replace("-", "_"))
                self._quiet.hold_resets(connections)
            except OSError as exc:
                logger.warning("resets are not held back migration_id=%s error=%s", self._incoming.migration_id, exc)

    def _let_resets(self) -> None:
        """All ends are there, or none will be. What cannot be undone ends with phauld."""
        quiet, self._quiet = self._quiet, None
        if quiet is not None:
            quiet.close()

    async def _notified(self, notification: Notification) -> None:
        match notification.name:
            case "pre-restore":
                self._course.mark("criu starts")
            case "post-restore":
                self._course.mark("criu builds the tree")
                await self._hold(notification.pid or 0)
            case "pre-resume":
                await self._filling.hold_if_lost()
            case "post-resume":
                self._course.mark("criu lets it go")
                self._course.tell(Event.TREE_RUNS)

    async def _hold(self, pid: int) -> None:
        """The tree is complete: it stands until `release`."""
        assert self._released is not None
        assert self.slot is not None
        self.pid, self.root = pid, identity(pid)
        self._holder = stuck_criu.find(pid, self.slot.shim_pid)
        self._journal.note(pid=pid, root=self.root, holder=self._holder)
        if self._around.container is not None:
            self._around.container.adopt(pid)
        await self._filling.watch(pid)
        self._course.tell(Event.TREE_HELD)
        await self._released

    async def release(self) -> None:
        """Let it go."""
        assert self._released is not None
        assert self.slot is not None
        self.slot.release()
        self._course.mark("journal: committing")
        await self._around.show()
        self._let_resets()
        self._filling.make_way()
        self._released.set_result(None)
        self._watch_criu()

    async def look(self) -> None:
        """The shim decides: it outlived phauld, and it looks at the tree once criu is gone."""
        assert self.slot is not None
        if self._watching is None:  # an earlier phauld let it go
            self._watch_criu()
        self.pid = await self.slot.outcome() or self.pid
        if self.slot.is_unattended:
            migration_id = self._incoming.migration_id
            logger.error("the shim was killed, its tree is looked at migration_id=%s", migration_id)
            ran = await unattended.runs(self.root, self._criu.binary)
        else:
            ran = self.slot.ran
        self._course.tell(Event.TREE_RUNS if ran else Event.TREE_NEVER_RAN)

    def _watch_criu(self) -> None:
        self._watching = asyncio.create_task(stuck_criu.end_if_stuck(self._holder, self.root), name="criu")

    async def kill(self) -> None:
        """Nothing of it is left on return."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._filling.kill()
        await self.discard()
        await unattended.kill(self.root)  # if there was no shim to do it

    async def discard(self) -> None:
        """Its shim goes, if it still is the session's."""
        if self.slot is not None:
            await self.slot.discard()
            self.slot = None

    async def settle(self) -> None:
        """It runs: its record stands for its name, and its shim is its own from now on."""
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.keep(self._incoming.spec.name)
        if self._running is not None:
            await asyncio.wait([self._running])
        if slot is not None:
            await slot.vouch(self.root)

    async def aclose(self) -> None:
        """phauld stops, and nothing is being let go."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])


def _inner_connections(images: Path) -> set[Connection]:
    """Raises `OSError`, `ImageCorrupt`."""
    try:
        return inner_connections((images / "files.img").read_bytes())
    except FileNotFoundError:
        return set()
    except ValueError as exc:
        raise ImageCorrupt(str(exc)) from exc


def _rearm_timers(images: Path) -> None:
    """Raises `OSError`, `ImageCorrupt`."""
    try:
        files = rearm((images / "files.img").read_bytes())
    except FileNotFoundError:
        return
    except ValueError as exc:
        raise ImageCorrupt(str(exc)) from exc
    if files is not None:
        (images / "files.img").write_bytes(files)
