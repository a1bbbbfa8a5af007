"""The last step of a migration at its source, from the freeze of the tree to its end here or there.

`LastStep` is the shell around the table in `commit.py` while criu holds the tree: it feeds events in, performs the acts
that come out, and bounds how long the tree stands still. How the pages go is its heirs' (`local.py`, `postcopy.py`).
The invariant: nothing is awaited between the last look at the criu that holds the tree and the commit.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul.v1 import remote_pb2
from phaul_client import commit
from phaul_client.cargo import Cargo
from phaul_client.case import Case
from phaul_client.commit import Do, Event, Phase
from phaul_client.config import Config
from phaul_client.coordinator import Coordinator
from phaul_client.cork import uncork
from phaul_client.early_images import EarlyImages
from phaul_client.errors import PeerError, PhaulError
from phaul_client.guarding import Guard, GuardedDump
from phaul_client.images import open_directory, relative_parent
from phaul_client.pieces import image_pieces
from phaul_client.roll_back import ended_as
from phaul_client.standing_tree import StandingTree
from phaul_client.timeline import Step, aligned
from phaul_client.tree import is_alive, stopped_pids
from phaul_client.tree_lock import TreeLock, unlock_network
from phaul_criu.child import finish
from phaul_criu.errors import CriuError
from phaul_criu.requests import DumpOptions
from phaul_criu.stats import DumpStats
from phaul_criu.swrk import Notification

logger = logging.getLogger(__name__)

#: After its request, so that the destination has that first.
_LOOK_SECONDS: Final = 0.003
LAST_DUMP: Final = "last"  #: the directory of its images, in that of the migration


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the last step is done."""

    dump: DumpOptions  #: everything but descriptors, directories and the parent
    root: Mapping[str, Any] | None = None  #: whom the PID named when it was chosen; `None`: whoever has it now
    cargo: Cargo | None = None  #: files that go with the tree
    freeze_budget_seconds: float = 60.0  #: a tree that stands still for longer is let run on
    guard: Guard | None = None  #: should criu be killed


async def _nothing() -> None: ...


