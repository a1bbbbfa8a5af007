"""The source's side of the last step: the seed's `Local`, and `CriuLocal`, which keeps the commit protocol.

`CriuLocal` is the shell around the table in `commit.py`: it feeds events in and performs the acts that come out. All
the time from `post-dump` on, the tree is frozen in criu's hands.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from phaul.v1 import remote_pb2
from phaul_client import commit
from phaul_client.cargo import Cargo
from phaul_client.commit import Do, Event, Phase
from phaul_client.config import Config
from phaul_client.coordinator import Coordinator, Journal, nothing
from phaul_client.cork import uncork
from phaul_client.doubt import Doubt
from phaul_client.errors import MigrationCancelled, PeerError, PhaulError, RolledBack
from phaul_client.images import open_directory, relative_parent
from phaul_client.pieces import image_pieces
from phaul_client.remote import GrpcRemote
from phaul_client.status import reason_of, remedy_of
from phaul_client.timeline import Step, aligned
from phaul_client.tree import Tree, identity, is_alive, stopped_pids
from phaul_client.tree_lock import TreeLock
from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.network_lock import remove_network_lock
from phaul_criu.requests import DumpOptions
from phaul_criu.stats import DumpStats
from phaul_criu.swrk import Notification
from phaul_criu.urgency import hurry, in_a_hurry

logger = logging.getLogger(__name__)

#: After its request, so that the destination has that first.
_LOOK_SECONDS: Final = 0.003
LAST_DUMP: Final = "last"  #: the directory of its images, in that of the migration


class Local(Protocol):
    """The seed's interface to the source: the last dump, the copy of its images, and the restore."""

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Dump the tree over `config.memfd`, with `last_client_images_path` as the parent; copy; restore.

        The tree is frozen all the while. Returning kills it; raising lets it run on.
        """


@runtime_checkable
class ServesPages(Local, Protocol):
    """A `Local` that can also do post-copy."""

    async def dump_copy_serve(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Dump the tree without its pages; copy; restore; serve the pages to the tree that runs there.

        Returning kills it; raising lets it run on, unless the error is `OutcomeUnknown`.
        """


class Guard(Protocol):
    """Sees to a tree's connections if the criu that holds it is killed."""

    async def watch(self, root_pid: int) -> None:
        """From now on, for the tree that criu holds. Raises `OSError`."""

    async def aclose(self) -> None:
        """It is not needed any more."""