class LastStep(Coordinator):
    """Good for one migration."""

    def __init__(self, case: Case, settings: Settings) -> None:
        super().__init__(case, Phase.PREFLIGHT)
        self._settings = settings
        self._config: Config | None = None
        self._directory = Path()
        self._page_stream: int | None = None  # criu corks it
        self._stopped_before: frozenset[int] = frozenset()
        self._stop_wanted: Event | None = None  # a cancel or a deadline, until it has become an event
        self._task: asyncio.Task[object] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._image_names: set[str] = set()
        self._standing = StandingTree(0)
        self._lock = TreeLock()
        self.guard = settings.guard
        self.let_go: Callable[[], Awaitable[None]] = _nothing  #: of a tree that is held back; see `local.LetsGo`
        self._guarded = GuardedDump(case.migration_id, settings.guard)
        self.cargo = settings.cargo or Cargo(case.remote)
        self._early = EarlyImages(case.remote)
        self.pause_seconds: float | None = None
        self.dump_stats: DumpStats | None = None
        self._dumped_at = 0.0  # on the monotonic clock, once criu has said so
        self.image_bytes = 0

    @property
    def is_dumping(self) -> bool:
        """From the last dump on, `cancel` is the way to stop."""
        return self._task is not None

    def cancel(self, event: Event = Event.CANCELLED) -> bool:
        """Stop as soon as possible and let the tree run on; `False` when it is too late."""
        if self._phase not in commit.CANCELLABLE:
            return False
        self._stop_wanted = event
        if self._task is not None:
            self._task.cancel()
        return True

    def lose_destination(self, error: PeerError) -> bool:
        """It is silent or has given up: as a cancel, but that is why; `False` when it is too late for that."""
        if self._phase not in commit.CANCELLABLE:
            return False
        self._cause = self._cause or error
        return self.cancel(Event.FAILED)

    @contextlib.asynccontextmanager
    async def _under_way(self, config: Config) -> AsyncIterator[int]:
        """Of the directory of its images, a descriptor. Whatever happens in here, the tree comes to its end after it.

        Raises `RolledBack` or `MigrationCancelled` (the tree runs on here), and `OutcomeUnknown`.
        """
        self._config = config
        self._task = asyncio.current_task()
        self._standing = StandingTree(config.pid)
        self._directory = config.wdir / LAST_DUMP
        self._directory.mkdir(mode=0o700)
        with open_directory(self._directory) as descriptor:
            try:
                await self.cargo.prepare()
                yield descriptor
                await self._complete()
            except (Exception, asyncio.CancelledError) as exc:
                self._stop_watchdog()
                await self.unwind(exc)
            finally:
                self._stop_watchdog()
                self._lock.leave()
                self._standing.close()
                if self._tree is not None:
                    self._tree.close()

    async def _options(self, descriptor: int, parent: Path | None) -> DumpOptions:
        """Of the dump, for which lock and guard are ready now. Before the freeze."""
        assert self._config is not None
        options = dataclasses.replace(
            self._settings.dump,
            images_dir_fd=descriptor,
            pid=self._config.pid,
            parent_img=relative_parent(self._directory, parent),
            track_mem=parent is not None,
            log_file="dump.log",
        )
        self._lock = TreeLock.prepare(self._migration_id, options)
        await self._guarded.start()
        return self._lock.options(options)

    def _check_root(self, pid: int) -> None:
        """Raises `PhaulError` PID_NOT_FOUND if the process has ended since it was chosen, and another has its PID."""
        if self._settings.root is not None and not is_alive(self._settings.root):
            raise PhaulError(f"process {pid} has ended", reason="PID_NOT_FOUND")

    async def _notified(self, notification: Notification) -> None:
        match notification.name:
            case "pre-dump":
                self._start_watchdog()
            case "query-ext-files":  # criu holds every task of the tree and has looked at no socket yet
                assert self._config is not None
                self._lock.lock(self._config.pid)
                await self._guarded.note_frozen()
                if self._page_stream is not None:
                    uncork(self._page_stream)
                self.cargo.freeze()
            case "post-dump":
                self._dumped_at = time.monotonic()
                self._guarded.note_whole()
                await self.fire(Event.TREE_FROZEN)
                if self._phase is Phase.ROLLING_BACK:
                    raise self._cause or RuntimeError("rolled back without a cause")

    def _start_watchdog(self) -> None:
        """From now on the tree stands still. Until now it ran, and the wait for criu's turn may have been long."""
        assert self._config is not None
        self._remote.watch_closely()
        self._check_root(self._config.pid)  # criu holds it: it cannot become another one any more
        self._stopped_before = stopped_pids(self._config.pid)
        self._journal.note(stopped_before=sorted(self._stopped_before))
        budget_seconds = self._settings.freeze_budget_seconds
        self._watchdog = asyncio.get_running_loop().call_later(budget_seconds, self.cancel, Event.DEADLINE_PASSED)

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    async def perform(self, act: Do) -> Event | None:
        match act:
            case Do.COPY_IMAGES:
                return await self._timed("copy images", self._copy_images)
            case Do.SEND_RESTORE:
                return await self._timed("restore", self._send_restore)
            case Do.STOP_TREE:
                return self._stop_tree() if await self._guarded.is_whole() else self._criu_lost()
            case Do.SEND_COMMIT:
                return await self._timed("commit", self._send_commit)
            case Do.START_DUMP | Do.KILL_TREE | Do.RESUME_TREE:
                return None  # criu does it: by the request that follows, or by the answer to `post-dump`
            case _:
                return await super().perform(act)

    async def _timed(self, name: str, act: Callable[[], Awaitable[Event]]) -> Event:
        start = time.monotonic()
        try:
            return await act()
        finally:
            self.steps.append(Step(name, start, time.monotonic()))

    async def _copy_images(self) -> Event:
        try:
            await self.cargo.send_rest()
            await self._early.finish()
            pieces = itertools.chain(self._image_pieces(), self.cargo.tails())
            self.image_bytes = self._early.bytes + (await self._remote.put_images(pieces)).bytes
            self.steps += await self.cargo.finish()
        except (PhaulError, OSError, ValueError, TimeoutError) as exc:
            return self._failed(exc)
        return Event.IMAGES_COPIED

    def _image_pieces(self) -> Iterator[remote_pb2.FilePiece]:
        """Read while those before them are on their way. Raises `OSError`."""
        self._image_names |= self._early.names
        for piece in image_pieces(self._directory, self._remote.image_index, but=self._early.names):
            self._image_names.add(piece.image_name)
            yield piece

    async def _send_restore(self) -> Event:
        sent = time.monotonic()
        looking = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._standing.look_early)
        try:
            answer = await self._remote.restore(
                image_files=len(self._image_names), timeout_seconds=self._settings.freeze_budget_seconds
            )
        except PeerError as exc:
            return self._failed(exc)
        finally:
            looking.cancel()
        self.steps += aligned(answer.timeline, sent, time.monotonic())
        self.destination_pid = answer.pid
        return Event.DESTINATION_PREPARED

    def _stop_tree(self) -> Event:
        """No await in here: between the look at criu and the commit nothing may happen."""
        try:
            self._tree = self._standing.take()
            self._tree.stop(self._stopped_before)
            self._journal.note(tree=self._tree.identities())
        except (ProcessLookupError, FileNotFoundError) as exc:
            return self._failed(exc)
        if not self._tree.is_traced():
            return self._criu_lost()
        if self._stop_wanted is not None:  # its cancellation has not arrived yet, and must not arrive after this
            return self._stop_wanted
        return Event.TREE_STOPPED

    def _criu_lost(self) -> Event:
        self._cause = CriuError("dump", "criu died with the tree in its hands")
        return Event.CRIU_LOST

    def _failed(self, cause: BaseException) -> Event:
        self._cause = cause
        return Event.FAILED

    async def _complete(self) -> None:
        """criu has ended well: it killed the tree."""
        if self._phase is not Phase.CONFIRMED:
            raise RuntimeError(f"criu ended well in phase {self._phase}")
        await finish(self._finish_kill())

    async def _finish_kill(self) -> None:
        await self._kill_tree()
        self._lock.unlock()
        unlock_network(self._directory)
        await self.fire(Event.TREE_KILLED)

    async def unwind(self, error: BaseException) -> None:
        """Something went wrong, or we are cancelled, and criu has let go of the tree: bring it to its end.

        Raises what it ended as; returns if it has moved all the same.
        """
        if self._phase is Phase.CONFIRMED:  # the tree runs at the destination; criu failed to kill this one
            await finish(self._finish_kill())
            return None
        if self._phase in (*commit.IN_DOUBT, Phase.PREFLIGHT, *commit.FINAL):
            raise error  # stopped, until somebody knows; or nothing has begun, or it is over already
        await finish(self._roll_back(error))
        budget = self._settings.freeze_budget_seconds
        raise ended_as(self._migration_id, self._cause or error, self._stop_wanted, budget) from error

    async def _roll_back(self, error: BaseException) -> None:
        self._lock.unlock()  # criu has let go of the connections
        try:
            if self._phase in commit.CANCELLABLE:
                self._cause = self._cause or error
                await self.fire(self._stop_wanted or Event.FAILED)
        finally:  # whatever becomes of that, nothing was committed: the tree must not stay stopped
            await self._resume_tree()
        await self.fire(Event.TREE_RESUMED)