StartGuard = Callable[[], Awaitable[Guard]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the last step is done."""

    dump: DumpOptions  #: everything but descriptors, directories and the parent
    root: Mapping[str, Any] | None = None  #: whom the PID named when it was chosen; `None`: whoever has it now
    cargo: Cargo | None = None  #: files that go with the tree
    freeze_budget_seconds: float = 60.0  #: a tree that stands still for longer is let run on
    doubt: Doubt = field(default_factory=Doubt)
    start_guard: StartGuard | None = None  #: of a tree whose connections are kept, should its criu be killed


def unlock_network(directory: Path) -> None:
    """Remove the network lock of the last dump, whose images lie there, if it made one and it still holds."""
    try:
        with open_directory(directory) as descriptor:
            remove_network_lock(descriptor)
    except FileNotFoundError:
        pass  # the dump did not come that far
    except (OSError, ValueError) as exc:  # the tree is where it should be all the same
        logger.warning("network lock not removed directory=%s error=%s", directory, exc)


class CriuLocal(Coordinator):
    """Moves the tree from its last dump to its commit. Good for one migration."""

    def __init__(
        self,
        migration_id: str,
        remote: GrpcRemote,
        journal: Journal,
        settings: Settings,
        *,
        on_phase: Callable[[Phase], None] = lambda _: None,
        clean_up: Callable[[], Awaitable[None]] = nothing,
    ) -> None:
        super().__init__(
            migration_id,
            remote,
            journal,
            phase=Phase.PREFLIGHT,
            doubt=settings.doubt,
            on_phase=on_phase,
            clean_up=clean_up,
        )
        self._settings = settings
        self._config: Config | None = None
        self._directory = Path()
        self._stopped_before: frozenset[int] = frozenset()
        self._stop_wanted: Event | None = None  # a cancel or a deadline, until it has become an event
        self._task: asyncio.Task[object] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._image_names: set[str] = set()
        self._standing: Tree | None = None  # the tree as it stands, before it is stopped
        self._lock = TreeLock()
        self._guard: Guard | None = None
        self.cargo = settings.cargo or Cargo(remote)
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

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """See `Local`. Raises `RolledBack` or `MigrationCancelled` (the tree runs on here)."""
        self._config = config
        self._task = asyncio.current_task()
        self._directory = config.wdir / LAST_DUMP
        self._directory.mkdir(mode=0o700)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            await self.cargo.prepare()
            options = dataclasses.replace(
                self._settings.dump,
                images_dir_fd=descriptor,
                pid=config.pid,
                page_server_fd=config.memfd,
                parent_img=relative_parent(self._directory, last_client_images_path),
                track_mem=last_client_images_path is not None,
                log_file="dump.log",
            )
            await self._guard_connections(options)
            await self._dump(criu, self._lock.options(options))
            await self._complete()
        except (Exception, asyncio.CancelledError) as exc:
            self._stop_watchdog()
            await self.unwind(exc)
        finally:
            self._stop_watchdog()
            os.close(descriptor)
            await self._leave_connections()
            self._let_go_of_tree()

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

    def _check_root(self, pid: int) -> None:
        """Raises `PhaulError` PID_NOT_FOUND if the process has ended since it was chosen, and another has its PID."""
        if self._settings.root is not None and not is_alive(self._settings.root):
            raise PhaulError(f"process {pid} has ended", reason="PID_NOT_FOUND")

    async def _notified(self, notification: Notification) -> None:
        match notification.name:
            case "pre-dump":
                self._start_watchdog()
            case "query-ext-files":
                assert self._config is not None
                await self._hold_connections(self._config.pid)
                uncork(self._config.memfd)
                self.cargo.freeze()  # criu asks this once it holds every task
            case "post-dump":
                self._dumped_at = time.monotonic()
                await self.fire(Event.TREE_FROZEN)
                if self._phase is Phase.ROLLING_BACK:
                    raise self._cause or RuntimeError("rolled back without a cause")

    async def _guard_connections(self, options: DumpOptions) -> None:
        """Before the freeze."""
        self._lock = TreeLock.prepare(self._migration_id, options)
        if options.tcp_established and self._settings.start_guard is not None:
            self._guard = await self._settings.start_guard()

    async def _hold_connections(self, pid: int) -> None:
        """criu holds every task of the tree and has looked at no socket yet. Raises `OSError`."""
        self._lock.lock(pid)
        if self._guard is not None:
            await self._guard.watch(pid)

    async def _leave_connections(self) -> None:
        self._lock.leave()
        if self._guard is not None:
            await self._guard.aclose()

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
                return self._stop_tree()
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
            pieces = itertools.chain(self._image_pieces(), self.cargo.tails())
            self.image_bytes = (await self._remote.put_images(pieces)).bytes
            self.steps += await self.cargo.finish()
        except (PhaulError, OSError, TimeoutError) as exc:
            return self._failed(exc)
        return Event.IMAGES_COPIED

    def _image_pieces(self) -> Iterator[remote_pb2.FilePiece]:
        """Read while those before them are on their way. Raises `OSError`."""
        for piece in image_pieces(self._directory, self._remote.image_index):
            self._image_names.add(piece.image_name)
            yield piece

    async def _send_restore(self) -> Event:
        sent = time.monotonic()
        looking = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_meanwhile)
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

    def _look_meanwhile(self) -> None:
        """While the destination builds it. It cannot change: a criu that loses hold of it is noticed later."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            self._look_at_tree()

    def _look_at_tree(self) -> None:
        """Raises `ProcessLookupError`, `FileNotFoundError`."""
        assert self._config is not None
        if self._standing is None:
            self._standing = Tree.below(self._config.pid)
        self._standing.identities()

    def _stop_tree(self) -> Event:
        """No await in here: between the look at criu and the commit nothing may happen."""
        try:
            self._look_at_tree()
            self._tree, self._standing = self._standing, None
            assert self._tree is not None
            self._tree.stop(self._stopped_before)
            self._journal.note(tree=self._tree.identities())
        except (ProcessLookupError, FileNotFoundError) as exc:
            return self._failed(exc)
        if not self._tree.is_traced():
            self._cause = CriuError("dump", "criu died with the tree in its hands")
            return Event.CRIU_LOST
        if self._stop_wanted is not None:  # its cancellation has not arrived yet, and must not arrive after this
            return self._stop_wanted
        return Event.TREE_STOPPED

    def _let_go_of_tree(self) -> None:
        for tree in (self._tree, self._standing):
            if tree is not None:
                tree.close()

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
        raise self._end(error) from error

    async def _roll_back(self, error: BaseException) -> None:
        self._lock.unlock()  # criu has let go of the connections
        try:
            if self._phase in commit.CANCELLABLE:
                self._cause = self._cause or error
                await self.fire(self._stop_wanted or Event.FAILED)
        finally:  # whatever becomes of that, nothing was committed: the tree must not stay stopped
            await self._resume_tree()
        await self.fire(Event.TREE_RESUMED)

    def _end(self, error: BaseException) -> BaseException:
        if self._stop_wanted is Event.CANCELLED:
            return MigrationCancelled(self._migration_id)
        cause = self._cause or error
        if self._stop_wanted is Event.DEADLINE_PASSED:
            budget = self._settings.freeze_budget_seconds
            return RolledBack(
                self._migration_id,
                f"the tree stood still for more than {budget:g} s and runs on here",
                reason="DEADLINE_EXCEEDED",
                remedy="a larger --freeze-budget, a faster link, or pre-copy",
            )
        if isinstance(cause, asyncio.CancelledError):
            return cause
        return RolledBack(self._migration_id, str(cause), reason=reason_of(cause), remedy=remedy_of(cause))
